"""Small random networks, each as a torch module and, neuron by neuron, as an oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from nrm import rules
from nrm.composites import Everywhere
from support import oracle as o

Describe = Callable[[nn.Module, list[np.ndarray], o.Oracle, o.ColumnRule], None]

RULES: dict[str, tuple[rules.Rule, o.ColumnRule]] = {
    "zero": (rules.Zero(), o.zero),
    "epsilon": (rules.Epsilon(1e-30), o.zero),
    "plain-gamma": (rules.PlainGamma(0.5), o.plain_gamma(0.5)),
    "gamma": (rules.Gamma(0.25), o.sign_aware_gamma(0.25)),
    "gamma-0": (rules.Gamma(0.0), o.sign_aware_gamma(0.0)),
    "zplus": (rules.ZPlus(), o.zplus),
    "alpha2beta1": (rules.AlphaBeta(2.0, 1.0), o.alpha_beta(2.0, 1.0)),
    "alpha1beta0": (rules.AlphaBeta(1.0, 0.0), o.alpha_beta(1.0, 0.0)),
    "flat": (rules.Flat(), o.flat),
    "wsquare": (rules.WSquare(), o.wsquare),
    "zbox": (rules.ZBox(-9.0, 9.0), o.zbox(-9.0, 9.0)),
}

OCCLUSION: dict[str, tuple[rules.Rule, o.Occlusion]] = {
    "occlusion": (rules.Occlusion(), o.Occlusion()),
    "occlusion-rest": (rules.Occlusion(rest_to_bias=True), o.Occlusion(rest_to_bias=True)),
}


class MLP(nn.Module):
    inputs = ((3,),)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def describe(self, x: list[np.ndarray], net: o.Oracle, rule: o.ColumnRule) -> None:
        h = net.input("input", x[0])
        h = net.linear("layers.0", rule, h, *_parameters(self.layers[0]))
        h = net.relu("layers.1", h)
        h = net.linear("layers.2", rule, h, *_parameters(self.layers[2]))
        h = net.activation("layers.3", h, np.tanh)
        net.linear("layers.4", rule, h, *_parameters(self.layers[4]))


class Conv(nn.Module):
    """Strided, padded, grouped and dilated convolutions, both kinds of pooling."""

    inputs = ((2, 5, 5),)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 2, stride=1, padding=0)
        self.b = nn.Conv2d(2, 4, 2, stride=2, padding=1, dilation=2, groups=2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.max_pool2d(torch.relu(self.a(x)), 2)
        h = nn.functional.adaptive_avg_pool2d(torch.relu(self.b(h)), 1)
        return self.head(torch.flatten(h, 1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, rule: o.ColumnRule) -> None:
        h = net.input("input", x[0])
        h, shape = net.conv2d("a", rule, h, (2, 5, 5), *_parameters(self.a))
        h = net.relu(":relu", h)
        h = net.max_pool(":max_pool2d", h, shape, 2)
        h, shape = net.conv2d(
            "b", rule, h, (2, 2, 2), *_parameters(self.b), 2, padding=1, dilation=2, groups=2
        )
        h = net.relu(":relu@1", h)
        area = shape[1] * shape[2]
        h = net.weighted(
            ":adaptive_avg_pool2d",
            rule,
            4,
            [(c, h, c * area + k, 1 / area) for c in range(4) for k in range(area)],
        )
        h = net.identity(":flatten", h)
        net.linear("head", rule, h, *_parameters(self.head))


class Concat(nn.Module):
    """Two branches side by side, concatenated."""

    inputs = ((1, 3, 3),)

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(1, 2, 2)
        self.small = nn.Conv2d(2, 1, 1)
        self.large = nn.Conv2d(2, 2, 3, padding=1)
        self.head = nn.Conv2d(3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.squeeze(x))
        h = torch.cat([torch.relu(self.small(h)), torch.relu(self.large(h))], 1)
        return self.head(h).flatten(1)

    def describe(self, x: list[np.ndarray], net: o.Oracle, rule: o.ColumnRule) -> None:
        h = net.input("input", x[0])
        h, shape = net.conv2d("squeeze", rule, h, (1, 3, 3), *_parameters(self.squeeze))
        h = net.relu(":relu", h)
        a, _ = net.conv2d("small", rule, h, shape, *_parameters(self.small))
        b, _ = net.conv2d("large", rule, h, shape, *_parameters(self.large), padding=1)
        a, b = net.relu(":relu@1", a), net.relu(":relu@2", b)
        h = net.cat(":cat", a, b)
        h, _ = net.conv2d("head", rule, h, (3, 2, 2), *_parameters(self.head))
        net.identity(":flatten", h)


class Residual(nn.Module):
    """A skip connection around a layer with batch norm, and one around the whole."""

    inputs = ((3,),)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.inner = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 2)
        for tensor in (self.norm.running_mean, self.norm.weight, self.norm.bias):
            nn.init.normal_(tensor)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        h = torch.relu(self.norm(self.inner(h)) + h)
        h = h - x
        return self.last(h + 1.5)

    def describe(self, x: list[np.ndarray], net: o.Oracle, rule: o.ColumnRule) -> None:
        norm = self.norm
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
        shift = norm.bias.detach().numpy() - norm.running_mean.numpy() * scale
        x0 = net.input("input", x[0])
        h = net.linear("first", rule, x0, *_parameters(self.first))
        h = net.relu(":relu", h)
        weight, _ = _parameters(self.inner)
        inner = net.linear("inner", rule, h, weight * scale[:, None], shift)
        inner = net.identity("norm", inner)
        h = net.add(":add", rule, [(inner, 1.0), (h, 1.0)])
        h = net.relu(":relu@1", h)
        h = net.add(":sub", rule, [(h, 1.0), (x0, -1.0)])
        if net.bias_is_input:
            h = net.add(":add@1", rule, [(h, 1.0)], np.full(3, 1.5))
        else:
            h = net.identity(":add@1", h, lambda v: v + 1.5)
        net.linear("last", rule, h, *_parameters(self.last))


class TwoInputs(nn.Module):
    """Two inputs; one enters late and is used twice, a layer is called twice."""

    inputs = ((2,), (3,))

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(2, 3)
        self.shared = nn.Linear(3, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.relu(self.left(x) + y)
        h = torch.relu(self.shared(h))
        h = torch.relu(self.shared(h)) + 2 * y
        return self.last(h)

    def describe(self, x: list[np.ndarray], net: o.Oracle, rule: o.ColumnRule) -> None:
        a, b = net.input("x", x[0]), net.input("y", x[1])
        h = net.linear("left", rule, a, *_parameters(self.left))
        h = net.relu(":relu", net.add(":add", rule, [(h, 1.0), (b, 1.0)]))
        h = net.relu(":relu@1", net.linear("shared", rule, h, *_parameters(self.shared)))
        h = net.relu(":relu@2", net.linear("shared@1", rule, h, *_parameters(self.shared)))
        late = net.identity(":mul", b, lambda v: 2 * v)
        h = net.add(":add@1", rule, [(h, 1.0), (late, 1.0)])
        net.linear("last", rule, h, *_parameters(self.last))


NETWORKS = {net.__name__: net for net in (MLP, Conv, Concat, Residual, TwoInputs)}


@dataclass
class Case:
    """One network with one input of batch 2, and an oracle for each sample."""

    model: nn.Module
    inputs: list[Tensor]
    oracles: list[o.Oracle]
    rule: rules.Rule

    @property
    def composite(self):  # type: ignore[no-untyped-def]
        return Everywhere(self.rule)


@cache
def built(network: str, seed: int) -> tuple[nn.Module, list[Tensor]]:
    """The same for all tests of a session, which read it and write nothing to it."""
    torch.manual_seed(seed)
    model = NETWORKS[network]().double().eval()
    return model, [torch.randn(2, *shape, dtype=torch.float64) for shape in model.inputs]


def make(
    network: str, rule: str, bias_is_input: bool, seed: int, nonnegative: bool = False
) -> Case:
    model, inputs = built(network, seed)
    if nonnegative:
        inputs = [x.abs() for x in inputs]
    package_rule, column_rule = (RULES | OCCLUSION)[rule]
    oracles = []
    for sample in range(2):
        net = o.Oracle(bias_is_input)
        model.describe([x[sample].numpy() for x in inputs], net, column_rule)
        oracles.append(net)
    with torch.no_grad():
        expected = model(*inputs).flatten(1).numpy()
    found = np.stack([net.values[net.output] for net in oracles])
    np.testing.assert_allclose(found, expected, atol=1e-12)  # the description is right
    return Case(model, inputs, oracles, package_rule)


def _parameters(layer: nn.Module) -> tuple[np.ndarray, np.ndarray | None]:
    bias = layer.bias
    return layer.weight.detach().numpy(), None if bias is None else bias.detach().numpy()
