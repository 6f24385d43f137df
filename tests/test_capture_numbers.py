"""Python numbers keep their digits in double models, and masks that add -inf stay finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import rules
from nrm.evaluation.intervention import Interventions

X = torch.tensor([[0.3, -0.7, 1.1]], dtype=torch.float64)


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("matrix", torch.eye(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.matrix)


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (lambda x, m: x + 0.1, 0.1),
        (lambda x, m: 0.1 + x, 0.1),
        (lambda x, m: x - 0.1, -0.1),
        (lambda x, m: 0.1 - x, 0.1),
        (lambda x, m: x.sub(0.1, alpha=0.3), -0.03),
        (lambda x, m: torch.add(x, 0.1, alpha=0.7), 0.07),
        (lambda x, m: x.add(np.float64(0.1)), 0.1),
        (
            lambda x, m: x.add(torch.arange(3), alpha=0.1),
            torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64),
        ),
        (lambda x, m: x - 3, -3.0),
        (lambda x, m: x + torch.tensor(0.1, dtype=torch.float64), 0.1),
        (lambda x, m: torch.addmm(torch.ones(3, dtype=x.dtype), x, m, beta=0.1, alpha=0.3), 0.1),
    ],
)
@pytest.mark.parametrize("rule", [rules.Zero(), rules.Epsilon(1e-30), rules.Gamma(0.0)], ids=str)
def test_constants_in_double_precision(function, constant, rule):
    """Under LRP-0 a constant takes itself divided by the sum, to the last digits."""
    exact = torch.as_tensor(constant, dtype=torch.float64).expand(3)
    model = Function(function).eval()
    with torch.no_grad():
        output = model(X)[0]
    for target in range(3):
        R = nrm.Explainer(model, rule, bias="input")(X, target=target)
        (share,) = R.biases().values()
        expected = float(exact[target] / output[target])
        assert float(share) == pytest.approx(expected, rel=1e-13, abs=0)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_default_type_changes_nothing(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        R = nrm.Explainer(Function(lambda x, m: x + 0.1).eval(), rules.Zero(), bias="input")
        share = float(R(X, target=0).biases()[":add.bias"])
        single = nrm.Explainer(Function(lambda x, m: x + 0.1).eval(), rules.Zero(), bias="input")
        rounded = single(X.float(), target=0)
    finally:
        torch.set_default_dtype(before)
    assert share == pytest.approx(0.25, rel=1e-14, abs=0)
    assert rounded.heatmap().dtype is torch.float32


@pytest.mark.parametrize(
    "removal",
    [0.7, np.float64(0.7), {"0": 0.7}, {"0": [0.7, 0.7]}, {"0": np.array([0.7, 0.7])},
     {"0": torch.full((2,), 0.7, dtype=torch.float64)}],
)  # fmt: skip
def test_what_removal_puts_in_place(removal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double().eval()
    interventions = Interventions(nrm.Explainer(model), X, target=0, removal=removal)
    found = interventions.without([[nrm.neurons("0", 0, 1)]])
    with torch.no_grad():
        expected = float(model[2](torch.tanh(torch.full((1, 2), 0.7, dtype=torch.float64))))
    assert float(found) == pytest.approx(expected, rel=1e-13, abs=0)


def test_bounds_and_baselines_in_double_precision():
    model = nn.Linear(3, 1, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    found = nrm.Explainer(model, rules.ZBox(-0.7, 1.1))(X, target=0).heatmap()[0]
    low = torch.tensor(-0.7, dtype=torch.float64)
    high = torch.tensor(1.1, dtype=torch.float64)
    w = model.weight.detach()[0]
    made = X[0] * w - low * w.clamp(min=0) - high * w.clamp(max=0)
    torch.testing.assert_close(found, made / made.sum(), rtol=1e-14, atol=1e-14)
    for start in (0.1, np.float64(0.1)):
        found = nrm.Explainer(model, rules.PathIntegrated(start, 2))(X, target=0).heatmap()[0]
        made = w * (X[0] - torch.tensor(0.1, dtype=torch.float64))
        torch.testing.assert_close(found, made / made.sum(), rtol=1e-14, atol=1e-14)


def test_a_baseline_beyond_single_precision():
    """1e39 is finite in a double model."""
    assert rules.PathIntegrated(1e39).baseline == 1e39


# -- masks that add -inf, or the least number there is -------------------------------------------


class Masked(nn.Module):
    def __init__(self, least: float) -> None:
        super().__init__()
        self.scores, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.register_buffer("closed", torch.tensor([0.0, least, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.scores(x) + self.closed).softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("least", ["-inf", "least"])
@pytest.mark.parametrize(
    "rule",
    [rules.WSquare(), rules.Flat(), rules.Zero(), rules.Gamma(0.25), rules.ZPlus(),
     rules.AlphaBeta(), rules.PlainGamma(0.25), rules.ZBox(-9.0, 9.0)],
    ids=str,
)  # fmt: skip
def test_a_masked_score_takes_nothing(rule, least, dtype):
    torch.manual_seed(0)
    size = -torch.inf if least == "-inf" else torch.finfo(dtype).min
    model, x = Masked(size).to(dtype).eval(), X.to(dtype)
    composite = nrm.composites.Composite([], rule)
    if isinstance(rule, rules.ZBox):
        composite = nrm.composites.Composite([(nrm.composites.first, rule)], rules.WSquare())
    R = nrm.Explainer(model, composite, bias="input")(x, target=0)
    shares = R.biases()
    assert all(bool(share.isfinite().all()) for share in shares.values())
    total = float(R.heatmap().sum()) + sum(map(float, shares.values()))
    assert total == pytest.approx(1.0, abs=1e-4 if dtype is torch.float32 else 1e-10)
    if isinstance(rule, rules.WSquare):  # with what the softmax gives it
        softmax = R.marginal(":softmax")[0]
        score = R.marginal(":add")[0]
        torch.testing.assert_close(score, softmax)
        weight, shift = model.head.weight.detach()[0], model.head.bias.detach()[0]
        made = weight.square() / (weight.square().sum() + shift**2)
        torch.testing.assert_close(softmax, made)
        bias = R.marginal("scores.bias")[0]  # the mask is part of it
        assert float(bias[1] / score[1]) == pytest.approx(1.0)  # all of it
        shift = (model.scores.bias[2].detach() + model.closed[2]).square()
        shift = shift / (model.scores.weight.detach()[2].square().sum() + shift)
        assert float(bias[2] / score[2]) == pytest.approx(float(shift))
