"""Channels that are removed by what they add to the next weighted sum, against plain runs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from support.interventions import (
    Residual,
    as_set,
    expected_joint,
    explainer_of,
    random_sets,
    recorded,
)
from torch import Tensor, nn

import nrm
from nrm.evaluation import Families
from nrm.evaluation.intervention import Interventions


class Fire(nn.Module):
    """As SqueezeNet ends: branches side by side, and a convolution that mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.Tanh())
        self.mix = nn.Sequential(nn.Dropout(), nn.Conv2d(8, 3, 3, padding=1, stride=2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        h = self.squeeze(x)
        return self.mix(torch.cat([self.left(h), self.right(h)], 1)).mean((2, 3))


def vgg() -> nn.Module:
    """As VGG ends: pooling, and linear layers that read channels position by position."""
    convolutions = (nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
    pooling = (nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout())
    linear = (nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    return nn.Sequential(*convolutions, *pooling, *linear)


BY_CHANNEL = [  # the layers, whether channels of the last one lead on by themselves
    (Fire, ["squeeze", "right"], True),
    (Fire, ["left", "right"], True),
    (Fire, ["right", "left"], True),
    (Fire, ["right"], True),
    (Fire, ["right", "right"], True),
    (Fire, ["input", "squeeze"], False),  # two ways lead on
    (Fire, ["squeeze", "mix.1"], False),  # no weighted sum lies above
    (vgg, ["1", "3"], True),
    (vgg, ["input", "1", "3"], True),
    (vgg, ["3", "1"], True),
    (vgg, ["3", "9"], True),
    (vgg, ["3", "11"], False),  # affine: not run at all
    (Residual, ["input", "stem"], False),
    (Residual, ["stem", "inner"], False),
]


@functools.cache
def by_channel(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    return build().double().eval()


@pytest.mark.parametrize(("build", "layers", "leads"), BY_CHANNEL)
def test_channels_by_what_they_add_to_the_next_weighted_sum(
    build: Callable[[], nn.Module],
    layers: list[str],
    leads: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = by_channel(build)
    torch.manual_seed(5)
    x = torch.randn(1, 2, 8, 8).double()
    if build is Residual:
        x = x[..., :4, :4]
    explainer = explainer_of(model)
    families = Families(explainer(x, target=1), layers).sets

    def joint(removal: str, memory: int) -> Tensor:
        interventions = Interventions(explainer, x, target=1, memory=memory, removal=removal)
        done: list[int] = []
        found = interventions.joint(*families, progress=done.append)
        assert sum(done) == runs[-1].total
        return found

    runs = recorded(monkeypatch, shortcuts=False)
    expected = {removal: joint(removal, 2**28) for removal in ("zero", "mean")}
    assert all(run.channels is None for run in runs)
    runs = recorded(monkeypatch)
    for removal, memory in (("zero", 1), ("mean", 5000), ("zero", 5000), ("mean", 2**28)):
        found = joint(removal, memory)
        torch.testing.assert_close(found, expected[removal], rtol=1e-10, atol=1e-12)
    assert [run.channels is not None for run in runs] == [leads] * 4


class Gated(nn.Module):
    """A branch that is computed after the weighted sum of the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.t = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b, self.o = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.t(self.n(self.a(x).relu()).relu()).relu()
        return self.o(h * self.b(x).relu())


def test_sets_that_also_lie_on_a_branch_beside_the_weighted_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    model, x = Gated().double().eval(), torch.ones(1, 3).double()
    both = nrm.neurons("a", 0) | nrm.neurons("b", 0) | nrm.neurons("b", 1) | nrm.neurons("b", 2)
    families = [[both, nrm.neurons("a", 1)], [nrm.neurons("n", c) for c in range(4)]]
    explainer, found = nrm.Explainer(model), []
    for shortcuts in (True, False):
        recorded(monkeypatch, shortcuts)
        found.append(Interventions(explainer, x, target=0).joint(*families))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert found[0].abs().max() > 0.01


def test_sets_of_some_of_a_channel_and_channels_of_no_activation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(5)
    model, x = vgg().double().eval(), torch.randn(1, 2, 8, 8).double()
    model[2].bias.data[3] = -100  # type: ignore[operator, union-attr]
    parts = [{"3": torch.zeros(5, 6, 6, dtype=torch.bool)} for _ in range(4)]
    for number, part in enumerate(parts):
        part["3"][number, :, number:] = True
    several = {"3": torch.zeros(5, 6, 6, dtype=torch.bool)}
    several["3"][1:3] = True
    first = random_sets(model, [x], ["1"], 3)
    runs = recorded(monkeypatch)
    interventions = Interventions(nrm.Explainer(model), x, target=0)
    for family in (parts, [*parts, several]):
        found = interventions.joint([as_set(s) for s in first], [as_set(s) for s in family])
        expected = expected_joint(model, [x], 0, [first, family], {})
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert (found[:, 3] == 0).all()
    assert [run.channels is not None for run in runs] == [True, False]


def test_infinite_activations_are_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    model, x = Fire().double().eval(), torch.randn(1, 2, 8, 8).double()
    model.right[1] = nn.ReLU().eval()
    model.right[0].bias.data[2] = -torch.inf  # type: ignore[operator, union-attr]
    runs = recorded(monkeypatch)
    interventions = Interventions(nrm.Explainer(model), x, target=0)
    outputs = interventions.without([[nrm.channels("right.0", 2)]])
    assert torch.isfinite(outputs).all()
    assert runs[0].channels is None


def test_division_that_rounds_is_not_affine(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.b(self.a(x))
            return self.c(h + torch.div(h, 0.1, rounding_mode="floor"))

    model, x = Rounded().double().eval(), torch.randn(1, 3).double()
    interventions = Interventions(nrm.Explainer(model), x, target=0)
    families = [[nrm.channels(layer, c) for c in range(4)] for layer in ("a", "b")]
    found = interventions.joint(*families)
    recorded(monkeypatch, shortcuts=False)
    torch.testing.assert_close(found, interventions.joint(*families))
