"""What may be explained beside one output: differences, one against the rest, means of regions.

Each is a linear combination of outputs, `sum_k v_k f_k`, whose relevance starts from its terms,
`R~_k = v_k f_k` (eq. 13). All are given as `target=`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nrm.errors import TargetError
from nrm.tensors import check_dense

Index = int | tuple[int, ...]
"""An output neuron of a sample: a class, or one number for each axis (negative from the end)."""


class Combination(ABC):
    """A linear combination of the outputs of each sample."""

    @abstractmethod
    def weights(self, output: Tensor) -> Tensor:
        """`v`, `[batch, *neurons]` as the output, and zero at what it leaves out.

        Raises:
            TargetError: there are no such outputs.
        """


@dataclass(frozen=True)
class Contrast(Combination):
    """Why `of` rather than `to`: the difference of two outputs.

    Attributes:
        of, to: an int, or one for each axis of a sample's outputs.

    Raises:
        TargetError: they are the same, or (where something is explained) no outputs.

    Example:
        >>> R = explainer(image, target=nrm.Contrast(340, 345))  # zebra rather than ox
        >>> R = explainer(ids, target=nrm.Contrast((-1, mary), (-1, john)))
    """

    of: Index
    to: Index

    def __post_init__(self) -> None:
        if self.of == self.to:
            raise TargetError(f"a contrast is of two outputs, not of {self.of!r} with itself")

    def __str__(self) -> str:
        return f"output {self.of} minus output {self.to}"

    def weights(self, output: Tensor) -> Tensor:
        found = torch.zeros_like(output)
        found[_place(self.of, output)] += 1
        found[_place(self.to, output)] -= 1
        return found


@dataclass(frozen=True)
class AgainstRest(Combination):
    """Why this one: an output minus the mean of the others along an axis.

    Attributes:
        of: which; by default each sample's largest.
        axis: of a sample's outputs, the one along which the others lie: the last for classes and
            tokens, the first for the classes of a map.
    """

    of: Index | None = None
    axis: int = -1

    def __str__(self) -> str:
        which = "the largest output" if self.of is None else f"output {self.of}"
        return f"{which} minus the mean of the others"

    def weights(self, output: Tensor) -> Tensor:
        neurons = output.shape[1:]
        if not -len(neurons) <= self.axis < len(neurons):
            raise TargetError(f"the output has no axis {self.axis}: its neurons are {_of(output)}")
        axis = self.axis % len(neurons)
        if neurons[axis] < 2:
            raise TargetError(f"along axis {axis} of {_of(output)} there are no other outputs")
        flat = torch.zeros_like(output).flatten(1)
        if self.of is None:
            flat.scatter_(1, output.flatten(1).argmax(1, keepdim=True), 1.0)
            chosen = flat.view_as(output)
        else:
            chosen = flat.view_as(output)
            chosen[_place(self.of, output)] = 1.0
        line = chosen.sum(axis + 1, keepdim=True).expand_as(output)  # where it and the others lie
        return torch.where(chosen == 1, 1.0, -line / (neurons[axis] - 1))


class Average(Combination):
    """The mean of a region of the outputs.

    Arguments:
        index: one entry for each axis of a sample's outputs, ints or slices, those left out whole;
            or a boolean mask shaped like these, with a batch axis in front where samples differ.

    Example:
        >>> R = explainer(image, target=nrm.Average(15, slice(40, 90), slice(40, 90)))
        >>> R = explainer(image, target=nrm.Average(mask))  # [classes, height, width]
    """

    def __init__(self, *index: int | slice | Tensor) -> None:
        (only, *more) = index or (slice(None),)
        self.mask: Tensor | None = None
        if isinstance(only, Tensor):
            check_dense(only, "the mask of an average", TargetError)
            if only.dtype is not torch.bool or more:
                raise TargetError("a region is one boolean mask, or an int or slice for each axis")
            self.mask = only.detach().clone()
        elif not all(
            isinstance(entry, int | slice) and not isinstance(entry, bool) for entry in index
        ):
            raise TargetError(f"a region is an int or slice for each axis, not {index!r}")
        self.index = tuple(index) if self.mask is None else ()

    def __str__(self) -> str:
        return f"the mean of {self!r}"

    def __repr__(self) -> str:
        if self.mask is not None:
            return f"Average({int(self.mask.sum())} outputs)"
        return f"Average({', '.join(map(_entry, self.index))})"

    def weights(self, output: Tensor) -> Tensor:
        if self.mask is not None:
            if self.mask.shape not in (output.shape, output.shape[1:]):
                raise TargetError(
                    f"the region's mask is {tuple(self.mask.shape)}, a sample's outputs "
                    f"{_of(output)}"
                )
            chosen = self.mask.to(output.device).expand(output.shape)
        else:
            if len(self.index) > output.dim() - 1:
                raise TargetError(f"{self!r} has more axes than a sample's outputs {_of(output)}")
            chosen = torch.zeros(output.shape, dtype=torch.bool, device=output.device)
            try:
                chosen[(slice(None), *self.index)] = True
            except IndexError:
                raise TargetError(f"{self!r} is outside of the outputs {_of(output)}") from None
        count = chosen.flatten(1).sum(1)
        if bool((count == 0).any()):
            raise TargetError(f"{self!r} takes no output of {_of(output)}")
        return chosen / count.view(-1, *[1] * (output.dim() - 1)).to(output.dtype)


def _place(index: Index, output: Tensor) -> tuple[Any, ...]:
    """Where a neuron of every sample is.

    Raises:
        TargetError: there is none of that index.
    """
    entries = index if isinstance(index, tuple) else (index,)
    neurons = output.shape[1:]
    known = all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries)
    if not known or len(entries) != len(neurons):
        raise TargetError(
            f"an output is named by {len(neurons)} ints, as its neurons are {_of(output)}; got "
            f"{index!r}"
        )
    for entry, size in zip(entries, neurons, strict=True):
        lowest = -size if len(neurons) > 1 else 0  # positions count from the end, classes do not
        if not lowest <= entry < size:
            raise TargetError(f"output {index!r} is out of range: the neurons are {_of(output)}")
    return (slice(None), *entries)


def _of(output: Tensor) -> tuple[int, ...]:
    return tuple(output.shape[1:])


def _entry(entry: Any) -> str:
    if not isinstance(entry, slice):
        return repr(entry)
    ends = ("" if end is None else str(end) for end in (entry.start, entry.stop))
    return ":".join(ends) + ("" if entry.step is None else f":{entry.step}")
