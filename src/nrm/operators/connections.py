"""Who is connected with whom, one connection after the other: for rules that are no sums of terms.

Some connections of every neuron at a time: nothing of size neurons x neurons is ever there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nrm.operators.call import Call


@dataclass(frozen=True)
class Piece:
    """Some connections of every neuron: at one offset of a kernel, some channels of its group."""

    offset: int
    channels: slice


class Connections(ABC):
    """Who is connected with whom, and by which weight.

    Neurons j are seen as `[samples, groups, outputs, positions]`; parents are the same for all
    outputs of a group.

    Arguments:
        weight: `[offsets, channels, groups, outputs]`.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def pieces(self, channels: int) -> Iterator[Piece]:
        """All connections, those of at most so many channels at a time."""
        for offset in range(self._weight.shape[0]):
            for begin in range(0, self._weight.shape[1], channels):
                yield Piece(offset, slice(begin, begin + channels))

    def weight(self, piece: Piece) -> Tensor:
        """`w_ij`, broadcastable to `[connections, samples, groups, outputs, positions]`."""
        return self._weight[piece.offset, piece.channels][:, None, :, :, None]

    @abstractmethod
    def neurons(self, output: Tensor) -> Tensor:
        """`[M, *output shape]` as `[M * samples, groups, outputs, positions]`."""

    @abstractmethod
    def gather(self, parents: Tensor, piece: Piece) -> Tensor:
        """The parents `[M, *operand shape]` at the other end of the connections:
        `[connections, M * samples, groups, 1, positions]`."""

    @abstractmethod
    def scatter(self, message: Tensor, piece: Piece, parents: Tensor) -> None:
        """Add `[connections, M * samples, groups, positions]` to the parents; the transpose."""


class OneParent(Connections):
    """One connection for every neuron, where the operand perhaps broadcasts to the output."""

    def __init__(self, weight: Tensor, operand: torch.Size, output: torch.Size) -> None:
        super().__init__(weight.new_empty(1, 1, 1, 1))
        self.values, self.operand, self.output = weight, operand, output

    def weight(self, piece: Piece) -> Tensor:
        return self.values.expand(self.output).reshape(-1)

    def neurons(self, output: Tensor) -> Tensor:
        return output.reshape(len(output), 1, 1, -1)

    def gather(self, parents: Tensor, piece: Piece) -> Tensor:
        many = len(parents)
        added = len(self.output) - len(self.operand)
        aligned = parents.reshape(many, *(1,) * added, *self.operand)
        return self.neurons(aligned.expand(many, *self.output)).unsqueeze(0)

    def scatter(self, message: Tensor, piece: Piece, parents: Tensor) -> None:
        many, added = len(parents), len(self.output) - len(self.operand)
        copies = message.reshape(many, *self.output)
        parents += copies.sum_to_size(many, *(1,) * added, *self.operand).reshape(parents.shape)


class Dense(Connections):
    """`y = x W^T`: every neuron of an axis is connected with all of the operand's.

    Arguments:
        weight: `[outputs, inputs]`.
        positions: that axis is the last but one, and the last are positions.
    """

    def __init__(self, weight: Tensor, positions: bool = False) -> None:
        super().__init__(weight.mT.contiguous()[None, :, None, :])
        self.outputs, self.inputs = weight.shape
        self.positions = positions

    def neurons(self, output: Tensor) -> Tensor:
        return output.reshape(-1, 1, self.outputs, output.shape[-1] if self.positions else 1)

    def gather(self, parents: Tensor, piece: Piece) -> Tensor:
        return self._parents(parents)[:, piece.channels].movedim(1, 0)[:, :, None, None]

    def scatter(self, message: Tensor, piece: Piece, parents: Tensor) -> None:
        view = self._parents(parents)
        view[:, piece.channels] += message[:, :, 0].movedim(0, 1)

    def _parents(self, parents: Tensor) -> Tensor:
        return parents.reshape(-1, self.inputs, parents.shape[-1] if self.positions else 1)


class Kernel(Connections):
    """A convolution, or its transpose, of any dimension.

    Arguments:
        call: the operator's call.
        operand, output: their shapes.
        transposed: whether it is the transpose of a convolution.
    """

    def __init__(
        self, call: Call, operand: torch.Size, output: torch.Size, transposed: bool = False
    ) -> None:
        weight: Tensor = call["weight"]
        axes = weight.dim() - 2
        self.groups, self.transposed = int(call["groups"]), transposed
        kernel = weight.shape[2:]
        if transposed:  # [groups, channels, outputs, offsets]
            by_group = weight.reshape(self.groups, -1, weight.shape[1], prod(kernel))
            super().__init__(by_group.permute(3, 1, 0, 2))
        else:  # [groups, outputs, channels, offsets]
            by_group = weight.reshape(self.groups, -1, weight.shape[1], prod(kernel))
            super().__init__(by_group.permute(3, 2, 0, 1))
        self.outputs = self._weight.shape[3]
        self.offsets = list(product(*map(range, kernel)))
        self.operand, self.output = operand[-axes:], output[-axes:]
        self.large, self.small = (
            (self.output, self.operand) if transposed else (self.operand, self.output)
        )
        self.stride, self.dilation = (
            for_each_axis(call[name], axes) for name in ("stride", "dilation")
        )
        padding = call["padding"]
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
            self.padding = [r // 2 if padding == "same" else 0 for r in reach]
        else:
            self.padding = for_each_axis(padding, axes)

    def neurons(self, output: Tensor) -> Tensor:
        return output.reshape(-1, self.groups, self.outputs, prod(self.output))

    def gather(self, parents: Tensor, piece: Piece) -> Tensor:
        chosen = self._parents(parents)[:, :, piece.channels]
        met = (self._write if self.transposed else self._read)(chosen, self.offsets[piece.offset])
        return met.flatten(3).movedim(2, 0).unsqueeze(3)

    def scatter(self, message: Tensor, piece: Piece, parents: Tensor) -> None:
        met = torch.unflatten(message.movedim(0, 2), -1, self.output)
        found = (self._read if self.transposed else self._write)(met, self.offsets[piece.offset])
        view = self._parents(parents)
        view[:, :, piece.channels] += found

    def _parents(self, parents: Tensor) -> Tensor:
        return parents.reshape(-1, self.groups, self._weight.shape[1], *self.operand)

    def _read(self, large: Tensor, offset: Sequence[int]) -> Tensor:
        """What a kernel's entry meets at every position; padding is zero."""
        sides = [side for pair in reversed(self._margins()) for side in pair]
        return F.pad(large, sides)[self._steps(offset)]

    def _write(self, small: Tensor, offset: Sequence[int]) -> Tensor:
        """Each position where a kernel's entry meets it: the transpose of reading."""
        margins = self._margins()
        sizes = [
            before + size + after for (before, after), size in zip(margins, self.large, strict=True)
        ]
        padded = small.new_zeros((*small.shape[: -len(sizes)], *sizes))
        padded[self._steps(offset)] = small
        inside: list[Any] = [
            slice(before, before + size)
            for (before, _), size in zip(margins, self.large, strict=True)
        ]
        return padded[(..., *inside)]

    def _margins(self) -> list[tuple[int, int]]:
        """Padding on both sides of every axis, as far as kernels reach."""
        found = []
        for axis, size in enumerate(self.large):
            last = self.offsets[-1][axis] * self.dilation[axis]
            last += (self.small[axis] - 1) * self.stride[axis] + 1
            found.append((self.padding[axis], max(0, last - size - self.padding[axis])))
        return found

    def _steps(self, offset: Sequence[int]) -> tuple[Any, ...]:
        steps = []
        for axis, place in enumerate(offset):
            begin = place * self.dilation[axis]
            end = begin + (self.small[axis] - 1) * self.stride[axis] + 1
            steps.append(slice(begin, end, self.stride[axis]))
        return (..., *steps)


def for_each_axis(setting: Sequence[int], axes: int) -> list[int]:
    """One number for each axis, where one may stand for all."""
    return list(setting) * (axes if len(setting) == 1 else 1)
