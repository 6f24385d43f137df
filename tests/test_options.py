"""Options that mean nothing are refused where they are given, naming the option."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import nrm
from nrm import composites, rules

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda v: rules.Gamma(v), "gamma"),
        (lambda v: rules.PlainGamma(v), "gamma"),
        (lambda v: rules.Epsilon(v), "stabilizer"),
        (lambda v: rules.AlphaBeta(v, 1.0), "alpha"),
        (lambda v: rules.AlphaBeta(2.0, v), "beta"),
        (lambda v: rules.Shares(v, 1.0), "value"),
        (lambda v: rules.Shares(1.0, v), "gate"),
        (lambda v: rules.InOrder(v, 1.0), "first"),
        (lambda v: rules.InOrder(1.0, v), "second"),
        (lambda v: rules.ZBox(v, 1e9), "low"),
        (lambda v: rules.ZBox(-1e9, v), "high"),
        (lambda v: rules.PathIntegrated(steps=v), "steps"),
        (lambda v: composites.GammaFlat(v), "gamma"),
        (lambda v: composites.EpsilonPlus(v), "stabilizer"),
        (lambda v: composites.EpsilonPlusFlat(v), "stabilizer"),
        (lambda v: composites.EpsilonGammaFlat(v), "stabilizer"),
        (lambda v: composites.EpsilonGammaFlat(gamma=v), "gamma"),
        (lambda v: composites.EpsilonGammaBox(v, 1e9), "low"),
        (lambda v: composites.EpsilonGammaBox(0, 1, gamma=v), "gamma"),
        (lambda v: composites.EpsilonAlpha2Beta1Flat(v), "stabilizer"),
        (lambda v: composites.CPLRP(v), "stabilizer"),
        (lambda v: composites.AttnLRP(v), "stabilizer"),
        (lambda v: composites.IntegratedGradients(steps=v), "steps"),
    ],
)
@pytest.mark.parametrize("value", [NAN, INF, -INF, "0.25", True, None, 1j, -0.5], ids=str)
def test_numbers_of_rules_are_checked(make, option, value):
    if option in ("low", "high") and value == -0.5:
        pytest.skip("a bound may be negative")
    with pytest.raises((TypeError, ValueError), match=option):
        make(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.AlphaBeta(2.0, 2.0), "alpha - beta = 1"),
        (lambda: rules.AlphaBeta(0.5, 0.0), "alpha"),
        (lambda: rules.Shares(0.5, 0.4), "sum to one"),
        (lambda: rules.Shares(1.5, -0.5), "value"),
        (lambda: rules.InOrder(0.5, 0.4), "sum to one"),
        (lambda: rules.ZBox(1.0, 0.0), "above high"),
        (lambda: rules.ZBox(torch.tensor([0.0, 2.0]), 1.0), "above high"),
        (lambda: rules.ZBox(torch.tensor([0.0, NAN]), 1.0), "NaN"),
        (lambda: rules.ZBox(torch.zeros(2), torch.ones(3)), "broadcast"),
        (lambda: rules.ZBox(torch.zeros(2, dtype=torch.bool), 1.0), "low"),
        (lambda: rules.ZBox(torch.zeros(2, dtype=torch.complex64), 1.0), "low"),
        (lambda: composites.EpsilonGammaBox(1.0, 0.0), "above high"),
        (lambda: rules.PathIntegrated(steps=0), "steps"),
        (lambda: rules.PathIntegrated(steps=2.5), "steps"),
        (lambda: rules.PathIntegrated(baseline=True), "baseline"),
        (lambda: rules.PathIntegrated(baseline=NAN), "NaN"),
        (lambda: rules.Occlusion(rest_to_bias="yes"), "rest_to_bias"),
        (lambda: composites.Occlusion(rest_to_bias=1), "rest_to_bias"),
        (lambda: composites.LRPAll(0.25), "defaults"),
        (lambda: composites.LRPAll(0), "defaults"),
        (lambda: composites.Everywhere("gamma"), "defaults"),
        (lambda: composites.Composite(None, rules.Zero()), "choices"),
        (lambda: composites.Composite([], rules.Zero(), bias="drops"), "'drop' or 'input'"),
        (lambda: composites.Composite([], rules.Zero(), bias=["drop"]), "'drop' or 'input'"),
    ],
)
def test_options_that_contradict_each_other(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    "option",
    [
        {"bias": "drops"},
        {"bias": True},
        {"bias": ["drop"]},
        {"strict": "yes"},
        {"strict": 1},
        {"strict": None},
        {"batch_axis": "first"},
        {"batch_axis": 1.0},
        {"batch_axis": True},
        {"batch_axis": -1},
        {"output": 3.5},
        {"output": True},
        {"output": ()},
        {"output": ("logits", 1.5)},
        {"output": torch.zeros(2)},
        {"fallback": "LocalLinear"},
        {"fallback": nrm.operators.LocalLinear},
        {"fallback": rules.LocalLinear()},
        {"composite": "GammaFlat"},
        {"composite": rules.Gamma},
    ],
    ids=str,
)
def test_options_of_the_explainer(option):
    with pytest.raises((TypeError, ValueError), match=next(iter(option))):
        nrm.Explainer(nn.Linear(2, 2).eval(), **option)


def test_numbers_come_as_anything_that_is_one():
    """numpy's numbers and integers mean the same, and equal rules are equal."""
    assert rules.Gamma(np.float32(0.25)) == rules.Gamma(0.25)
    assert rules.Gamma(1) == rules.Gamma(1.0)
    assert str(rules.Gamma(1)) == "Gamma(gamma=1.0)"
    assert rules.PathIntegrated(steps=np.int64(4)) == rules.PathIntegrated(steps=4)
    assert rules.AlphaBeta(1, 0) == rules.AlphaBeta(1.0, 0.0)
    assert composites.CPLRP(0).default == rules.Zero()
    assert composites.CPLRP(1e-3).default == rules.Epsilon(1e-3)


@pytest.mark.parametrize("bound", [[-1.0, -2.0], np.array([-1.0, -2.0]), torch.tensor([-1, -2])])
def test_bounds_of_a_box_may_be_lists_and_arrays(bound):
    x = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double().eval()
    nn.init.ones_(model.weight)
    found = nrm.Explainer(model, rules.ZBox(bound, 1.0))(x, target=0).heatmap()
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5]], dtype=torch.float64))


def test_bounds_of_another_shape_are_refused_by_name():
    model = nn.Linear(2, 1).eval()
    with pytest.raises(nrm.errors.InputError, match=r"ZBox.*does not broadcast"):
        nrm.Explainer(model, rules.ZBox(torch.zeros(3), 9.0))(torch.ones(1, 2), target=0).heatmap()


class _Mean(rules.Alpha):
    def coefficients(self, gates):
        return [NAN] * len(gates)


def test_coefficients_that_are_no_numbers_are_refused():
    class Gate(nn.Module):
        def forward(self, x):
            return x * x.flip(1)

    composite = composites.Composite([], rules.Zero(), alpha_default=_Mean())
    with pytest.raises(nrm.errors.QueryError, match="sum to one"):
        nrm.Explainer(Gate().eval(), composite)(torch.ones(1, 2), target=0)
