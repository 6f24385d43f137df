"""An oracle whose contributions are derivatives, and networks that only it describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from support import oracle as o


@dataclass
class Gradients(o.Oracle):
    """An oracle whose contributions are derivatives, found by complex steps.

    `start` and `steps` say the path; without steps it is the local linearisation.
    """

    start: float = 0.0
    steps: int = 0
    way: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def given(self, name: str, x: np.ndarray) -> None:
        self.input(name, x)
        times = np.arange(self.steps + 1) / self.steps if self.steps else [1.0]
        self.way[name] = [self.start + t * (x.ravel() - self.start) for t in times]

    def elementwise_on(self, name: str, x: str, f: Callable[[np.ndarray], np.ndarray]) -> None:
        self.identity(name, x, f)
        self.way[name] = [f(v) for v in self.way[x]]

    def picked(self, name: str, x: str, indices: list[int]) -> None:
        self.pick(name, [(x, i) for i in indices])
        self.way[name] = [v[indices] for v in self.way[x]]

    def function(
        self,
        name: str,
        f: Callable[..., np.ndarray],
        *operands: str,
        bias: np.ndarray | None = None,
        flat: bool = False,
    ) -> None:
        """`f` of several operands plus a bias; `flat`: columns of zero end in a leaf."""
        shift = 0.0 if bias is None else bias
        points = list(zip(*(self.way[x] for x in operands), strict=True))
        self.way[name] = [f(*point) + shift for point in points]
        self.values[name] = self.way[name][-1]
        if self.steps:
            ends = pairwise(points)
            steps = [
                ([(a + b) / 2 for a, b in zip(p, q, strict=True)],
                 [b - a for a, b in zip(p, q, strict=True)])
                for p, q in ends
            ]  # fmt: skip
        else:
            steps = [(points[0], points[0])]
        size = len(self.values[name])
        found = [np.zeros((len(self.values[x]), size)) for x in operands]
        for middle, move in steps:
            for k, point in enumerate(middle):
                for i in range(len(point)):
                    nudged = [p.astype(complex) for p in middle]
                    nudged[k][i] += 1e-30j
                    found[k][i] += f(*nudged).imag / 1e-30 * move[k][i]
        late = "bias" if bias is not None and self.bias_is_input else "flat" if flat else None
        if late:
            self.leaves.append(f"{name}.{late}")
        for j in range(size):
            column = [
                o.Parent((x, i), 1.0, found[k][i, j])
                for k, x in enumerate(operands)
                for i in range(len(self.values[x]))
                if flat or self.connected(f, operands, k, i, j)
            ]
            if late:
                added = float(bias[j]) if late == "bias" and not self.steps else 0.0
                if flat and abs(sum(p.weight for p in column) + added) <= self.rounding(name, j):
                    column, added = [o.Parent(p.neuron, 1.0, 0.0) for p in column], 1.0
                column.append(o.Parent((f"{name}.{late}", j), 1.0, added))
            self.parents[name, j] = column
        self.rules[name], self.output = o.fixed, name

    def rounding(self, name: str, j: int) -> float:
        return max(4 * 2.0**-52 * abs(float(self.values[name][j])), 1e-150)

    def connected(self, f, operands, k: int, i: int, j: int) -> bool:
        ends = [self.values[x].astype(complex) for x in operands]
        ends[k][i] += 1j
        return f(*ends)[j].imag != 0


def linear(net: Gradients, name: str, layer: nn.Linear, x: str, positions: int = 1) -> None:
    w, b = (t.detach().numpy() for t in (layer.weight, layer.bias))

    def f(v: np.ndarray) -> np.ndarray:
        return (v.reshape(positions, -1) @ w.T).ravel()

    net.function(name, f, x, bias=np.tile(b, positions))


def softmax(v: np.ndarray) -> np.ndarray:
    powers = np.exp(v - v.real.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


class GatedNorm(nn.Module):
    """A gate, a layer norm, a quotient of two variables."""

    inputs = ((3,),)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.norm = nn.LayerNorm(3, eps=0.5)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        gate = torch.sigmoid(self.b(x))
        h = self.norm(self.a(x).tanh() * gate)
        return self.head(h / (gate + 1) + h)

    def describe(self, x: list[np.ndarray], net: Gradients) -> None:
        net.given("input", x[0])
        linear(net, "a", self.a, "input")
        linear(net, "b", self.b, "input")
        net.elementwise_on(":sigmoid", "b", sigmoid)
        net.elementwise_on(":tanh", "a", np.tanh)
        net.function(":mul", lambda a, b: a * b, ":tanh", ":sigmoid", flat=True)
        gain, shift = (t.detach().numpy() for t in (self.norm.weight, self.norm.bias))

        def norm(v: np.ndarray) -> np.ndarray:
            centred = v - v.mean()
            return gain * centred / np.sqrt((centred**2).mean() + 0.5)

        net.function("norm", norm, ":mul", bias=shift, flat=True)
        if net.bias_is_input:
            net.function(":add", lambda v: v, ":sigmoid", bias=np.ones(3))
        else:
            net.elementwise_on(":add", ":sigmoid", lambda v: v + 1)
        net.function(":div", lambda a, b: a / b, "norm", ":add", flat=True)
        net.function(":add@1", lambda a, b: a + b, ":div", "norm")
        linear(net, "head", self.head, ":add@1")


class Attend(nn.Module):
    """One head of attention over two positions; its head is rectified."""

    inputs = ((2, 2),)

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        scores = self.q(x) @ self.k(x).mT
        return self.head(torch.relu((scores.softmax(-1) @ self.v(x)).flatten(1)))

    def describe(self, x: list[np.ndarray], net: Gradients) -> None:
        net.given("input", x[0])
        for name in "qkv":
            linear(net, name, getattr(self, name), "input", 2)
        net.picked(MT, "k", [0, 2, 1, 3])

        def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return (a.reshape(2, 2) @ b.reshape(2, 2)).ravel()

        net.function(":matmul", product, "q", MT, flat=True)
        net.function(":softmax", lambda v: softmax(v.reshape(2, 2)).ravel(), ":matmul", flat=True)
        net.function(":matmul@1", product, ":softmax", "v", flat=True)
        net.picked(":flatten", ":matmul@1", [0, 1, 2, 3])
        net.elementwise_on(":relu", ":flatten", lambda v: np.maximum(v, 0))
        linear(net, "head", self.head, ":relu")


MT = ":mT"


class Pooled(nn.Module):
    """A winner that changes on the way, a norm without centring, a logarithm of a softmax."""

    inputs = ((1, 4),)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 1), nn.RMSNorm(2, eps=0.5)
        self.head = nn.Linear(4, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        h = self.norm(F.max_pool1d(self.conv(x), 2))
        return self.head(h.flatten(1)).log_softmax(-1)

    def describe(self, x: list[np.ndarray], net: Gradients) -> None:
        net.given("input", x[0])
        w, b, gain = (
            t.detach().numpy() for t in (self.conv.weight, self.conv.bias, self.norm.weight)
        )
        bias = np.repeat(b, 4)
        net.function("conv", lambda v: np.outer(w.ravel(), v).ravel(), "input", bias=bias)

        def largest(v: np.ndarray) -> np.ndarray:
            pairs = v.reshape(4, 2)
            return pairs[np.arange(4), pairs.real.argmax(1)]

        if net.steps:
            net.function(":max_pool1d", largest, "conv", flat=True)
        else:
            pairs = net.values["conv"].reshape(4, 2)
            net.picked(":max_pool1d", "conv", (2 * np.arange(4) + pairs.argmax(1)).tolist())

        def norm(v: np.ndarray) -> np.ndarray:
            rows = v.reshape(2, 2)
            return (gain * rows / np.sqrt((rows**2).mean(1, keepdims=True) + 0.5)).ravel()

        net.function("norm", norm, ":max_pool1d", flat=True)
        net.picked(":flatten", "norm", [0, 1, 2, 3])
        linear(net, "head", self.head, ":flatten")
        net.function(":log_softmax", lambda v: np.log(softmax(v)), "head", flat=True)


CURVED = {net.__name__: net for net in (GatedNorm, Attend, Pooled)}
