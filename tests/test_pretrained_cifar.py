"""Pretrained CIFAR-10 residual networks: exact, and the shortcuts without weights in the flows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import dense
from torch import Tensor

import nrm
from nrm import composites
from nrm_reproduce.pretrained import CIFAR_CLASSES, cifar_picture, cifar_resnet

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "cifar10"
pytestmark = pytest.mark.skipif(
    not DATA.exists(), reason="needs the CIFAR-10 networks in ../shared/data"
)


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, list[int]]:
    """Two of every class."""
    names = [f"{name}_000{n}" for name in CIFAR_CLASSES for n in (1, 2)]
    x = torch.cat([cifar_picture(DATA / f"{name}.jpg") for name in names])
    return x, [CIFAR_CLASSES.index(name.rpartition("_")[0]) for name in names]


@pytest.mark.parametrize(("weights", "blocks"), [("resnet20", 3), ("resnet56", 9)])
def test_every_cut_is_exact_and_lrp_0_is_gradient_times_input(pictures, weights, blocks):
    model = cifar_resnet(DATA / f"{weights}.safetensors", blocks)
    x, classes = pictures
    with torch.no_grad():
        right = (model(x).argmax(1) == torch.tensor(classes)).float().mean()
    assert right >= 0.7
    some = x[:1]
    health = nrm.Explainer(model)(some).diagnostics()
    assert len(health.cuts) > 6 * blocks
    assert health.worst_cut_deviation < 1e-5
    if blocks == 9:
        return  # in double precision the smaller one says the same
    double, some = model.double(), some.double()
    R = nrm.Explainer(double, composites.LRPZero(), bias="input")(some)
    leaf = some.clone().requires_grad_()
    logits = double(leaf)
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), leaf)
    found = R.heatmap() * R.scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(found, some * gradient, atol=1e-9, rtol=0)
    assert R.diagnostics().worst_cut_deviation < 1e-10
    dense.check_walks(R, queries=1)


def test_shortcuts_without_weights_lead_the_pairs(pictures) -> None:
    """`F.pad` puts channel k at k + 8 (of 32) and k + 16 (of 64): most of the strongest pairs."""
    model = cifar_resnet(DATA / "resnet20.safetensors")
    x, _ = pictures
    for before, after, pad in (("layer1.2", "layer2.0", 8), ("layer2.2", "layer3.0", 16)):
        for sample in (0, 14):
            R = nrm.Explainer(model)(x[sample : sample + 1])
            pairs = [tuple(flow.parts.values()) for flow in R.top(before, after, k=10)]
            assert sum(int(b) - int(a) == pad for a, b in pairs) >= 6, (sample, pairs)
