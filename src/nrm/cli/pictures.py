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
MOST_PIXELS = 2**25
"""Of a resized picture, of which the centre is cropped."""
LARGEST = 4096
"""The longest side of a model's input."""
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose greys beyond 8 bits are 0 to 65535 in Pillow


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


def read_image(path: Path, say: Callable[[str], None] = lambda text: None) -> Image.Image:
    """A picture of any format that Pillow knows, upright and in RGB, of 8 bits each.

    Transparent places are laid over white, as pages and viewers show them: what colour a file
    hides under them is not seen. 16 bits of grey become 8, floats from 0 to 1 become 0 to 255. Of
    several pictures in one file the first is read.

    Arguments:
        say: is told what was made of the picture, where that is more than reading it.

    Raises:
        CommandError: it cannot be read, or nothing says which of its numbers is white.
    """
    if path.is_dir():
        raise CommandError(f"picture {path}: it is a folder, not a picture")
    if not path.is_file():
        raise CommandError(f"picture {path}: no such file")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # odd metadata does not matter here
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                say(f"{path} holds {frames} pictures: this is the first of them")
            sixteen = image.format in _SIXTEEN_BITS
            return _in_rgb(ImageOps.exif_transpose(image), sixteen, path, say)
    except CommandError:
        raise
    except UnidentifiedImageError as error:
        raise CommandError(f"picture {path}: not a picture that Pillow can read") from error
    except Exception as error:  # decoders fail in many ways on bytes that are no picture
        raise CommandError(f"picture {path}: cannot be read: {one_line(error)}") from error


def _in_rgb(
    image: Image.Image, sixteen: bool, path: Path, say: Callable[[str], None]
) -> Image.Image:
    """In RGB of 8 bits, as it is meant."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _of_eight_bits(image, sixteen, path)
    if not (image.mode in _WITH_ALPHA or "transparency" in image.info):
        return image.convert("RGB")
    image = image.convert("RGBA")
    lowest, _ = image.getchannel("A").getextrema()
    if lowest == 255:
        return image.convert("RGB")
    say(f"{path} is transparent in places: it is laid over white")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _of_eight_bits(image: Image.Image, sixteen: bool, path: Path) -> Image.Image:
    """Grey of 16 bits or of floats as grey of 8, with its transparent value in a channel.

    Arguments:
        sixteen: the format has no greys of more bits.
    """
    values = np.asarray(image)
    if image.mode == "F":
        if not bool(((values >= 0) & (values <= 1)).all()):  # also where some are no numbers
            raise CommandError(
                f"picture {path}: its grey values are floats, and not all of them from 0 (black) "
                "to 1 (white). Scale them, or save 8 or 16 bits."
            )
        grey = np.rint(values * 255)
    elif image.mode.startswith("I;16") or sixteen:
        grey = np.rint(values / 257)
    else:
        raise CommandError(
            f"picture {path}: its grey values have 32 bits, of which nothing says where white is. "
            "Save 8 or 16 bits."
        )
    eight = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        eight.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return eight


def imagenet(image: Image.Image, size: int = 224) -> Picture:
    """torchvision's ImageNet transform: shorter side to 8/7 of `size`, centre crop, normalised.

    Written out with Pillow, which torchvision resizes with too, so that models from elsewhere
    need no torchvision; a test holds the two equal. Where the resized picture would have more
    than `MOST_PIXELS`, only what is cropped is resized: the same pixels.

    Raises:
        CommandError: the input would be larger than `LARGEST`.
    """
    if size > LARGEST:
        raise CommandError(f"--size {size}: the largest is {LARGEST}")
    cropped = _cropped(image, size)
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float().div(255)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return Picture(
        ((pixels - mean) / std)[None],
        pixels.permute(1, 2, 0).numpy(),
        ((0 - mean) / std, (1 - mean) / std),
    )


def resized(width: int, height: int, size: int) -> tuple[int, int]:
    """What a picture is resized to before its centre is cropped."""
    short = size * 256 // 224
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _cropped(image: Image.Image, size: int) -> Image.Image:
    """Resized, and its centre: `size` x `size`."""
    wide, high = resized(*image.size, size)
    left, top = round((wide - size) / 2.0), round((high - size) / 2.0)
    if wide * high <= MOST_PIXELS:
        scaled = image.resize((wide, high), Image.Resampling.BILINEAR)
        return scaled.crop((left, top, left + size, top + size))
    # What becomes of a place does not depend on what lies far from it.
    across, down = image.width / wide, image.height / high
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return image.resize((size, size), Image.Resampling.BILINEAR, box)


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
