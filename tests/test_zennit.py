"""LRP heatmaps equal zennit's, normalised, where both are defined and treat biases alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nrm
from nrm import composites

zennit_attribution = pytest.importorskip("zennit.attribution", reason="needs zennit")
zennit_composites = pytest.importorskip("zennit.composites")
zennit_rules = pytest.importorskip("zennit.rules")
zennit_types = pytest.importorskip("zennit.types")

DROP = {"zero_params": ["bias"]}  # biases out of zennit's denominators: our bias="drop"


class Chain(nn.Sequential):
    """Positive biases on top of convolutions whose sums are mostly positive."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(8, 6, 2, groups=2), nn.ReLU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(6, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 4),
        )  # fmt: skip


def _gamma_flat(**options):
    return zennit_composites.SpecialFirstLayerMapComposite(
        layer_map=[
            (zennit_types.Activation, zennit_rules.Pass()),
            (zennit_types.AvgPool, zennit_rules.Norm()),
            (zennit_types.Convolution, zennit_rules.Gamma(gamma=0.25, **options)),
            (zennit_types.Linear, zennit_rules.Epsilon(epsilon=1e-9, **options)),
        ],
        first_map=[(zennit_types.Linear, zennit_rules.Flat(**options))],
    )


PAIRS = {
    "EpsilonPlusFlat": (
        lambda: composites.EpsilonPlusFlat(1e-9),
        lambda **o: zennit_composites.EpsilonPlusFlat(epsilon=1e-9, **o),
    ),
    "EpsilonPlus": (
        lambda: composites.EpsilonPlus(1e-9),
        lambda **o: zennit_composites.EpsilonPlus(epsilon=1e-9, **o),
    ),
    "EpsilonGammaBox": (
        lambda: composites.EpsilonGammaBox(-4.0, 4.0, 1e-9),
        lambda **o: zennit_composites.EpsilonGammaBox(-4.0, 4.0, epsilon=1e-9, **o),
    ),
    "EpsilonGammaFlat": (lambda: composites.EpsilonGammaFlat(1e-9), _gamma_flat),
    "EpsilonAlpha2Beta1Flat": (
        lambda: composites.EpsilonAlpha2Beta1Flat(1e-9),
        lambda **o: zennit_composites.EpsilonAlpha2Beta1Flat(epsilon=1e-9, **o),
    ),
}


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("name", PAIRS)
def test_heatmaps_equal_zennits(name, bias):
    ours, theirs = PAIRS[name]
    torch.manual_seed(3)
    model = Chain().double().eval()
    x = torch.randn(2, 3, 16, 16).double().clamp(-3.9, 3.9)
    R = nrm.Explainer(model, ours(), bias=bias)(x, target=2)
    options = DROP if bias == "drop" else {}
    with zennit_attribution.Gradient(model, theirs(**options)) as attributor:
        _, found = attributor(x, torch.eye(4).double()[[2, 2]])
    found = found.detach()
    if bias == "drop":
        found = found / found.sum((1, 2, 3), keepdim=True)
    else:  # zennit keeps its own scale: compare the share of the inputs
        expected = R.heatmap()
        scale = expected.sum((1, 2, 3), keepdim=True) / found.sum((1, 2, 3), keepdim=True)
        found = found * scale
    assert R.heatmap().abs().max() > 1e-3
    torch.testing.assert_close(R.heatmap(), found, atol=1e-5 * float(found.abs().max()), rtol=1e-5)
