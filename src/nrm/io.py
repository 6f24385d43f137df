"""Files: what a run writes is there as a whole or not at all; pictures and labels.

Writing. `written_at_once` makes one file beside its place and then renames it; `made_at_once` does
so with a folder that is new. `filled_at_once` moves files to a folder, from a temporary folder
beside it, `.OUT-nrm-XXXXXXXX`, which holds a file that the process keeps locked. The system frees
the lock when the process ends, however it ends: folders of that name whose lock is free are what a
killed run left, and the next run removes them.

Reading. Pictures need Pillow, which comes with `nrm[cli]`; nothing else here needs it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nrm.errors import InputError, StorageError, one_line, printable

try:
    import fcntl
except ModuleNotFoundError:  # no such locks on this system: nothing is taken for litter
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.float32]
Say = Callable[[str], None]
"""Tells the user what is being done."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_PIXELS = 2**25
"""Of a resized picture, of which the centre is cropped."""
LARGEST = 4096
"""The longest side of a model's input."""

_LOCK = "in-use"
_FILES = "files"
_TEMPORARY = re.compile(r"\..*-nrm-[a-z0-9_]{8}")  # as tempfile names folders
_PART = re.compile(r"\..*\.[0-9a-f]{8}\.part")
_MOMENT = 60.0  # seconds, in which a folder that was made is locked
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose greys beyond 8 bits are 0 to 65535 in Pillow
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WORDNET_ID = re.compile(r"^n\d{8}\s+")


# -- writing --------------------------------------------------------------------------------------


@contextmanager
def written_at_once(file: Path) -> Iterator[Path]:
    """A place beside a file, to write to: at the end it takes the file's place; after an error not.

    The folders above the file are made. Several processes may write the same file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        yield beside
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def made_at_once(folder: Path) -> Iterator[Path]:
    """A new folder beside its place, to fill: at the end it is renamed; after an error removed.

    What is there by then stays as it is, and what was filled is dropped: of a folder that several
    make, the first counts. What killed runs left is found by `unfinished`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        beside.mkdir()
        yield beside
        for file in beside.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())  # a name must not outlive what it names in a power cut
        try:
            os.rename(beside, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def unfinished(parent: Path) -> list[Path]:
    """The folders and files that `made_at_once` and `written_at_once` had not finished."""
    return [path for path in parent.glob(".*.part") if _PART.fullmatch(path.name)]


@contextmanager
def locked(file: Path, named: str) -> Iterator[None]:
    """Hold a file, that nobody else holds it: freed when the process ends, however it ends.

    Arguments:
        named: what a refusal says is in use.

    Raises:
        StorageError: another process holds it, or it cannot be made.
    """
    try:
        stream = open(file, "a+")  # noqa: SIM115 # closed below
    except OSError as error:
        raise StorageError(f"{named}: nothing can be written: {error.strerror}") from error
    with stream:
        if fcntl is not None and not _lock(stream.fileno()):
            stream.seek(0)
            by = printable(stream.read(20).strip())
            raise StorageError(
                f"{named} is in use by another run{f', process {by}' if by else ''}. Wait for it "
                "or end it, or give another folder."
            )
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def write_text(file: Path, text: str) -> None:
    """Write a text in UTF-8, so that no half of it is ever seen."""
    with written_at_once(file) as beside:
        beside.write_text(text, encoding="utf-8")


def check_folder(out: Path, named: str = "folder") -> None:
    """Refuse early a folder for results that cannot be one.

    Arguments:
        named: what a refusal calls it, e.g. the option that gave it.

    Raises:
        InputError: a file is there or above it, or nothing can be written there.
    """
    for path in (out, *out.absolute().parents):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):  # it, or something further up
            continue
        except OSError as error:
            raise InputError(f"{named} {out}: {path}: {error.strerror}") from error
        if not path.is_dir():
            raise InputError(f"{named} {out}: {path} is not a folder")
        if not os.access(path, os.W_OK | os.X_OK):
            raise InputError(f"{named} {out}: nothing can be written to {path}")
        return


@contextmanager
def filled_at_once(out: Path, last: str, named: str = "folder") -> Iterator[Path]:
    """A temporary folder whose files all move to `out` at the end; after an error none does.

    Those in its folders move to folders of the same names. What killed runs left is removed.

    Arguments:
        last: the file to move last: once it is there, so are the others.
        named: what a refusal calls the folder.

    Raises:
        InputError: it cannot be a folder, or one of the files has no place in it.
    """
    check_folder(out, named)
    out = out.resolve()
    parent = out.parent
    while not parent.exists():  # those in between come with `out`, not before it
        parent = parent.parent
    for place in (out, *out.parents):
        _remove_litter(place, out.name)
    if out.exists() and not _movable(parent, out):
        parent = out  # a mounted folder, or one in a folder of somebody else's
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-nrm-", dir=parent))
    except OSError as error:
        raise InputError(f"{named} {out}: no folder in {parent}: {error.strerror}") from error
    try:
        with open(temporary / _LOCK, "w") as lock:
            _lock(lock.fileno())
            staging = temporary / _FILES
            staging.mkdir()
            yield staging
            _move(staging, out, last)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(staging: Path, out: Path, last: str) -> None:
    files = [file.relative_to(staging) for file in staging.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (file == Path(last), file.name == last, file))
    for file in files:  # before the first one moves
        _check_place(out, file)
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / file, out / file)


def _remove_litter(place: Path, name: str) -> None:
    """Remove the temporary folders for `name` whose process is no more; nothing else."""
    try:
        inside = list(place.iterdir())
    except OSError:  # it cannot be read, or is none yet
        return
    for folder in inside:
        if not (folder.name.startswith(f".{name}-nrm-") and _TEMPORARY.fullmatch(folder.name)):
            continue
        with suppress(OSError):  # another process removes it at this moment, or it is not ours
            if folder.is_dir() and not folder.is_symlink() and _is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    """Whether the process that made a temporary folder has ended."""
    held = {file.name for file in folder.iterdir()}
    if not held <= {_LOCK, _FILES}:
        return False  # not as we make them
    if _LOCK not in held:  # killed before it could lock it, or about to
        return not held and time.time() - folder.stat().st_mtime > _MOMENT
    with open(folder / _LOCK, "r+") as lock:
        return _lock(lock.fileno())


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed; `False` if somebody else has, or where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _check_place(out: Path, file: Path) -> None:
    """Refuse a place where a folder is, or that is inside a file."""
    if (out / file).is_dir():
        raise InputError(f"{out / file} is a folder, not a file to replace")
    for folder in file.parents:
        if (out / folder).exists() and not (out / folder).is_dir():
            raise InputError(f"{out / folder} is a file, not a folder")


def _movable(parent: Path, out: Path) -> bool:
    """Whether files can be made in `parent` and moved from there to `out`."""
    return os.access(parent, os.W_OK | os.X_OK) and parent.stat().st_dev == out.stat().st_dev


# -- pictures -------------------------------------------------------------------------------------


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


def read_image(path: Path | str, say: Say = lambda text: None) -> Image.Image:
    """A picture of any format that Pillow knows, upright and in RGB, of 8 bits each.

    Transparent places are laid over white, as pages and viewers show them: what colour a file
    hides under them is not seen. 16 bits of grey become 8, floats from 0 to 1 become 0 to 255. Of
    several pictures in one file the first is read.

    Arguments:
        say: is told what was made of the picture, where that is more than reading it.

    Raises:
        InputError: it cannot be read, or nothing says which of its numbers is white.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    if path.is_dir():
        raise InputError(f"picture {path}: it is a folder, not a picture")
    if not path.is_file():
        raise InputError(f"picture {path}: no such file")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # odd metadata does not matter here
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                say(f"{path} holds {frames} pictures: this is the first of them")
            scale = _grey_scale(image)
            return _in_rgb(ImageOps.exif_transpose(image), scale, path, say)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"picture {path}: not a picture that Pillow can read") from error
    except Exception as error:  # decoders fail in many ways on bytes that are no picture
        raise InputError(f"picture {path}: cannot be read: {one_line(error)}") from error


SENT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_SENT = 2**25
"""Pixels of a picture that somebody else sent."""


def read_sent(data: bytes, say: Say = lambda text: None) -> Image.Image:
    """A picture that somebody else sent, as `read_image` reads a file of one's own.

    Its size is looked at before anything is decoded.

    Raises:
        InputError: it is none of `SENT_FORMATS`, or has too many pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    too_many = f"pixels are too many: at most {MOST_SENT:,} are read. Make the picture smaller."
    named = Path("sent")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size, which is looked at below
            image = Image.open(BytesIO(data), formats=SENT_FORMATS)
            if image.width * image.height > MOST_SENT:
                raise InputError(f"{image.width} x {image.height} {too_many}")
            scale = _grey_scale(image)
            return _in_rgb(ImageOps.exif_transpose(image), scale, named, say)
    except InputError:
        raise
    except Image.DecompressionBombError as error:  # its size was too large to be told
        raise InputError(f"so many {too_many}") from error
    except UnidentifiedImageError as error:
        formats = ", ".join(SENT_FORMATS)
        raise InputError(f"what was sent is no picture: send one of {formats}") from error
    except Exception as error:  # decoders fail in many ways on bytes that are no picture
        raise InputError(f"what was sent cannot be read: {one_line(error)}") from error


def _grey_scale(image: Image.Image) -> tuple[float | None, bool]:
    """Which grey of more than 8 bits is white, if the format says so, and whether it is black."""
    if image.format in _SIXTEEN_BITS:
        return 65535.0, False
    if not image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {}) if image.mode == "F" else {}
        return None, tags.get(_PHOTOMETRIC) == 0
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(_BITS, (16,)))
    return float(2**bits - 1), tags.get(_PHOTOMETRIC) == 0  # Pillow turns round 8 bits alone


def _in_rgb(
    image: Image.Image, scale: tuple[float | None, bool], path: Path, say: Say
) -> Image.Image:
    """In RGB of 8 bits, as it is meant."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        image = _of_eight_bits(image, *scale, path)
    if not (image.mode in _WITH_ALPHA or "transparency" in image.info):
        return image.convert("RGB")
    image = image.convert("RGBA")
    lowest, _ = image.getchannel("A").getextrema()
    if lowest == 255:
        return image.convert("RGB")
    say(f"{path} is transparent in places: it is laid over white")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _of_eight_bits(
    image: Image.Image, white: float | None, inverted: bool, path: Path
) -> Image.Image:
    """Grey of 16 bits or of floats as grey of 8, with its transparent value in a channel.

    Arguments:
        white: the largest integer; `None` where the format does not say.
        inverted: that one is black.
    """
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F":
        if not bool(((values >= 0) & (values <= 1)).all()):  # also where some are no numbers
            raise InputError(
                f"picture {path}: its grey values are floats, and not all of them from 0 (black) "
                "to 1 (white). Scale them, or save 8 or 16 bits."
            )
        grey = np.rint(values * 255)
    elif white is not None:
        grey = np.rint(values / white * 255)
    else:
        raise InputError(
            f"picture {path}: its grey values have 32 bits, of which nothing says where white is. "
            "Save 8 or 16 bits."
        )
    grey = 255 - grey if inverted else grey
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
        InputError: the input would be larger than `LARGEST`.
    """
    if size > LARGEST:
        raise InputError(f"size {size}: the largest is {LARGEST}")
    cropped = _cropped(image, size)
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float().div(255)
    mean, std = _normalisation()
    shown = pixels.permute(1, 2, 0).numpy()
    return Picture(((pixels - mean) / std)[None], shown, imagenet_bounds())


def imagenet_bounds() -> tuple[Tensor, Tensor]:
    """`[3, 1, 1]` each, what `imagenet` makes of black and of white."""
    mean, std = _normalisation()
    return (0 - mean) / std, (1 - mean) / std


def _normalisation() -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def resized(width: int, height: int, size: int) -> tuple[int, int]:
    """What a picture is resized to before its centre is cropped."""
    short = size * 256 // 224
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _cropped(image: Image.Image, size: int) -> Image.Image:
    """Resized, and its centre: `size` x `size`."""
    from PIL import Image

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
        raise InputError(
            f"transform {name} fails: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(x, Tensor) or x.dim() != 3 or x.numel() == 0:
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"transform {name} must return a tensor [C, H, W], not {what}")
    return Picture(x[None], shown(x))


def shown(x: Tensor) -> Pixels:
    """An input `[C, H, W]` as pixels from 0 to 1; grey, where it does not have three colours."""
    values: Pixels = x.detach().cpu().float().numpy()
    low, high = float(values.min()), float(values.max())
    values = (values - np.float32(low)) / np.float32(high - low or 1.0)
    return values.transpose(1, 2, 0) if values.shape[0] == 3 else values.mean(0)


# -- labels ----------------------------------------------------------------------------------------


def read_labels(path: Path) -> list[str]:
    """Names of classes from a file: line k (from 0) names class k. WordNet ids are left out.

    Raises:
        InputError: it is no text file with lines in it.
    """
    if path.is_dir():
        raise InputError(f"labels {path}: it is a folder, not a file")
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except FileNotFoundError as error:
        raise InputError(f"labels {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"labels {path}: not a text file that can be read") from error
    if not lines:
        raise InputError(f"labels {path}: the file is empty")
    return [_WORDNET_ID.sub("", printable(line.strip())) for line in lines]
