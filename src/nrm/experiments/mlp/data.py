"""Handwritten digits as flat pictures: MNIST from its published files, or scikit-learn's."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nrm.errors import InputError

DIGITS = "digits"
"""`--data digits`: scikit-learn's, which need no files."""

FOLDERS = ("", "mnist", "MNIST", "MNIST/raw", "raw")
"""Where in the folder of data MNIST may lie: as itself, as torchvision leaves it."""

_PARTS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
_SIDE, _CLASSES = 28, 10
_PICTURES, _LABELS = 0x803, 0x801
"""The first four bytes of idx files: unsigned bytes on three axes, and on one."""
_HELD_OUT = {"mnist": 1_000, "digits": 100}
_DIGITS_TRAINING = 1_400


@dataclass(frozen=True, eq=False)
class Part:
    """Pictures `[N, side * side]` from 0 to 1, and their classes `[N]`."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in three parts.

    Attributes:
        train: what the network learns from.
        held_out: of the training set, kept from the network: to choose rules on.
        test: what is reported on, in the order of its file.
    """

    name: str
    side: int
    train: Part
    held_out: Part
    test: Part


def load(data: str) -> Data:
    """The data set that a command line names: a folder with MNIST in it, or `digits`.

    Raises:
        InputError: the files are not there, or not MNIST's.
    """
    return _digits() if data == DIGITS else _mnist(Path(data))


def _mnist(folder: Path) -> Data:
    train, test = (_part(folder, *_PARTS[name]) for name in ("train", "test"))
    return _divided("mnist", _SIDE, train, test)


def _part(folder: Path, prefix: str, count: int) -> Part:
    pictures = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"), (count, _SIDE, _SIDE))
    labels_file = _find(folder, f"{prefix}-labels-idx1-ubyte")
    labels = read_idx(labels_file, (count,)).long()
    if int(labels.max()) >= _CLASSES:
        raise InputError(f"{labels_file}: a label is {int(labels.max())}, MNIST's are 0 to 9.")
    return Part(pictures.flatten(1).float() / 255, labels)


def read_idx(file: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes of an idx file, gzipped or not, as a tensor.

    Raises:
        InputError: it is damaged, or of another kind or size than `shape` says.
    """
    raw = file.read_bytes()
    if file.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{file}: not a whole gzip file ({error}).") from error
    magic = _PICTURES if len(shape) == 3 else _LABELS
    begin = struct.pack(f">{1 + len(shape)}I", magic, *shape)
    if raw[:4] != begin[:4]:
        raise InputError(
            f"{file}: begins with {raw[:4].hex() or 'nothing'}, an idx file of "
            f"{len(shape)} axes of bytes with {begin[:4].hex()}."
        )
    size = len(begin) + torch.Size(shape).numel()
    if raw[: len(begin)] != begin or len(raw) != size:
        whole = raw[4 : len(begin)]
        found = [number for (number,) in struct.iter_unpack(">I", whole[: len(whole) // 4 * 4])]
        raise InputError(
            f"{file}: {' x '.join(map(str, found))} in {len(raw)} bytes; MNIST's is "
            f"{' x '.join(map(str, shape))} in {size}."
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=len(begin)).view(shape)


def _find(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise InputError(
            f"--data {folder}: no such folder. Give one that holds MNIST, or {DIGITS!r}."
        )
    for place in FOLDERS:
        for file in (folder / place / name, folder / place / f"{name}.gz"):
            if file.is_file():
                return file
    raise InputError(
        f"--data {folder}: neither {name} nor {name}.gz is in it, or in its "
        f"{', '.join(FOLDERS[1:])}. torchvision.datasets.MNIST({str(folder)!r}, download=True) "
        f"puts them there; --data {DIGITS} needs no files."
    )


def _digits() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise InputError(
            f"--data {DIGITS} needs {error.name}, which is not installed: pip install 'nrm[demo]'"
        ) from error
    digits = load_digits()
    x = torch.from_numpy(digits.data).float() / 16
    y = torch.from_numpy(digits.target).long()
    # Those of one writer lie together in the file, so that parts are drawn, always alike.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, others = order[:_DIGITS_TRAINING], order[_DIGITS_TRAINING:]
    return _divided(DIGITS, 8, Part(x[seen], y[seen]), Part(x[others], y[others]))


def _divided(name: str, side: int, train: Part, test: Part) -> Data:
    kept = len(train) - _HELD_OUT[name]
    return Data(
        name,
        side,
        Part(train.x[:kept], train.y[:kept]),
        Part(train.x[kept:], train.y[kept:]),
        test,
    )
