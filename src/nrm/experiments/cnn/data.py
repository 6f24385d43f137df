"""Pictures by chance, and the pretrained network that explains them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nrm.errors import InputError

MODEL = "torchvision.models:squeezenet1_0"
WEIGHTS = Path("squeezenet") / "squeezenet1_0.safetensors"
PICTURES = "imagenet"
LABELS = Path(PICTURES) / "classes.txt"
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture.

    Attributes:
        x: the model's input, `[1, C, H, W]`.
        shown: `[H, W, 3]` or `[H, W]` from 0 to 1.
    """

    name: str
    x: Tensor
    shown: Any


def choose(folder: Path, count: int, seed: int) -> list[Path]:
    """Some pictures of a folder, by name. More of them are the same ones and others.

    Raises:
        InputError: there are none.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if not files:
        raise InputError(f"{folder}: no folder with pictures ({', '.join(_SUFFIXES)}) in it.")
    random.Random(seed).shuffle(files)
    return sorted(files[:count])


def read(file: Path) -> Photo:
    """A picture as ImageNet's networks take it."""
    from nrm.cli.pictures import imagenet, read_image

    picture = imagenet(read_image(file))
    return Photo(file.stem, picture.x, picture.shown)


def network(data: Path) -> nn.Module:
    """SqueezeNet 1.0 with the weights in the folder of data."""
    from nrm.cli.models import load_model

    return load_model(MODEL, data / WEIGHTS, torch.device("cpu"))


def labels(data: Path) -> list[str] | None:
    """The classes' names, where the folder of data has them."""
    from nrm.cli.labels import read_labels

    file = data / LABELS
    return read_labels(file) if file.is_file() else None
