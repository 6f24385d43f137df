"""What A does by way of B, read exactly: against a network cut by hand; the bound of readings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from nrm import Explainer, Measure
from nrm.composites import LRPZero
from nrm.errors import QueryError
from nrm.evaluation import Families, Interventions, pearson
from nrm.evaluation.scores import SCORES
from nrm_reproduce.readings import HERE, Between, best_additive, gauss

REMOVALS = ("zero", "mean")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()]
    top = [nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4, 2)]
    model = nn.Sequential(*layers, *top).double().eval().requires_grad_(False)
    for layer in (model[2], model[4]):  # whose rectifiers switch
        layer.weight.mul_(4)
        layer.bias.uniform_(-1, 1)
    return model


def picture():
    return torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def x():
    return picture()


def asked(model, x, removal, layers=("1", "3")) -> tuple[Families, Interventions]:
    explainer = Explainer(model, LRPZero())
    R: Measure = explainer(x, target=1)
    return Families(R, layers), Interventions(explainer, x, target=1, removal=removal)


class ByHand:
    """The same network cut by hand; channels are removed."""

    def __init__(self, model, x, removal):
        self.top = lambda h: model[4:](h)[:, 1]
        self.block = model[2:4]
        self.a = model[:2](x)
        self.h = self.block(self.a)
        removed = self.a.mean((2, 3), keepdim=True) if removal == "mean" else 0 * self.a
        keep = 1 - torch.eye(3, dtype=torch.float64)[:, :, None, None]
        self.below = self.a * keep + removed * (1 - keep)
        self.without = self.block(self.below)
        self.masks = torch.eye(4, dtype=torch.float64)[:, :, None, None]

    def slopes(self, values):
        with torch.enable_grad():
            values = values.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.top(values).sum(), values)
        return slope


@pytest.mark.parametrize("memory", [1, 2**28], ids=["one by one", "at once"])
@pytest.mark.parametrize("removal", REMOVALS)
def test_readings_against_the_network_cut_by_hand(model, x, removal, memory):
    own = ByHand(model, x, removal)
    between = Between(*asked(model, x, removal), memory)
    change = own.h - own.without
    close = torch.testing.assert_close
    close(between.here.view_as(own.h), own.h)
    close(between.without.view_as(own.without), own.without)
    close(between.output, own.top(own.h)[0])
    close(between.lost, own.top(own.h) - own.top(own.without))
    close(between.along_path(HERE), (own.slopes(own.h) * change).sum((2, 3)))
    mean = sum(w * own.slopes(own.without + t * change) for t, w in gauss(3))
    close(between.along_path(gauss(3)), (mean * change).sum((2, 3)))
    there = own.a - own.below
    mean = sum(w * own.slopes(own.block(own.below + t * there)) for t, w in gauss(2))
    close(between.along_removal(gauss(2)), (mean * change).sum((2, 3)))
    for a in range(3):
        for b in range(4):
            mask, old = own.masks[b], own.without[a : a + 1]
            in_place = own.top(own.h) - own.top(own.h * (1 - mask) + old * mask)
            close(between.in_place()[a, b], in_place[0])
            restored = own.top(old * (1 - mask) + own.h * mask) - own.top(old)
            close(between.restored()[a, b], restored[0])


@pytest.mark.parametrize("removal", REMOVALS)
def test_the_path_becomes_complete(model, x, removal):
    between = Between(*asked(model, x, removal))
    left = [
        float((between.along_path(gauss(n)).sum(1) - between.lost).abs().max()) for n in (1, 200)
    ]
    assert left[0] > 1e-3
    assert left[1] < 2e-2 * left[0]


def test_a_linear_top_has_one_reading(x):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 2)).double().eval()
    families, interventions = asked(model.requires_grad_(False), x, "zero")
    between = Between(families, interventions)
    contribution = interventions.joint(*families.sets)
    for reading in (
        between.along_path(HERE),
        between.along_path(gauss(1)),
        between.in_place(),
        between.restored(),
        SCORES["blocks"](families, interventions),
    ):
        torch.testing.assert_close(reading, contribution)


def test_what_is_bypassed_is_refused(x):
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(32, 2)

        def forward(self, x):
            h = self.a(x).relu()
            return self.out((h + self.b(h).relu()).flatten(1))

    model = Skip().double().eval().requires_grad_(False)
    with pytest.raises(QueryError, match="bypassed"):
        Between(*asked(model, x, "zero", ("a", "b")))


@pytest.mark.parametrize("seed", range(4))
def test_no_reading_with_the_same_sums_exceeds_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    contribution = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    lost = contribution.sum(1) * (-1 if seed == 3 else 1) + torch.randn(5, generator=generator)
    bound = best_additive(contribution, lost)
    within = contribution - contribution.mean(1, keepdim=True)
    scales = torch.logspace(-3, 4, 2000, dtype=torch.float64)
    tried = [pearson(lost[:, None] / 4 + s * within, contribution) for s in scales]
    assert max(tried) == pytest.approx(bound, abs=2e-3)
    for _ in range(50):
        other = torch.randn(5, 4, generator=generator, dtype=torch.float64) + 2 * contribution
        other += (lost - other.sum(1))[:, None] / 4
        assert pearson(other, contribution) <= bound + 1e-12
    assert best_additive(contribution, contribution.sum(1)) == pytest.approx(1)
