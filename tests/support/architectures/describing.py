"""How walks go through a network, and what networks are described to an oracle with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from nrm import rules
from nrm.composites import Composite, kind
from support import oracle as o
from support.networks import RULES
from support.oracle import Neuron

ALPHAS: dict[str, rules.Alpha] = {
    "value": rules.ValueTakesAll(),
    "uniform": rules.Uniform(),
    "shares": rules.Shares(0.75, 0.25),
    "order": rules.InOrder(0.4, 0.6),
}


@dataclass(frozen=True)
class Walks:
    """How walks go: the rule of sums, the alpha of products, what else is an identity or not."""

    rule: str = "zero"
    alpha: str = "value"
    bias: str = "drop"
    softmax: str = "identity"
    norm: str = "linear"

    @property
    def column(self) -> o.ColumnRule:
        return RULES[self.rule][1]

    @property
    def softmax_column(self) -> o.ColumnRule | None:
        return self.column if self.softmax == "taylor" else None

    def shares(self, *gates: int) -> list[float]:
        """The alphas of a product of two factors, of which those with the larger rank are gates."""
        alike = gates[0] == gates[1]
        if self.alpha == "order":
            return [0.4, 0.6]
        if self.alpha == "uniform" or alike:
            return [0.5, 0.5]
        value = {"value": 1.0, "shares": 0.75}[self.alpha]
        return [value, 1 - value] if gates[0] < gates[1] else [1 - value, value]

    @property
    def composite(self) -> Composite:
        rule = RULES[self.rule][0]
        choices: list = [(kind("softmax"), rule)] if self.softmax == "taylor" else []
        if self.norm == "identity":
            choices.append((kind("layernorm", "groupnorm", "instancenorm"), rules.Identity()))
        return Composite(choices, rule, alpha_default=ALPHAS[self.alpha])

    def __str__(self) -> str:
        parts = [self.rule, self.alpha, self.bias]
        parts += [self.softmax] if self.softmax == "taylor" else []
        return "-".join(parts + ([self.norm] if self.norm == "identity" else []))


def every(name: str, size: int) -> list[Neuron]:
    return [(name, i) for i in range(size)]


def by_position(
    net: o.Oracle,
    name: str,
    walks: Walks,
    x: str,
    positions: int,
    layer: nn.Module | tuple[np.ndarray, np.ndarray | None],
) -> None:
    """A linear layer at each of several positions."""
    w, b = parameters(layer) if isinstance(layer, nn.Module) else layer
    outs, ins = w.shape
    terms = [
        (t * outs + j, x, t * ins + i, w[j, i]) for t, j, i in np.ndindex(positions, outs, ins)
    ]
    bias = None if b is None else np.tile(b, positions)
    net.weighted(name, walks.column, positions * outs, terms, bias)


def plus(net: o.Oracle, name: str, walks: Walks, x: list[Neuron], constant: np.ndarray) -> None:
    """Neurons plus a constant: an identity, or with a bias as another parent."""
    if net.bias_is_input:
        terms = [(j, *neuron, 1.0) for j, neuron in enumerate(x)]
        net.weighted(name, walks.column, len(x), terms, constant)
    else:
        net.elementwise(name, x, lambda v: v + constant)


def pair(layer: nn.Module, which: str) -> tuple[np.ndarray, np.ndarray]:
    return as_array(getattr(layer, f"weight_{which}")), as_array(getattr(layer, f"bias_{which}"))


def parameters(layer: nn.Module) -> tuple[np.ndarray, np.ndarray | None]:
    bias = layer.bias
    return as_array(layer.weight), None if bias is None else as_array(bias)


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def randomize(*layers: nn.Module) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
