"""One sample of a data set: its number, inputs and label; or why there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nrm.errors import InputError, one_line

Inputs = tuple[Tensor, ...]
"""The model's arguments for one sample, without a batch axis."""
Read = Callable[[Any], Any]
"""What makes an item of a data set the model's input, or a pair of that and a label."""

_IMAGES = ("image", "img", "pixel_values", "jpg", "jpeg", "png", "webp", "x", "input")
_LABELS = ("label", "labels", "cls", "y", "target")


@dataclass(frozen=True)
class Sample:
    """One sample, or why there is none.

    Attributes:
        number: its own in the data set.
        name: where it is from, to read.
        label: its true class, where that is known.
        error: why it could not be read; there are no inputs then.
    """

    number: int
    name: str
    inputs: Inputs = ()
    label: int | None = None
    error: str | None = None


Load = Callable[[], Sample]
"""Reads a sample; several may be called at once."""


@dataclass(frozen=True)
class Held:
    """Makes a sample of what was read already."""

    number: int
    name: str
    item: Any
    read: Read | None

    def __call__(self) -> Sample:
        return attempted(self.number, self.name, lambda: self.item, self.read)


def attempted(number: int, name: str, get: Callable[[], Any], read: Read | None) -> Sample:
    """A sample, or the reason why it cannot be read: any code and any file may be behind it."""
    try:
        inputs, label = as_sample(get() if read is None else read(get()))
        for x in inputs:
            if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                raise InputError("it holds NaN or infinite values")
    except Exception as error:
        return Sample(number, name, error=reason(error))
    return Sample(number, name, inputs, label)


def as_sample(item: Any) -> tuple[Inputs, int | None]:
    """The inputs of an item of a data set, and its label.

    A tensor or an array; a pair of such and a label; a tuple of several inputs with a label at the
    end, where that is a whole number; or a mapping with an image (`image`, `img`, `pixel_values`,
    `jpg`, ...) and perhaps a label (`label`, `cls`, `y`, ...).

    Raises:
        InputError: it is none of these; a picture needs a function that makes it a tensor.
    """
    if isinstance(item, Mapping):
        image = next((item[name] for name in _IMAGES if name in item), None)
        label = next((item[name] for name in _LABELS if name in item), None)
        return (_tensor(image),), _label(label)
    if isinstance(item, tuple | list):
        *inputs, last = item
        if inputs and (last is None or _is_label(last)):
            return tuple(map(_tensor, inputs)), _label(last)
        return tuple(map(_tensor, item)), None
    return (_tensor(item),), None


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    raise InputError(
        f"an input is a tensor, not a {type(value).__name__}: give read= a function that makes an "
        "item (input, label)"
    )


def _is_label(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_floating_point()
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _label(value: Any) -> int | None:
    if value is None:
        return None
    if not _is_label(value):
        raise InputError(f"a label is a whole number, not {value!r}")
    return int(value)


def plain(item: Any) -> Any:
    """An item, with what is no tensor or number by its bytes or its text."""
    if isinstance(item, Mapping):
        return {name: plain(value) for name, value in item.items()}
    if isinstance(item, tuple | list):
        return [plain(value) for value in item]
    if hasattr(item, "tobytes") and hasattr(item, "size") and not isinstance(item, np.ndarray):
        return hashlib.sha256(item.tobytes()).hexdigest()  # a Pillow picture
    return item


def reason(error: Exception) -> str:
    text = one_line(error)
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
