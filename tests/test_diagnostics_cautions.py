"""What is said without being asked: cancelling, outputs of zero, columns that vanish."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import RelevanceWarning, rules
from nrm.errors import CANCELS, Cautions


def linear(*weights: float, bias: float | None = None) -> nn.Linear:
    layer = nn.Linear(len(weights), 1, bias=bias is not None).double()
    layer.weight.data = torch.tensor([weights], dtype=torch.float64)
    if bias is not None:
        layer.bias.data.fill_(bias)
    return layer.eval()


def values(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def said(ask: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RelevanceWarning)
        assert callable(ask)
        ask()
    return [str(w.message) for w in caught if issubclass(w.category, RelevanceWarning)]


class Cancelling(nn.Module):
    """Relevance of 1 becomes 5,000 and -4,999 at its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear(1.0, -1.0)
        self.second = linear(2.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_relevances_that_cancel_are_said_once_with_the_place_and_the_line_that_asked() -> None:
    R = nrm.Explainer(Cancelling(), rules.Zero())(values(5000, 4999))
    with pytest.warns(RelevanceWarning, match=r"'input' cancel.*1e\+04.*at 'first'") as caught:
        heatmap = R.heatmap()
    assert caught[0].filename == __file__
    assert torch.allclose(heatmap, values(5000, -4999))  # the exact answer is given all the same
    assert not said(R.heatmap)
    assert not said(lambda: R(nrm.neurons("input", 0)))


def test_the_line_that_asked_is_no_decorator_of_ours() -> None:
    """Some of our functions are decorated by context managers, whose file is contextlib.py."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1.0)  # active by its bias alone
        model[3].weight.fill_(1.0)
    R = nrm.Explainer(model, rules.Gamma(0.25), bias="drop")(torch.rand(1, 1, 2, 2))
    with pytest.warns(RelevanceWarning, match="contributions all vanish") as caught:
        R.heatmap()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    "ask",
    [
        lambda R: R.heatmap(),
        lambda R: R("input", nrm.neurons("first", 0)),
        lambda R: R.marginals(),
        lambda R: R.heatmap(~nrm.neurons("second", 0) | nrm.neurons("first", 0)),
        lambda R: R.channels("input"),
        lambda R: R.heatmap(given="first"),
        lambda R: R.heatmaps(["second", ["first", nrm.neurons("second", 0)]]),
        lambda R: R.joint("first", "input", by="neuron"),
        lambda R: R.top("first", "input", by="neuron"),
    ],
)
def test_any_query_that_adds_up_what_cancels_says_so(ask) -> None:
    R = nrm.Explainer(Cancelling(), rules.Zero())(values(5000, 4999))
    assert len(said(lambda: ask(R))) == 1


def test_what_does_not_cancel_a_thousandfold_is_not_spoken_of() -> None:
    R = nrm.Explainer(Cancelling(), rules.Zero())(values(400, 399))
    assert not said(R.heatmap)
    bounded = nrm.Explainer(Cancelling(), rules.Gamma(0.25))(values(5000, 4999))
    assert not said(bounded.heatmap)


def test_many_samples_that_cancel_a_little_are_not_one_that_cancels_much() -> None:
    R = nrm.Explainer(Cancelling(), rules.Zero())(values(40, 39).repeat(50, 1))
    assert not said(R.heatmap)


def test_one_filter_silences_all() -> None:
    R = nrm.Explainer(Cancelling(), rules.Zero())(values(5000, 4999))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", RelevanceWarning)
        R.heatmap()


def test_an_output_within_rounding_of_zero_is_said_when_it_is_explained() -> None:
    explainer = nrm.Explainer(linear(1.0, 1.0, -2.0), rules.Gamma(0.25))
    (text,) = said(lambda: explainer(values(0.1, 0.2, 0.15)))
    assert "within rounding of zero" in text
    assert "0.6" in text  # .1 + .2 + 2 * .15
    assert not said(lambda: explainer(values(0.1, 0.2, 0.15 + 1e-12)))


class Chain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1)[:, :1]


@pytest.mark.parametrize(
    ("model", "x", "size"),
    [
        # a bias takes away what the inputs add
        (linear(2.0, 1.0, bias=-4.0), values(1.5, 1.0), 4.0),
        # behind views, an activation and a slice
        (Chain(linear(3.0, -3.0), nn.Tanh()), values(0.1 + 0.2, 0.3), 1.8),
        # a rectified neuron that is silent: exactly zero
        (Chain(linear(1.0, 1.0), nn.ReLU()), values(-1.0, -2.0), 0.0),
    ],
)
def test_zero_outputs_of_several_kinds(model: nn.Module, x: Tensor, size: float) -> None:
    (text,) = said(lambda: nrm.Explainer(model.eval(), rules.Zero())(x))
    assert f"terms of absolute size {size:.2g}" in text


def test_a_small_output_of_small_terms_is_not_zero() -> None:
    assert not said(lambda: nrm.Explainer(linear(1.0, 1.0))(values(1e-15, 2e-15)))


def test_the_sample_whose_output_is_zero_is_named() -> None:
    explainer = nrm.Explainer(linear(1.0, -1.0), rules.Gamma(0.25))
    (text,) = said(lambda: explainer(torch.cat([values(2, 1), values(1, 1)])))
    assert "of sample 1 " in text


def test_columns_that_vanish_are_said_with_the_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(-1)  # only its bias makes it active
        model[0].bias.fill_(5)
        model[2].weight.fill_(1)
    R = nrm.Explainer(model.eval(), rules.ZPlus())(values(1, 2))
    (text,) = said(R.heatmap)
    assert "'0'" in text
    assert "relevance of absolute size 1 " in text
    assert torch.allclose(R.heatmap(), values(0.5, 0.5))
    other = nrm.Explainer(model, rules.ZPlus(), bias="input")(values(1, 2))
    assert not said(other.heatmap)


def test_a_gradient_that_vanishes_is_said_too() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:  # does not change with the length of x
            return x[:, :1] / x.pow(2).sum(1, keepdim=True).sqrt()

    R = nrm.Explainer(Scaled().eval(), nrm.composites.LocalLinear())(values(3, 4))
    (text,) = said(R.biases)
    assert "all vanish" in text


def test_what_is_noted_within_what_is_noted() -> None:
    cautions = Cautions()
    with cautions.anew() as outer:
        with cautions.anew() as inner:
            cautions.vanished("here", 1.0)
        cautions.cancels("there", 1e9, "")
    assert (set(inner), set(outer)) == ({"vanished"}, {CANCELS})
    cautions.vanished("here", 1.0)  # was said, in there: no warning, which would be an error
