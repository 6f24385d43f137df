"""Names of classes, and pictures as models take them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="the command line's packages are not installed")

from PIL import Image
from support.command_line import COLOURS

from nrm import io as files
from nrm.cli import models
from nrm.cli.commands import CommandError


@pytest.mark.parametrize(
    ("wanted", "index"),
    [("top1", 3), ("TOP1", 3), ("0", 0), ("RED", 0), (" green ", 1), ("Heaven", 4), ("sky", 4)],
)
def test_targets(wanted: str, index: int) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0, 3.0])
    assert models.find_target(wanted, COLOURS, logits) == index


def test_wordnet_ids_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("n01440764 tench\nn01443537 goldfish\n\n")
    assert files.read_labels(tmp_path / "classes.txt") == ["tench", "goldfish"]


def test_imagenet_names_come_with_torchvision(torchvision_models: ModuleType) -> None:
    names = models.known_labels(1000)
    assert names is not None
    assert models.find_target("tench", names, torch.zeros(1000)) == 0
    with pytest.raises(CommandError, match="ambiguous"):
        models.find_target("Cardigan", names, torch.zeros(1000))
    assert models.known_labels(10) is None


@pytest.mark.parametrize(
    ("size", "side"),
    [((300, 500), 224), ((641, 480), 224), ((30, 31), 224), ((1000, 257), 299)],
)
def test_the_imagenet_transform_is_torchvisions(
    torchvision_models: ModuleType, size: tuple[int, int], side: int
) -> None:
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = transforms.Compose(
        [
            transforms.Resize(side * 256 // 224),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(files.IMAGENET_MEAN, files.IMAGENET_STD),
        ]
    )(image)
    ours = files.imagenet(image, side)
    torch.testing.assert_close(ours.x[0], theirs, rtol=0, atol=1e-6)
    assert ours.bounds is not None
    assert bool((ours.x[0] >= ours.bounds[0]).all() & (ours.x[0] <= ours.bounds[1]).all())


def test_pictures_of_any_mode(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (20, 10)).save(path)
        assert files.read_image(path).mode == "RGB"
