"""The pretrained EfficientNet-Lite0 of two packages: exact, and it sees what is in the picture."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nrm

DATA = Path(__file__).parents[2] / "shared" / "data" / "imagenet"
PICTURES = {"n01440764_tench": 0, "n02129604_tiger": 292, "n03452741_grand_piano": 579}
SIZE = 128
"""Smaller than what it was trained with; it tells the pictures all the same."""

pytestmark = [
    pytest.mark.skipif(not DATA.exists(), reason="needs the pictures in ../shared/data/imagenet"),
    pytest.mark.usefixtures("captured_once"),
]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    from nrm_reproduce.pretrained import EFFICIENTNET, EFFICIENTNET_WEIGHTS, efficientnet

    for package in (EFFICIENTNET, EFFICIENTNET_WEIGHTS):
        pytest.importorskip(package, reason=f"needs the package {package.replace('_', '-')}")
    return efficientnet()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """`[3, 3, SIZE, SIZE]`, between -1 and 1 as it was trained."""
    image = pytest.importorskip("PIL.Image")
    np = pytest.importorskip("numpy")
    found = []
    for name in PICTURES:
        picture = image.open(DATA / f"{name}.JPEG").convert("RGB")
        left, top = ((size - min(picture.size)) // 2 for size in picture.size)
        square = picture.crop((left, top, left + min(picture.size), top + min(picture.size)))
        found.append(np.asarray(square.resize((SIZE, SIZE), image.BICUBIC), dtype=np.float32))
    return (torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) - 127) / 128


def test_it_sees_what_is_there_and_every_cut_sums_to_one(network, pictures):
    R = nrm.Explainer(network)(pictures)
    assert R.target.tolist() == list(PICTURES.values())
    health = R.diagnostics()
    assert len(health.cuts) > 150
    assert health.worst_cut_deviation < 1e-5
    torch.testing.assert_close(R.heatmap().sum((1, 2, 3)), torch.ones(3), rtol=0, atol=1e-4)


def test_every_cut_sums_to_one_in_double_precision(network, pictures):
    R = nrm.Explainer(copy.deepcopy(network).double())(pictures[1:2].double())
    assert R.diagnostics().worst_cut_deviation < 1e-10
