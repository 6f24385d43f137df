"""Which output is explained: a class, and where outputs lie at several places, a place too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nrm.errors import QueryError
from nrm.explore.answers import Explained, Output
from nrm.explore.opened import Opened
from nrm.measure import Measure
from nrm.targets import Contrast

LARGEST = 10
"""Outputs that are shown, the largest of those at the place that is explained."""

Index = tuple[int, ...]


@dataclass(frozen=True)
class Aim:
    """What is explained.

    Attributes:
        target: as an explainer takes it.
        python: the same as Python.
        notation: in the paper's.
        outputs: `[*neurons]`, the values of all outputs that may be explained: the logits where a
            last softmax is looked through.
        axis: of these, that of the classes.
        of, to: the output, and the one that it is explained against, one number for each axis.
    """

    target: Any
    python: str
    notation: str
    outputs: Tensor
    axis: int
    of: Index
    to: Index | None

    @property
    def _places(self) -> list[int]:
        """The axes along which there are several places."""
        sizes = self.outputs.shape
        return [k for k in range(len(sizes)) if k != self.axis and sizes[k] > 1]

    def explained(self, R: Measure, opened: Opened) -> Explained:
        """What the page is told of it.

        Arguments:
            R: of the target.
        """
        places = self._places
        at = list(self.of)
        if self.outputs.dim():
            at[self.axis] = slice(None)  # type: ignore[call-overload]
        values = self.outputs[tuple(at)].reshape(-1)
        chosen = self._class(self.of)
        against = None if self.to is None else self._class(self.to)
        largest = values.topk(min(LARGEST, len(values))).indices.tolist()
        wanted = [k for k in (chosen, against) if k is not None and k not in largest]
        label = self._named(opened, self.of)
        if self.to is not None:
            label = f"{label} − {self._named(opened, self.to)}"
        return Explained(
            chosen,
            against,
            label,
            float(R.scale[0]),
            R.explained,
            [(k, opened.label(k), float(values[k])) for k in [*largest, *wanted]],
            len(values),
            [self.of[axis] for axis in places],
            [self.outputs.shape[axis] for axis in places],
            len([axis for axis in places if axis < self.axis]),
        )

    def _class(self, index: Index) -> int:
        return index[self.axis] if index else 0

    def _named(self, opened: Opened, index: Index) -> str:
        places = [str(index[axis]) for axis in self._places]
        name = opened.label(self._class(index))
        if not places:
            return name
        return f"{name} at {places[0]}" if len(places) == 1 else f"{name} at ({', '.join(places)})"


def target_of(chosen: Output | None, against: Output | None, R: Measure, opened: Opened) -> Aim:
    """What is explained.

    Arguments:
        chosen, against: outputs, each a number, or one for each axis (places count from the end
            too, if they are negative; no class is that of the largest there); `None`: the largest
            of all, and nothing.

    Raises:
        QueryError: they are no outputs.
    """
    returned, outputs = (
        R.graph.output.canonical(value.unsqueeze(0))[0, 0]
        for value in (R.output, R.forward_pass.output)
    )
    axis = _class_axis(R, opened, outputs.shape)
    sizes = outputs.shape
    if chosen is None:
        flat = int(returned.reshape(-1).argmax())
        found = tuple(int(k) for k in torch.unravel_index(torch.tensor(flat), sizes))
        several = _named_axes(sizes, axis)
        chosen = [found[k] for k in several] if len(several) > 1 else (found or (0,))[axis]
    elif isinstance(chosen, list | tuple):
        chosen = _with_a_class(chosen, outputs, axis)
    of, python, notation = _index(chosen, sizes, axis)
    if against is None:
        return Aim(_target(of, sizes), python, notation, outputs, axis, of, None)
    to, python_to, notation_to = _index(against, sizes, axis)
    if to == of:
        raise QueryError("an output is explained against another one, not against itself.")
    contrast = Contrast(_target(of, sizes), _target(to, sizes))
    line = f"nrm.Contrast({python}, {python_to})"
    return Aim(contrast, line, f"{notation} − {notation_to}", outputs, axis, of, to)


def _named_axes(sizes: Sequence[int], axis: int) -> list[int]:
    """The axes along which an output has a number: that of the classes, and those of places."""
    return [k for k, size in enumerate(sizes) if size > 1 or k == axis]


def _with_a_class(chosen: Sequence[Any], outputs: Tensor, axis: int) -> Sequence[Any]:
    """The largest output of a place, where it says no class."""
    several = _named_axes(outputs.shape, axis)
    without = [k for k, one in enumerate(chosen) if one is None]
    if len(chosen) != len(several) or without != [several.index(axis)]:
        return chosen
    given = [0 if one is None else one for one in chosen]
    index, _, _ = _index(given, outputs.shape, axis)
    at: list[Any] = list(index)
    at[axis] = slice(None)
    largest = int(outputs[tuple(at)].argmax())
    return [largest if one is None else one for one in chosen]


def _target(index: Index, sizes: Sequence[int]) -> Any:
    return index if len(sizes) > 1 else index[0] if index else 0


def _class_axis(R: Measure, opened: Opened, sizes: Sequence[int]) -> int:
    """Which axis is that of the classes: the one with as many as have names, else the channels'."""
    if not sizes:
        return 0
    names = len(opened.labels or ())
    named = [axis for axis, size in enumerate(sizes) if size == names]
    if len(named) == 1:
        return named[0]
    variable = R.graph.output
    return len(sizes) - 1 if variable.channel_axis is None else variable.channel_axis_of(sizes)


def _index(given: Any, sizes: Sequence[int], axis: int) -> tuple[Index, str, str]:
    """An output by a number for each axis, as Python and in the paper's notation.

    A single number is a class, where all outputs are at one place. Axes of size one may be left
    out.
    """
    several = _named_axes(sizes, axis)
    numbers = given if isinstance(given, list | tuple) else [given]
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in numbers)
    if not whole:
        raise QueryError(f"there is no output {str(given)[:20]}: outputs are whole numbers.")
    if len(numbers) == len(sizes):
        full = list(numbers)
    elif len(numbers) == max(1, len(several)):
        full = [0] * len(sizes)
        for k, number in zip(several, numbers, strict=False):
            full[k] = number
    else:
        raise QueryError(
            f"outputs are of shape {tuple(sizes)}, so that one is named by {len(several)} numbers, "
            f"not {str(given)[:20]}."
        )
    if not sizes and numbers != [0]:
        raise QueryError(f"there is no output {str(given)[:20]}: there is one, 0.")
    for k, (number, size) in enumerate(zip(full, sizes, strict=True)):
        lowest = 0 if k == axis else -size
        if not lowest <= number < size:
            raise QueryError(
                f"there is no output {str(given)[:20]}: along axis {k} they are 0 to {size - 1}."
                if len(several) > 1
                else f"there is no output {str(number)[:20]}: they are 0 to {size - 1}."
            )
    shown = full[0] if len(full) == 1 else tuple(full)
    python = str(shown) if full else "0"
    notation = python if len(several) > 1 else str(full[axis] if full else 0)
    index = tuple(number % size for number, size in zip(full, sizes, strict=True))
    return index, python, notation
