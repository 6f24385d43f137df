"""Calls that no row covers: what is said of them, and their first order by request."""

from __future__ import annotations

import pytest
import torch
from support.torch_release import newer
from torch import Tensor, nn
from torch.nn import functional as F

import nrm
from nrm import composites
from nrm.errors import UnsupportedOperatorError

X = torch.rand((2, 1, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Turned(nn.Module):
    """A spatial transformer: where its picture is read depends on the picture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places, self.head = nn.Linear(25, 6, bias=False), nn.Linear(25, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        turn = 0.3 * self.places(x.flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(turn, list(x.shape), align_corners=False)
        return self.head(F.grid_sample(x, grid, align_corners=False).flatten(1))


def test_the_refusal_of_grid_sample_names_the_remedy():
    with pytest.raises(
        UnsupportedOperatorError, match=r"'grid' depends.*fallback=nrm\.operators\.LocalLinear"
    ):
        nrm.Explainer(Turned().double().eval())(X, target=0)


@newer("has no second derivative of grid_sample")
def test_the_fallback_covers_grid_sample_at_places_that_depend_on_the_input():
    """Its first order: gradient times input, of the picture that is read and of the places."""
    model = Turned().double().eval()
    explainer = nrm.Explainer(
        model, nrm.rules.Zero(), bias="input", fallback=nrm.operators.LocalLinear()
    )
    R = explainer(X, target=1)
    assert R.diagnostics().worst_cut_deviation < 1e-10
    x = X.clone().requires_grad_()
    turn = 0.3 * model.places(x.flatten(1)).view(-1, 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    read = F.grid_sample(x, grid, align_corners=False)
    values = torch.autograd.grad(model.head(read.flatten(1))[:, 1].sum(), x, retain_graph=True)[0]
    sampled = read.detach().flatten(1) * model.head.weight[1] / R.scale[:, None]  # of each pixel
    # To first order a pixel is worth x dp/dx + grid dp/dgrid, of which it shares out its relevance.
    _, along = torch.autograd.functional.jvp(
        lambda picture, at: F.grid_sample(picture, at, align_corners=False),
        (X, grid.detach()),
        (X, grid.detach()),
    )
    assert float(along.abs().min()) > 1e-6
    share = sampled / along.flatten(1)
    (by_hand,) = torch.autograd.grad(read, x, share.view_as(read), retain_graph=True)
    torch.testing.assert_close(R.heatmap(), (by_hand * X).detach(), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(R.heatmap() * R.scale.view(-1, 1, 1, 1), values * X)


class Spectral(nn.Module):
    """A Fourier transform beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(25, 25), nn.Linear(25, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        return self.head(torch.relu(self.first(h) + torch.fft.fft(h).real))


@pytest.mark.parametrize("name", ["GammaFlat", "EpsilonPlus", "LRPZero", "IntegratedGradients"])
def test_what_is_applied_to_complex_linear_maps_is_shown(name):
    """Their derivatives, whatever rule is chosen for weighted sums."""
    composite = composites.by_name(name)
    explainer = nrm.Explainer(Spectral().double().eval(), composite)
    R = explainer(X, target=0)
    lines = [line for line in composite.applied(R.graph).lines if line[1] == "complex"]
    (address, _, rule, by) = lines[0]
    if name == "IntegratedGradients":
        assert rule.startswith("PathIntegrated")
        return
    assert (rule, by) == ("LocalLinear()", "the row of complex")
    # And it is what is applied: the share of each input by its derivative.
    basis = torch.eye(25).double()
    weights = torch.fft.fft(basis).real.T  # [output, input]
    h = X.flatten(1)
    message = torch.rand(2, 25).double()
    chosen = R.graph.variable(address)
    propagation = R.forward_pass.propagations[chosen.producer]
    (pulled,) = propagation.send_on(message.clone().unsqueeze(0), [True, True], True)[:1]
    expected = h * ((message / (h @ weights.T)) @ weights)
    torch.testing.assert_close(pulled[0].flatten(1), expected)
