"""Rules against values worked out by hand, and what each does with failing columns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nrm
from nrm import rules
from nrm.composites import Everywhere
from nrm.errors import InputError, PositiveSumError


def neuron(weights, bias=0.0):
    """One linear neuron with the given weights."""
    layer = nn.Linear(len(weights), 1).double().eval()
    layer.weight.data = torch.tensor([weights], dtype=torch.float64)
    layer.bias.data = torch.tensor([bias]).double()
    return layer


def explain(rule, weights, x, bias=0.0, mode="drop", **options):
    model = neuron(weights, bias)
    explainer = nrm.Explainer(model, Everywhere(rule), bias=mode, **options)
    return explainer(torch.tensor([x], dtype=torch.float64), target=0)


@pytest.mark.parametrize(
    ("rule", "weights", "x", "expected"),
    [
        (rules.Zero(), [1.0, 2.0, -1.0], [1.0, 1.0, 1.0], [1 / 2, 1, -1 / 2]),
        (rules.Epsilon(), [1.0, 2.0, -1.0], [1.0, 1.0, 1.0], [1 / 2, 1, -1 / 2]),
        (rules.PlainGamma(1.0), [1.0, 2.0, -1.0], [1.0, 1.0, 1.0], [2 / 5, 4 / 5, -1 / 5]),
        (rules.Gamma(1.0), [1.0, 2.0, -1.0], [1.0, 1.0, 1.0], [2 / 5, 4 / 5, -1 / 5]),
        # contributions 1, 2, -5: their sum is negative, so the negative ones are favoured
        (rules.Gamma(1.0), [1.0, 2.0, 5.0], [1.0, 1.0, -1.0], [-1 / 7, -2 / 7, 10 / 7]),
        (rules.ZPlus(), [1.0, 2.0, -1.0], [1.0, 1.0, 1.0], [1 / 3, 2 / 3, 0]),
        (rules.ZPlus(), [1.0, 2.0, -1.0], [1.0, -1.0, -1.0], [1 / 2, 0, 1 / 2]),
        (rules.AlphaBeta(2.0, 1.0), [1.0, 3.0, -1.0], [1.0, 1.0, 1.0], [1 / 2, 3 / 2, -1]),
        (rules.AlphaBeta(2.0, 1.0), [1.0, 3.0], [1.0, 1.0], [1 / 4, 3 / 4]),  # one sign only
        (rules.AlphaBeta(2.0, 1.0), [1.0, 3.0], [-1.0, -1.0], [1 / 4, 3 / 4]),
        (rules.Flat(), [1.0, 2.0, -1.0], [5.0, 0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]),
        (rules.WSquare(), [1.0, 2.0, -1.0], [5.0, 0.0, 1.0], [1 / 6, 4 / 6, 1 / 6]),
        (rules.ZBox(0.0, 2.0), [1.0, -1.0], [1.0, 1.0], [1 / 2, 1 / 2]),
        (rules.ZBox(-1.0, 2.0), [1.0, -1.0], [1.0, 1.0], [2 / 3, 1 / 3]),
        # vanished columns split uniformly
        (rules.Zero(), [1.0, 2.0], [0.0, 0.0], [1 / 2, 1 / 2]),
        (rules.ZPlus(), [-1.0, -2.0], [1.0, 3.0], [1 / 2, 1 / 2]),
        (rules.AlphaBeta(1.0, 0.0), [-1.0, -2.0], [1.0, 3.0], [1 / 2, 1 / 2]),
        (rules.Epsilon(0.1), [1.0, -1.0], [1.0, 0.95], [1 / 2, 1 / 2]),
    ],
)
def test_shares_worked_out_by_hand(rule, weights, x, expected):
    heatmap = explain(rule, weights, x).heatmap()
    torch.testing.assert_close(heatmap, torch.tensor([expected]).double())


@pytest.mark.parametrize(
    ("rule", "mode", "expected", "bias"),
    [
        (rules.Zero(), "drop", [1 / 3, 2 / 3], None),
        (rules.Zero(), "input", [1 / 4, 2 / 4], 1 / 4),
        (rules.Gamma(1.0), "input", [1 / 4, 2 / 4], 1 / 4),
        (rules.Flat(), "input", [1 / 3, 1 / 3], 1 / 3),
        (rules.WSquare(), "input", [1 / 6, 4 / 6], 1 / 6),
        (rules.ZPlus(), "input", [1 / 4, 2 / 4], 1 / 4),
        (rules.ZBox(0.0, 2.0), "input", [1 / 3, 2 / 3], 0.0),
    ],
)
def test_biases_by_hand(rule, mode, expected, bias):
    R = explain(rule, [1.0, 2.0], [1.0, 1.0], 1.0, mode)
    torch.testing.assert_close(R.heatmap(), torch.tensor([expected]).double())
    if bias is None:
        assert R.biases() == {}
    else:
        (share,) = R.biases().values()
        torch.testing.assert_close(share, torch.tensor([bias]).double())
        torch.testing.assert_close(R.diagnostics().bias_share, share)


def test_all_operands_of_a_sum_are_normalised_jointly():
    class Add(nn.Module):
        def forward(self, x, y):
            return x - 2 * y

    R = nrm.Explainer(Add().eval(), Everywhere(rules.Zero()))(
        torch.tensor([[6.0]]), torch.tensor([[1.0]]), target=0
    )
    assert R("x").item() == pytest.approx(6 / 4)
    assert R("y").item() == pytest.approx(-2 / 4)


def test_strict_refuses_columns_with_a_negative_sum():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = neuron([1.0, -2.0], bias=2.0)  # active, although its inputs sum to -1
            self.b = neuron([1.0])

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    x = torch.ones(1, 2).double()
    net = Net().eval()
    loose = nrm.Explainer(net, Everywhere(rules.Zero()))(x, target=0)
    torch.testing.assert_close(loose.heatmap(), torch.tensor([[-1.0, 2.0]]).double())
    (met,) = [c for c in loose.diagnostics().columns if c.address == "a"]
    assert met.negative == 1.0
    strict = nrm.Explainer(net, Everywhere(rules.Zero()), strict=True)(x, target=0)
    with pytest.raises(PositiveSumError, match="'a'"):
        strict.heatmap()
    nrm.Explainer(net, Everywhere(rules.Gamma()), strict=True)(x, target=0).heatmap()
    nrm.Explainer(net, Everywhere(rules.Zero()), bias="input", strict=True)(x, target=0).heatmap()


def test_strict_refuses_contributions_that_cancel_but_not_absent_ones():
    model = nn.Sequential(neuron([1.0, -1.0], bias=1.0), neuron([1.0]))
    explainer = nrm.Explainer(model.eval(), Everywhere(rules.Zero()), strict=True)
    with pytest.raises(PositiveSumError):
        explainer(torch.ones(1, 2).double(), target=0).heatmap()
    explainer(torch.zeros(1, 2).double(), target=0).heatmap()


def test_strict_refuses_a_negative_output():
    with pytest.raises(PositiveSumError, match="16"):
        explain(rules.Gamma(), [-1.0], [1.0], strict=True)


def test_nearly_zero_columns_are_reported():
    R = explain(rules.Zero(), [1.0, -0.999], [1.0, 1.0])
    (met,) = R.diagnostics().columns
    assert met.nearly_zero == 1.0
    assert met.smallest == pytest.approx(0.001 / 1.999)
    assert R.diagnostics().total_variation.item() == pytest.approx(1999)
    assert R.diagnostics(tolerance=1e-5).nearly_zero == 0.0
    assert "nearly" not in str(R.diagnostics(tolerance=1e-5))


def test_relevance_is_bounded_under_the_sign_aware_rule():
    """sum_i |R(i|j)| <= (2 + gamma) / gamma."""
    torch.manual_seed(0)
    for gamma in (0.05, 0.25, 1.0):
        model = nn.Linear(50, 200).double().eval()
        x = torch.randn(1, 50).double()
        explainer = nrm.Explainer(model, Everywhere(rules.Gamma(gamma)))
        for target in range(0, 200, 10):
            size = explainer(x, target=target).heatmap().abs().sum()
            assert size <= (2 + gamma) / gamma + 1e-9


def test_rules_refuse_bad_parameters():
    with pytest.raises(ValueError, match="alpha - beta = 1"):
        rules.AlphaBeta(2.0, 2.0)
    with pytest.raises(InputError, match="ZBox"):
        explain(rules.ZBox(0.0, 1.0), [1.0], [3.0]).heatmap()


@pytest.mark.parametrize("bias", ["drop", "input"])
def test_neurons_without_parents_end_in_a_leaf(bias):
    """A 1x1 convolution with padding has neurons whose whole receptive field is padding."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, padding=1), nn.Flatten(), nn.Linear(9, 1))
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.weight, 1.0)
        nn.init.constant_(layer.bias, 1.0)
    x = torch.ones(1, 1, 1, 1)
    R = nrm.Explainer(model.eval(), Everywhere(rules.Zero()), bias=bias)(x, target=0)
    assert R.diagnostics().worst_cut_deviation < 1e-5
    if bias == "drop":  # eight of ten parts: the neuron that sees the picture has two
        torch.testing.assert_close(R("0.padding"), torch.tensor([0.8]))
        torch.testing.assert_close(R.heatmap().sum(), torch.tensor(0.2))
