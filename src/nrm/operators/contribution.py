"""What operands add to a weighted sum, and how a message travels back through what they add.

As sums of terms, each a factor and a weight (`Contribution`, `TermSum`); or connection by
connection (`Connections`), for rules that are no sums of terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nrm.operators.call import Call
from nrm.operators.propagation import pull_back
from nrm.operators.routing import Unchanged
from nrm.rules import Activation, Weight
from nrm.tensors import sum_to


@dataclass
class Contribution:
    """What one operand adds to the sum; by default one parent for each neuron.

    Attributes:
        x: the parents and their values.
        w: the weight that a rule may modify.
        apply: `(factor, weight) -> output`, linear in each; broadcasts to the output.
        uniform: `factor -> output` with weight one on every connection, which counts them; `None`:
            the factor itself, of one parent each.
        transpose: `([K, *output], weight) -> [K, *operand]`, the transpose of `apply` in the
            factor; without it autograd finds it, at the cost of running `apply` once.
        transposes_anew: whether `transpose` always returns new memory, which may be overwritten.
        operand: which operand this is; one may contribute in several ways.
        by_channels: `([*operand], weight, [*output]) -> [outputs, inputs]`: `w_ij factor_i share_j`
            added up over the connections of each two channels, where channels have one weight.
        keeps_sign: whether `apply` adds up factors times weights with constants of its own, if any,
            that are not negative: then it is largest where both are taken at their sizes.
        connections: the connections one by one, given the output's shape, for rules that are no
            sums of terms.
        share: what every rule's contributions are multiplied by, the alpha of a product's factor.
            `apply` and `transpose` have it in them; it stands in place of weight one.
        every: the weight one on every connection, where `apply` and `transpose` take it as any
            other weight; then `uniform` is not needed.
    """

    x: Activation
    w: Weight
    apply: Callable[[Tensor, Tensor], Tensor] = torch.mul
    uniform: Callable[[Tensor], Tensor] | None = None
    transpose: Callable[[Tensor, Tensor], Tensor] | None = None
    operand: int = 0
    by_channels: Callable[[Tensor, Tensor | None, Tensor], Tensor] | None = None
    keeps_sign: bool = False
    connections: Callable[[torch.Size], Connections] | None = None
    transposes_anew: bool = False
    share: float = 1.0
    every: Tensor | None = None

    def add(self, factor: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            return self.apply(factor, weight)
        added = factor if self.uniform is None else self.uniform(factor)
        return added if self.share == 1 else self.share * added

    def counting(self) -> Contribution:
        """The same without its share: its connections count as those of any other operand."""
        return self if self.share == 1 else replace(self, share=1.0, every=None)

    def add_each(self, factors: Tensor, weight: Tensor | None) -> Tensor:
        """The same for each of `[K, *operand]`."""
        if factors.device.type != "cpu" and len(factors) > 1:
            return torch.vmap(partial(self.add, weight=weight))(factors)
        first = self.add(factors[0], weight)
        if len(factors) == 1:
            return first.unsqueeze(0)
        found = first.new_empty((len(factors), *first.shape))
        found[0] = first
        for row, factor in zip(found[1:], factors[1:], strict=True):
            row.copy_(self.add(factor, weight))
        return found


Summand = tuple[Contribution, Tensor, Tensor | None]
"""A term of a rule: what it adds, factor and weight."""


class TermSum:
    """The terms of one group added up, over all operands."""

    def __init__(self, summands: Sequence[Summand], output: Tensor | None = None) -> None:
        self.summands = [
            (part, factor, part.every if weight is None else weight)
            for part, factor, weight in summands
        ]
        self._known = output
        self.direct = all(
            part.transpose is not None and weight is not None for part, _, weight in self.summands
        )

    @cached_property
    def output(self) -> Tensor:
        """The sum; it may broadcast to the operator's output."""
        if self._known is not None:
            return self._known
        if not self.direct:
            return self._graph[1].detach()
        with torch.no_grad():
            return add_up(part.add(factor, weight) for part, factor, weight in self.summands)

    @cached_property
    def _graph(self) -> tuple[list[Tensor], Tensor]:
        """The factors and the sum, with a local autograd graph between them."""
        leaves = [factor.detach().requires_grad_() for _, factor, _ in self.summands]
        with torch.enable_grad():
            return leaves, add_up(
                part.add(leaf, weight)
                for leaf, (part, _, weight) in zip(leaves, self.summands, strict=True)
            )

    def pull(self, share: Tensor, wanted: Sequence[bool], pulled: list[Tensor | None]) -> None:
        """Add `factor * (transposed weight) share`, term by term, to what operands get.

        All of that is new memory: derivatives may be the share itself, parts of it, one tensor
        for several operands, or what a function keeps.
        """
        chosen = [t for t, (part, *_) in enumerate(self.summands) if wanted[part.operand]]
        if not chosen:
            return
        gradients = self._transposed(chosen, share)
        for t, gradient in zip(chosen, gradients, strict=True):
            part, factor, _ = self.summands[t]
            owned = self.direct and part.transposes_anew
            if factor is part.x.every:
                product = gradient if owned else gradient.clone()
            else:
                product = gradient.mul_(factor) if owned else gradient * factor
            before = pulled[part.operand]
            pulled[part.operand] = product if before is None else product.add_(before)

    def push(self, masses: Sequence[Tensor | None]) -> Tensor | None:
        """`sum_i T_ij F(i)`: `[K, *output]`, perhaps broadcast; `None` where all F are zero."""
        added = []
        for part, factor, weight in self.summands:
            mass = masses[part.operand]
            if mass is not None:
                added.append(part.add_each(mass * factor, weight))
        return add_up(added) if added else None

    def _transposed(self, chosen: Sequence[int], share: Tensor) -> Iterator[Tensor]:
        """`(transposed weight) share` of each term in turn, to be used before the next."""
        if not self.direct:
            leaves, output = self._graph
            yield from pull_back(output, [leaves[t] for t in chosen], sum_to(share, output.shape))
            return
        for t in chosen:
            part, _, weight = self.summands[t]
            assert part.transpose is not None
            assert weight is not None
            yield part.transpose(share, weight)


def add_up(summands: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    first, *others = summands
    for summand in others:
        first = first + summand
    return first


def through_matrix(x: Tensor, weight: Tensor | None, share: Tensor) -> Tensor:
    """`w_ij x_i share_j` of each two channels, for a weight `[outputs, inputs]`; added up over all
    other axes."""
    passed = share.reshape(-1, share.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
    return passed if weight is None else passed.mul_(weight)


# -- the connections one by one --------------------------------------------------------------------
#
# Some connections of every neuron at a time: nothing of size neurons x neurons is ever there.


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
        copies = message.reshape(len(parents), *self.output)
        (added,) = Unchanged(self.operand, self.output).pull(copies, [True])
        assert added is not None
        parents += added


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
