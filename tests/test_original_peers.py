"""Whose numbers are which: what other libraries print, had by one keyword, as docs/peers.md says.

Each row of the page's table is run here, the other library's side and ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nrm
from nrm import composites, rules
from nrm.composites import Composite, Everywhere, kind

PAGE = Path(__file__).parents[1] / "docs" / "peers.md"


class Net(nn.Module):
    """Signed inputs, biases of either sign, poolings, convolutions and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 5, 2, stride=2), nn.ReLU(), nn.AvgPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    model = Net().double().eval()
    return model, torch.randn(2, 3, 16, 16, dtype=torch.float64).clamp(-3.9, 3.9)


# -- the other side ------------------------------------------------------------------------------


def zennits(make: Callable[[Any], Any]) -> Callable[..., Tensor]:
    """A composite of zennit's, with its own stabiliser of 1e-6, from the logit of class 2."""

    def run(model: nn.Module, x: Tensor) -> Tensor:
        pytest.importorskip("zennit", reason="needs zennit")
        import zennit.attribution
        import zennit.composites
        import zennit.rules
        import zennit.types

        def start(output: Tensor) -> Tensor:
            return output * torch.eye(4).to(output)[[2, 2]]

        with zennit.attribution.Gradient(model, make(zennit)) as attributor:
            return attributor(x, start)[1].detach()

    return run


def everywhere(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One rule for all layers of zennit's, activations passed."""

    def composite(zennit: Any) -> Any:
        return zennit.composites.LayerMapComposite([
            (zennit.types.Activation, zennit.rules.Pass()),
            (zennit.types.AvgPool, zennit.rules.Norm()),
            ((zennit.types.Convolution, zennit.types.Linear), make(zennit.rules)),
        ])  # fmt: skip

    return composite


def captums(make: Callable[[Any], Any]) -> Callable[..., Tensor]:
    """One rule of captum's for all layers with weights, the logit of class 2."""

    def run(model: nn.Module, x: Tensor) -> Tensor:
        attr = pytest.importorskip("captum.attr", reason="needs captum")
        from captum.attr._utils import lrp_rules

        weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for module in weighted:
            module.rule = make(lrp_rules)
        with warnings.catch_warnings():  # it warns that inputs need gradients
            warnings.simplefilter("ignore")
            return attr.LRP(model).attribute(x.clone(), target=2).detach()

    return run


def innvestigates(alpha: float, beta: float, flat: bool) -> Callable[..., Tensor]:
    """iNNvestigate's sequential presets by their formulas, for layers without biases.

    Dense layers by `EpsilonRule(0.1)`, convolutions by alpha and beta, the first one flat if so.
    """

    def passed(layer: nn.Module, x: Tensor, R: Tensor, share: Callable[..., Tensor]) -> Tensor:
        leaf = x.detach().requires_grad_()
        output = layer(leaf)
        return leaf.detach() * torch.autograd.grad(output, leaf, share(R, output.detach()))[0]

    def by_sign(layer: nn.Conv2d, x: Tensor, R: Tensor, sign: float) -> Tensor:
        settings = {"stride": layer.stride, "padding": layer.padding}
        parts = [
            (x.clamp(min=0), (sign * layer.weight).clamp(min=0) * sign),
            (x.clamp(max=0), (sign * layer.weight).clamp(max=0) * sign),
        ]
        total = sum(F.conv2d(a, w, **settings) for a, w in parts)
        share = torch.where(total == 0, 0.0, R / torch.where(total == 0, 1.0, total))
        return sum(passed(lambda a, w=w: F.conv2d(a, w, **settings), a, R, lambda R, _: share)
                   for a, w in parts)  # fmt: skip

    def run(model: Net, x: Tensor) -> Tensor:
        layers = [*model.body, nn.Flatten(), *model.head]
        values = [x]
        for layer in layers:
            values.append(layer(values[-1]).detach())
        R = values[-1] * torch.eye(4).to(x)[[2, 2]]
        for place in reversed(range(len(layers))):
            layer, a = layers[place], values[place]
            if isinstance(layer, nn.ReLU):
                continue
            if isinstance(layer, nn.Linear):
                R = passed(layer, a, R, lambda R, z: R / (z + 0.1 * torch.where(z < 0, -1.0, 1.0)))
            elif isinstance(layer, nn.Conv2d) and place == 0 and flat:
                ones = torch.ones_like(layer.weight)
                settings = {"stride": layer.stride, "padding": layer.padding}
                count = F.conv2d(torch.ones_like(a), ones, **settings)
                R = torch.autograd.grad(
                    F.conv2d(leaf := a.detach().requires_grad_(), ones, **settings), leaf, R / count
                )[0]
            elif isinstance(layer, nn.Conv2d):
                R = alpha * by_sign(layer, a, R, 1.0) - beta * by_sign(layer, a, R, -1.0)
            elif isinstance(layer, nn.AvgPool2d):
                safe = lambda R, z: torch.where(z == 0, 0.0, R / torch.where(z == 0, 1.0, z))  # noqa: E731
                R = passed(layer, a, R, safe)
            else:  # the winner of a maximum takes all; a view
                leaf = a.detach().requires_grad_()
                R = torch.autograd.grad(layer(leaf), leaf, R)[0]
        return R.detach()

    return run


# -- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the page's table.

    Attributes:
        whose: the other library and its setting, as the page says it.
        ours: our composite, as the page says it, and whether biases absorb.
        stabilizer: of `rules.Original`.
        run: the other library.
    """

    whose: str
    ours: str
    stabilizer: float
    run: Callable[..., Tensor]
    bias: str = "input"


ONE = "Composite([(kind('conv', 'linear'), {})], rules.Zero())"
PRESET = "Composite([{0}(kind('conv'), rules.AlphaBeta({1})), (kind('linear'), rules.Epsilon(0.1))], rules.Zero())"  # noqa: E501
FLAT = "(composites.first, rules.Flat()), "

ROWS = [
    Row("zennit `rules.Epsilon(0.01)`", ONE.format("rules.Epsilon(0.01)"), 1e-6,
        zennits(everywhere(lambda z: z.Epsilon(0.01)))),
    Row("zennit `rules.Gamma(0.25)`", ONE.format("rules.Gamma(0.25)"), 1e-6,
        zennits(everywhere(lambda z: z.Gamma(0.25)))),
    Row("zennit `rules.ZPlus()`", ONE.format("rules.ZPlus()"), 1e-6,
        zennits(everywhere(lambda z: z.ZPlus()))),
    Row("zennit `rules.AlphaBeta(2, 1)`", ONE.format("rules.AlphaBeta(2, 1)"), 1e-6,
        zennits(everywhere(lambda z: z.AlphaBeta(2.0, 1.0)))),
    Row("zennit `rules.WSquare()`", ONE.format("rules.WSquare()"), 1e-6,
        zennits(everywhere(lambda z: z.WSquare()))),
    Row("zennit `rules.Flat()`", ONE.format("rules.Flat()"), 1e-6,
        zennits(everywhere(lambda z: z.Flat()))),
    Row("zennit `composites.EpsilonPlus()`", "composites.EpsilonPlus(1e-6)", 1e-6,
        zennits(lambda z: z.composites.EpsilonPlus())),
    Row("zennit `composites.EpsilonPlusFlat()`", "composites.EpsilonPlusFlat(1e-6)", 1e-6,
        zennits(lambda z: z.composites.EpsilonPlusFlat())),
    Row("zennit `composites.EpsilonAlpha2Beta1()`", 
        "Composite([(kind('conv'), rules.AlphaBeta(2, 1))], rules.Epsilon(1e-6))", 1e-6,
        zennits(lambda z: z.composites.EpsilonAlpha2Beta1())),
    Row("zennit `composites.EpsilonAlpha2Beta1Flat()`", "composites.EpsilonAlpha2Beta1Flat(1e-6)",
        1e-6, zennits(lambda z: z.composites.EpsilonAlpha2Beta1Flat())),
    Row("zennit `composites.EpsilonGammaBox(-4, 4)`", "composites.EpsilonGammaBox(-4.0, 4.0, 1e-6)",
        1e-6, zennits(lambda z: z.composites.EpsilonGammaBox(-4.0, 4.0))),
    Row("captum `EpsilonRule(0.1)`", ONE.format("rules.Epsilon(0.1)"), 1e-9,
        captums(lambda c: c.EpsilonRule(0.1))),
    Row("captum `GammaRule(0.25, set_bias_to_zero=True)`", ONE.format("rules.PlainGamma(0.25)"),
        1e-9, captums(lambda c: c.GammaRule(0.25, set_bias_to_zero=True)), "drop"),
    Row("iNNvestigate `LRPSequentialPresetA`, no biases", PRESET.format("", "1, 0"), 0.0,
        innvestigates(1, 0, False), "none"),
    Row("iNNvestigate `LRPSequentialPresetB`, no biases", PRESET.format("", "2, 1"), 0.0,
        innvestigates(2, 1, False), "none"),
    Row("iNNvestigate `LRPSequentialPresetBFlat`, no biases", PRESET.format(FLAT, "2, 1"), 0.0,
        innvestigates(2, 1, True), "none"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.whose)
def test_a_row_of_the_table(row: Row, network: tuple[nn.Module, Tensor], torchvision_models):
    model, x = network
    if row.bias == "none":
        model = Net().double().eval()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.bias = None
    names = {"Composite": Composite, "kind": kind}
    composite = eval(row.ours, {"composites": composites, "rules": rules, **names})
    bias = "drop" if row.bias == "none" else row.bias
    R = nrm.Explainer(model, composite, bias=bias)(x, target=2)
    found = R.heatmap(normalized=rules.Original(row.stabilizer))
    wanted = row.run(model, x)
    size = float(wanted.abs().max())
    assert size > 1e-6
    torch.testing.assert_close(found, wanted, atol=1e-6 * size, rtol=0)


def test_the_page_has_the_rows():
    text = PAGE.read_text()
    for row in ROWS:
        reading = f"`{row.stabilizer:g}`"
        bias = {"none": "none", "input": "absorb", "drop": "dropped"}[row.bias]
        line = f"| {row.whose} | `{row.ours}` | {bias} | {reading} |"
        assert line in text, line


# -- captum's own published test values ------------------------------------------------------------


class Simple(nn.Module):
    """captum's `SimpleLRPModel`: all weights two, then three."""

    def __init__(self, first: float = 2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        self.linear2 = nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.linear.weight, 2.0)
        self.linear.weight.data[0, 0] = first
        nn.init.constant_(self.linear2.weight, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(torch.relu(self.linear(x)))


class Conv(nn.Module):
    """captum's `BasicModel_ConvNet_One_Conv`, with its large negative biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc1 = nn.Conv2d(1, 2, 3), nn.Linear(8, 4)
        nn.init.ones_(self.conv1.weight)
        self.conv1.bias.data = torch.tensor([-50.0, -75.0])
        self.fc1.weight.data = torch.cat([torch.ones(4, 5), -torch.ones(4, 3)], 1)
        nn.init.zeros_(self.fc1.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc1(torch.relu(self.conv1(x)).flatten(1)))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        nn.init.constant_(self.linear.weight, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x


class Tanh(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 1, bias=False))
        for layer in (self[0], self[2]):
            nn.init.constant_(layer.weight, 0.1)


def two_rules(first: rules.Rule, second: rules.Rule) -> Composite:
    return Composite([(composites.path("linear"), first)], second)


PIXELS = [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11], [0, 0, 0, 0]]
PUBLISHED: dict[str, tuple[nn.Module, Composite, list, int | None, list]] = {
    "epsilon": (Simple(), Everywhere(rules.Epsilon(1e-9)), [[1, 2, 3]], None, [[18, 36, 54]]),
    "gamma": (
        Simple(-2.0), two_rules(rules.PlainGamma(1.0), rules.PlainGamma(0.25)),
        [[1, 2, 3]], None, [[28 / 3, 104 / 3, 52]],
    ),
    "alpha 1, beta 0": (
        Simple(-2.0), Everywhere(rules.ZPlus()), [[1, 2, 3]], None, [[12, 33.6, 50.4]],
    ),
    "tanh": (Tanh(), Everywhere(rules.Epsilon(1e-9)), [[1, 2, 3]], None,
             [[0.0269, 0.0537, 0.0806]]),
    "skip": (Skip(), Everywhere(rules.Epsilon(1e-9)), [[2, 3]], 1, [[10, 18]]),
    "convolution": (Conv(), Everywhere(rules.Epsilon(1e-9)),
                    [[[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]]], 0,
                    [[PIXELS]]),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_captums_published_test_values(name: str) -> None:
    model, composite, x, target, wanted = PUBLISHED[name]
    R = nrm.Explainer(model.eval(), composite, bias="input")(
        torch.tensor(x, dtype=torch.float32), target=target
    )
    found = R.heatmap(normalized=rules.Original(1e-9))
    np.testing.assert_allclose(found, np.array(wanted, dtype=np.float32), rtol=2e-3, atol=1e-4)
