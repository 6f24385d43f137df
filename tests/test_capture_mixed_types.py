"""Models that compute in single precision here and in double there: messages are of the wider."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nrm
from nrm import composites, rules


class Mixed(nn.Module):
    """A perceptron of which some parts may be in another type."""

    def __init__(self, part):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("shift", torch.randn(4))
        self.part = part

    def forward(self, x):
        return self.c(self.part(self, torch.relu(self.a(x))))


def layer(m, h):
    return F.linear(h.float(), m.b.weight.float(), m.b.bias.float()).to(h.dtype)


PARTS = {
    "a layer": lambda m, h: torch.relu(layer(m, h)) + h,
    "a gate": lambda m, h: h * torch.sigmoid(layer(m, h)),
    "a product": lambda m, h: h.float() * h.double().relu(),
    "a constant": lambda m, h: (h.float() + torch.arange(4.0)).to(h.dtype) + m.shift,
    "joined": lambda m, h: torch.cat([h.float()[:, :2], h[:, 2:].float()], 1).double(),
}

X = torch.tensor([[0.9, -0.2, 0.6], [0.3, 0.7, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_in_single_precision_is_gradient_times_input_of_the_whole_in_double(name):
    model = Mixed(PARTS[name]).double().eval()
    R = nrm.Explainer(model, rules.Zero(), bias="input")(X, target=1)
    for found in (R.heatmap(), R.marginal("a")):
        assert found.dtype is torch.float64
    assert R.diagnostics().worst_cut_deviation < 1e-14
    if name in ("a gate", "a product"):  # where a factor takes nothing
        return
    x = X.clone().requires_grad_()
    with torch.enable_grad():
        model(x)[:, 1].sum().backward()
    torch.testing.assert_close(R.heatmap() * R.scale[:, None], x * x.grad, rtol=1e-5, atol=1e-6)


def test_the_double_network_is_what_is_explained():
    mixed, double = Mixed(PARTS["a layer"]), Mixed(lambda m, h: torch.relu(m.b(h)) + h)
    for composite in (composites.GammaFlat(0.25), composites.EpsilonPlus()):
        found, expected = (
            nrm.Explainer(m.double().eval(), composite)(X, target=0) for m in (mixed, double)
        )
        torch.testing.assert_close(found.heatmap(), expected.heatmap(), rtol=1e-13, atol=1e-13)


def test_a_single_model_with_a_part_in_double_is_answered_in_double():
    model = Mixed(lambda m, h: (h.double() @ torch.ones(4, 4).double()).float()).eval()
    R = nrm.Explainer(model)(X.float(), target=0)
    assert R.heatmap().dtype is torch.float64
    assert R.diagnostics().worst_cut_deviation < 1e-14


def test_numbers_of_python_are_noticed_in_mixed_models_too():
    model = Mixed(lambda m, h: layer(m, h) * h.mean().item()).double().eval()
    with pytest.raises(nrm.errors.NrmError, match=r"out of tensors|Python"):
        nrm.Explainer(model)(X[:1], target=0)


def test_many_heatmaps_of_a_single_model_with_a_part_in_double():
    model = Mixed(lambda m, h: (h.double() @ torch.ones(4, 4).double()).float()).eval()
    R = nrm.Explainer(model, composites.CPLRP())(X.float(), target=0)
    sets = [nrm.neurons("a", 0), nrm.neurons("a", 1, 2), ~nrm.neurons("a", 0)]
    one_by_one = torch.stack([R.heatmap(chosen) for chosen in sets])
    torch.testing.assert_close(R.heatmaps(sets), one_by_one)
    found = torch.stack([R.of(k).heatmap() for k in range(2)])
    torch.testing.assert_close(R.by_target(), found)


@pytest.mark.parametrize("composite", [composites.CPLRP(), composites.GammaFlat()])
def test_one_type_by_derivatives_and_by_messages(composite):
    """Derivatives at inputs in single precision are of that type; relevances are not."""
    model = Mixed(lambda m, h: (h.double() @ torch.ones(4, 4).double()).float()).eval()
    R = nrm.Explainer(model, composite)(X.float(), target=0)
    chosen = nrm.neurons("a", 1, 2)
    for found in (R.heatmap(), R.heatmap(chosen), R.heatmap(~chosen), R.marginal("a"), R(chosen)):
        assert found.dtype is torch.float64
