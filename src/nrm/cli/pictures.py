"""From a picture's file to the model's input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from nrm.cli.errors import CommandError, one_line

Pixels = npt.NDArray[np.float32]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Picture:
    """A preprocessed picture.

    Attributes:
        x: the model's input, `[1, C, H, W]`.
        shown: what the model sees, for people: `[H, W, 3]` or `[H, W]` from 0 to 1.
        bounds: smallest and largest value of each channel, where they are known.
    """

    x: Tensor
    shown: Pixels
    bounds: tuple[Tensor, Tensor] | None = None


def read_image(path: Path) -> Image.Image:
    """A picture of any format that Pillow knows, upright and in RGB."""
    if not path.is_file():
        raise CommandError(f"picture {path}: no such file")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # odd metadata does not matter here
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise CommandError(f"picture {path}: not a picture that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CommandError(f"picture {path}: cannot be read: {one_line(error)}") from error


def imagenet(image: Image.Image, size: int = 224) -> Picture:
    """torchvision's ImageNet transform: shorter side to 8/7 of `size`, centre crop, normalised.

    Written out with Pillow, which torchvision resizes with too, so that models from elsewhere
    need no torchvision; a test holds the two equal.
    """
    short = size * 256 // 224
    width, height = image.size
    if width <= height:
        scaled = image.resize((short, int(short * height / width)), Image.Resampling.BILINEAR)
    else:
        scaled = image.resize((int(short * width / height), short), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - size) / 2.0), round((scaled.height - size) / 2.0)
    cropped = scaled.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float().div(255)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return Picture(
        ((pixels - mean) / std)[None],
        pixels.permute(1, 2, 0).numpy(),
        ((0 - mean) / std, (1 - mean) / std),
    )


def transformed(image: Image.Image, transform: Callable[[Image.Image], Any], name: str) -> Picture:
    """What a transform of the user's makes of a picture: a tensor `[C, H, W]`."""
    try:
        x = transform(image)
    except Exception as error:  # any code may stand behind a name
        raise CommandError(
            f"transform {name} fails: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(x, Tensor) or x.dim() != 3 or x.numel() == 0:
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise CommandError(f"transform {name} must return a tensor [C, H, W], not {what}")
    return Picture(x[None], shown(x))


def shown(x: Tensor) -> Pixels:
    """An input `[C, H, W]` as pixels from 0 to 1; grey, where it does not have three colours."""
    values: Pixels = x.detach().cpu().float().numpy()
    low, high = float(values.min()), float(values.max())
    values = (values - np.float32(low)) / np.float32(high - low or 1.0)
    return values.transpose(1, 2, 0) if values.shape[0] == 3 else values.mean(0)
