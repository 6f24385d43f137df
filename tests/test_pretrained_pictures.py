"""The pretrained SqueezeNet on real pictures: every cut from output to pixels sums to one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support import dense

import nrm
from nrm import composites, rules

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = [
    pytest.mark.skipif(
        not (DATA / "squeezenet").exists(),
        reason="needs the pretrained SqueezeNet in ../shared/data",
    ),
    pytest.mark.usefixtures("captured_once"),
]

COMPOSITES = {
    "GammaFlat": composites.GammaFlat(),
    "EpsilonPlus": composites.EpsilonPlus(),
    "EpsilonPlusFlat": composites.EpsilonPlusFlat(),
    "EpsilonGammaFlat": composites.EpsilonGammaFlat(),
    "EpsilonGammaBox": composites.EpsilonGammaBox(-2.2, 2.7),
    "EpsilonAlpha2Beta1Flat": composites.EpsilonAlpha2Beta1Flat(),
    "LRPZero": composites.LRPZero(),
    "Gamma everywhere": composites.Everywhere(rules.Gamma()),
    "Epsilon everywhere": composites.Everywhere(rules.Epsilon()),
}
PICTURES = ["n01440764_tench", "n02129604_tiger", "n03452741_grand_piano"]


@pytest.fixture(scope="module")
def squeezenet(torchvision_models):
    from safetensors.torch import load_file

    model = torchvision_models.squeezenet1_0()
    model.load_state_dict(load_file(DATA / "squeezenet" / "squeezenet1_0.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def in_double(squeezenet):
    return copy.deepcopy(squeezenet).double()


def read(side):
    """The pictures, cut to this many pixels a side."""
    from PIL import Image
    from torchvision.transforms._presets import ImageClassification

    transform = ImageClassification(crop_size=side, resize_size=side * 8 // 7)
    found = [Image.open(DATA / "imagenet" / f"{name}.JPEG").convert("RGB") for name in PICTURES]
    return torch.stack([transform(picture) for picture in found])


@pytest.fixture(scope="module")
def pictures(torchvision_models):
    """Smaller than those it was trained with, but large enough to tell them apart."""
    return read(128)


@pytest.fixture(scope="module")
def small(torchvision_models):
    """Where it does not matter what the network sees in them."""
    return read(80)


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_every_cut_sums_to_one(squeezenet, small, name, bias):
    explainer = nrm.Explainer(squeezenet, COMPOSITES[name], bias=bias)
    health = explainer(small[:2]).diagnostics()
    assert len(health.cuts) >= 66
    assert max(float((1 - cut.total).abs().max()) for cut in health.cuts) < 1e-4
    assert health.total_variation.max() < 1e4


@pytest.mark.parametrize("name", COMPOSITES)
def test_every_cut_sums_to_one_in_double_precision(in_double, small, name):
    explainer = nrm.Explainer(in_double, COMPOSITES[name])
    R = explainer(small[2:].double())
    health = R.diagnostics()
    assert max(float((1 - cut.total).abs().max()) for cut in health.cuts) < 1e-10
    if name in ("EpsilonPlus", "Gamma everywhere"):
        checked = dense.check_columns(R, operations=12)
        assert {"conv", "activation"} <= checked.keys()
        dense.check_walks(R, queries=1, tolerance=1e-8)


def test_lrp_0_with_biases_is_gradient_times_input(in_double, small):
    x = small[:1].double().requires_grad_()
    output = in_double(x)[:, 3]
    (gradient,) = torch.autograd.grad(output.sum(), x)
    R = nrm.Explainer(in_double, composites.Everywhere(rules.Epsilon(1e-30)), bias="input")(
        x.detach(), target=3
    )
    found, expected = R.heatmap() * R.scale, (x * gradient).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().sum()))


def test_relevance_of_a_fire_module_flows_through_its_branches(squeezenet, pictures):
    R = nrm.Explainer(squeezenet)(pictures)
    assert R.target.tolist() == [0, 292, 579]
    small, large = "features.9.expand1x1", "features.9.expand3x3"
    torch.testing.assert_close(R(small) + R(large), torch.ones(3))
    assert (R(small) > 0.05).all()
    assert (R(large) > 0.05).all()
    assert R("features.9.squeeze", small).sub(R(small)).abs().max() < 1e-5
    flows = R.top("features.9", "features.10", k=2, sample=1)
    for flow in flows:
        assert R(*flow.sets)[1].item() == pytest.approx(flow.relevance, rel=1e-4)
        assert R.heatmap(*flow.sets)[1].sum().item() == pytest.approx(flow.relevance, rel=1e-4)
