"""LRP heatmaps equal zennit's, normalised, where both are defined and treat biases alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nrm
from nrm import composites


@pytest.fixture(scope="module")
def zennit(torchvision_models):
    """zennit imports torchvision, so that has to import first."""
    pytest.importorskip("zennit", reason="needs zennit")
    import zennit.attribution
    import zennit.composites
    import zennit.rules
    import zennit.types

    return zennit


TINY = {"epsilon": 1e-12, "stabilizer": 1e-12}  # what zennit adds to every denominator
DROP = {"zero_params": ["bias"]}  # biases out of zennit's denominators: our bias="drop"


class Chain(nn.Sequential):
    """Positive biases on top of convolutions whose sums are mostly positive."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(8, 6, 2, groups=2), nn.ReLU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(6, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 4),
        )  # fmt: skip


def _gamma_flat(zennit, **options):
    return zennit.composites.SpecialFirstLayerMapComposite(
        layer_map=[
            (zennit.types.Activation, zennit.rules.Pass()),
            (zennit.types.AvgPool, zennit.rules.Norm(stabilizer=1e-12)),
            (zennit.types.Convolution, zennit.rules.Gamma(gamma=0.25, stabilizer=1e-12, **options)),
            (zennit.types.Linear, zennit.rules.Epsilon(epsilon=1e-12, **options)),
        ],
        first_map=[(zennit.types.Linear, zennit.rules.Flat(stabilizer=1e-12, **options))],
    )


PAIRS = {
    "EpsilonPlusFlat": (
        lambda: composites.EpsilonPlusFlat(1e-9),
        lambda z, **o: z.composites.EpsilonPlusFlat(**TINY, **o),
    ),
    "EpsilonPlus": (
        lambda: composites.EpsilonPlus(1e-9),
        lambda z, **o: z.composites.EpsilonPlus(**TINY, **o),
    ),
    "EpsilonGammaBox": (
        lambda: composites.EpsilonGammaBox(-4.0, 4.0, 1e-9),
        lambda z, **o: z.composites.EpsilonGammaBox(-4.0, 4.0, **TINY, **o),
    ),
    "EpsilonGammaFlat": (lambda: composites.EpsilonGammaFlat(1e-9), _gamma_flat),
    "EpsilonAlpha2Beta1Flat": (
        lambda: composites.EpsilonAlpha2Beta1Flat(1e-9),
        lambda z, **o: z.composites.EpsilonAlpha2Beta1Flat(**TINY, **o),
    ),
}


@pytest.mark.parametrize(
    ("name", "bias"),
    [(name, "drop") for name in PAIRS]
    # zennit's Flat never counts the bias as a parent; ours does, where biases are inputs
    + [(name, "input") for name in PAIRS if "Flat" not in name],
)
def test_heatmaps_equal_zennits(zennit, name, bias):
    ours, theirs = PAIRS[name]
    torch.manual_seed(3)
    model = Chain().double().eval()
    if "Gamma" in name and bias == "drop":
        # zennit's Gamma takes the sign of a column from the output with its bias, always.
        for layer in model:
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)
    x = torch.randn(2, 3, 16, 16).double().clamp(-3.9, 3.9)
    R = nrm.Explainer(model, ours(), bias=bias)(x, target=2)
    options = DROP if bias == "drop" else {}
    with zennit.attribution.Gradient(model, theirs(zennit, **options)) as attributor:
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


def test_resnet_equals_zennit_with_its_canonizer(zennit, torchvision_models):
    import zennit.torchvision

    torch.manual_seed(0)
    model = torchvision_models.resnet18().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(1, 3, 64, 64).double()
    found = nrm.Explainer(model, composites.EpsilonPlusFlat(1e-12))(x, target=7).heatmap()
    composite = zennit.composites.EpsilonPlusFlat(
        canonizers=[zennit.torchvision.ResNetCanonizer()], **TINY, **DROP
    )
    with zennit.attribution.Gradient(model, composite) as attributor:
        _, expected = attributor(x, torch.eye(1000).double()[[7]])
    expected = expected.detach() / expected.sum()
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
