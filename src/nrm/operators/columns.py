"""A weighted sum prepared for one input: each message is shared out by the rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nrm.errors import QueryError
from nrm.operators.propagation import (
    Columns,
    Contribution,
    Propagation,
    Setting,
    TermSum,
    add_up,
    dense,
    refuse_failing,
    sum_to,
)
from nrm.rules import Gate, Normalized, Original
from nrm.tensors import with_slope

Coordinates = tuple[Tensor, ...]
"""Neurons, by one tensor of indices for each axis."""

_PIECE = 2**18  # elements: what is computed on the way stays in the cache

Sums = tuple[Tensor, Coordinates | None]
"""Sums over parents, which may broadcast to the output, and where they vanish."""


class SharedOut(Propagation):
    """A weighted sum prepared for one input: each message is shared out by the rule.

    Groups of terms (see `nrm.rules.base`) are evaluated when the first message that needs them
    arrives, and kept, so that further messages cost one transposed product per group.
    """

    exclusive = True

    def __init__(self, parts: list[Contribution], setting: Setting, operands: int) -> None:
        self.parts, self.setting, self.rule = parts, setting, setting.rule
        self.shapes = [torch.Size()] * operands
        for part in parts:
            self.shapes[part.operand] = part.x.value.shape
        self.adopts_orphans = False
        self._groups: dict[int, TermSum] = {}
        self._group_sums: dict[int, Sums] = {}
        self._originals: dict[Original, Sequence[tuple[TermSum, Gate]]] = {}
        self._own_sum: Tensor | None = None

    def adopt_orphans(self, output: torch.Size) -> None:
        """Neurons without parents give their relevance to the late leaf, if that is for them."""
        if self.setting.late_leaf not in (None, "bias"):
            self.adopts_orphans = True
            self.shapes.append(output)

    def own_sum(self, known: Tensor | None = None) -> Tensor:
        """`sum_i z_ij` over all operands: what the operator itself adds up.

        Arguments:
            known: the sum, where the operator's output is that.
        """
        if self.rule.reuses_sum:
            return self.group(0, known).output.detach()
        if known is not None:
            self._own_sum = known
            return known
        with torch.no_grad():
            self._own_sum = add_up(part.apply(part.x.value, part.w.value) for part in self.parts)
        return self._own_sum

    def late_shape(self) -> torch.Size:
        return self.shapes[-1]

    @cached_property
    def terms(self) -> list[list[list[tuple[Tensor, Tensor | None]]]]:
        """Contribution -> group -> terms."""
        return [[list(group) for group in self.rule.groups(part.x, part.w)] for part in self.parts]

    def group(self, index: int, known: Tensor | None = None) -> TermSum:
        if index not in self._groups:
            self._groups[index] = TermSum(
                [
                    (part, factor, weight)
                    for part, groups in zip(self.parts, self.terms, strict=True)
                    for factor, weight in groups[index]
                ],
                known,
            )
        return self._groups[index]

    @cached_property
    def uniform(self) -> TermSum:
        """Every parent counts the same: what a vanished column falls back to."""
        return TermSum([(part.counting(), part.x.ones, None) for part in self.parts])

    @cached_property
    def _fallbacks(self) -> list[TermSum]:
        """Among which parents a vanished column is split: the first that has any."""
        if not self._has_zeros:
            return [self.uniform]
        # Explicit zeros are parents only of neurons that have no others.
        every = TermSum([(part.counting(), part.x.every, None) for part in self.parts])
        return [self.uniform, every]

    @property
    def _has_zeros(self) -> bool:
        return any(part.x.real is not None for part in self.parts)

    # -- sharing a message out -------------------------------------------------------------------

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: Normalized = True
    ) -> list[Tensor | None]:
        if self.setting.strict and not message.requires_grad:
            self._refuse_failing_columns(message)
        pulled: list[Tensor | None] = [None] * len(self.shapes)
        for terms, share in self._shares(message, normalized):
            if terms is None:
                if wanted[-1]:
                    before = pulled[-1]
                    pulled[-1] = share if before is None else share.add_(before)
                continue
            if terms is self.uniform and not message.requires_grad:
                self._note_vanished(share)
            terms.pull(share, wanted, pulled)
        for operand, shape in enumerate(self.shapes):
            if wanted[operand] and pulled[operand] is None:
                pulled[operand] = message.new_zeros((message.shape[0], *shape))
        return pulled

    def _note_vanished(self, share: Tensor) -> None:
        """Take note of what is split evenly, `share` of it over each connection."""
        with torch.no_grad():
            sizes = (share.abs() * self.uniform.output).flatten(1).sum(1)
            self.vanished = max(self.vanished, float(sizes.max()))

    def push(
        self, masses: Sequence[Tensor | None], shape: torch.Size, normalized: Normalized = True
    ) -> Tensor:
        # Columns do not mix: what a message of ones is divided into says it for all.
        known = next(mass for mass in masses if mass is not None)
        pushed = known.new_zeros((len(known), *shape))
        with torch.no_grad():
            ones = known.new_ones((1, *shape))
            for terms, share in self._shares(ones, normalized, every_column=True, real=False):
                met = masses[-1] if terms is None else terms.push(masses)
                if met is not None:
                    pushed.addcmul_(share, met)
        return pushed

    def absolute(self) -> Propagation | None:
        if not all(part.keeps_sign for part in self.parts):
            return None
        return self if self.rule.nonnegative else AbsoluteShares(self)

    def by_channels(
        self, message: Tensor, operand: int, samples: int, onward: Tensor | None = None
    ) -> Iterator[Tensor] | None:
        parts = [part for part in self.parts if part.operand == operand]
        if len(parts) != 1 or parts[0].by_channels is None:
            return None
        return self._by_channels(message, operand, samples, onward)

    def _by_channels(
        self, message: Tensor, operand: int, samples: int, onward: Tensor | None
    ) -> Iterator[Tensor]:
        shares = [
            (
                part,
                (factor if onward is None else factor * onward).chunk(samples),
                weight,
                share[0].chunk(samples),
            )
            for terms, share in self._shares(message, normalized=True, every_column=True)
            for part, factor, weight in (terms.summands if terms is not None else ())
            if part.operand == operand
        ]
        for sample in range(samples):
            yield add_up(
                part.by_channels(factor[sample], weight, share[sample])
                for part, factor, weight, share in shares
                if part.by_channels is not None
            )

    def _shares(
        self, message: Tensor, normalized: Normalized, every_column: bool = False, real: bool = True
    ) -> Iterator[tuple[TermSum | None, Tensor]]:
        """How a message is shared out: among which terms, `m_j gate_j / sum_i T~_ij` of each.

        `None`: what late leaves take of neurons without parents. Columns that have one sum are
        added up, unless `every_column` is wanted. Neurons that have nowhere to give relevance to
        are refused it, unless the message is not `real`.
        """
        if isinstance(normalized, Original):
            for terms, gate in self._original(normalized):
                yield terms, _gated(message, gate)
            return
        if normalized and self.rule.by_sign:
            for index, taken in self._taken_by_sign(message):
                share, stranded = self._divide(taken, self._sum_of(index), every_column, real)
                yield from stranded
                yield self.group(index), share
            return
        share = message
        if normalized:
            share, stranded = self._divide(message, self._column_sums, every_column, real)
            yield from stranded
        for index, gate in enumerate(self._gates):
            yield self.group(index), _gated(share, gate)

    def _taken_by_sign(self, message: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What group 0 takes of a message, and group 1 where there is any for it."""
        assert self._own_sum is not None
        opposed = None
        if any_below(message, self._own_sum):
            agreeing = where_not_below(message, self._own_sum)
            opposed, message = message - agreeing, agreeing
        yield 0, message
        if opposed is not None:
            yield 1, opposed

    def _divide(
        self, message: Tensor, sums: Sums, every_column: bool, real: bool
    ) -> tuple[Tensor, list[tuple[TermSum | None, Tensor]]]:
        """A message divided by column sums, and what is at vanished columns, split uniformly."""
        total, vanished = sums
        # What late leaves adopt goes to each column's own neuron of the leaf.
        if vanished is not None:
            every_column = every_column or self.adopts_orphans or self._has_zeros
        if every_column and total.shape != message.shape[1:]:
            total, vanished = self._with_vanished(total.expand(message.shape[1:]))
        message = sum_to(message, total.shape)  # columns with one sum: one for all of them
        if vanished is None:
            return (message.div_(total) if dense(message) else message / total), []
        if message.requires_grad:  # the transpose divides nothing by nothing there
            total = total.index_put(vanished, total.new_ones(()))
        at: Any = (slice(None), *vanished)
        stranded = message[at]
        share = message.div_(total) if dense(message) else message / total
        share[at] = 0.0
        if not bool(stranded.any()):
            return share, []
        return share, self._split_uniformly(
            stranded, vanished, total.shape if every_column else None, real
        )

    @cached_property
    def _gates(self) -> Sequence[Gate]:
        with torch.no_grad():
            return self.rule.gates(_SumsOnDemand(self, len(self.terms[0])), self._own_sum)

    def _original(self, original: Original) -> Sequence[tuple[TermSum, Gate]]:
        """The groups and their gates where the rule divides by denominators of its own."""
        if original not in self._originals:
            groups = [self.group(g) for g in range(len(self.terms[0]))]
            if not self.rule.counts_biases:
                groups = [
                    TermSum([one for one in group.summands if not one[0].x.constant])
                    for group in groups
                ]
            with torch.no_grad():
                sums = [group.output.detach() for group in groups]
                gates = self.rule.original_gates(sums, self._own_sum, original)
            self._originals[original] = list(zip(groups, gates, strict=True))
        return self._originals[original]

    @cached_property
    def _column_sums(self) -> Sums:
        """`sum_i T~_ij`, and where it vanishes."""
        with torch.no_grad():
            total = add_up(_gated(self._sum(g), gate) for g, gate in enumerate(self._gates))
            return self._with_vanished(total)

    def _sum_of(self, index: int) -> Sums:
        """The sum of one group, and where it vanishes."""
        if index not in self._group_sums:
            with torch.no_grad():
                self._group_sums[index] = self._with_vanished(self._sum(index))
        return self._group_sums[index]

    def _sum(self, index: int) -> Tensor:
        derived = None
        if index == 1 and self._own_sum is not None:
            derived = self.rule.opposed_sum(self.group(0).output, self._own_sum)
        return self.group(index).output if derived is None else derived

    def _with_vanished(self, total: Tensor) -> Sums:
        floor = max(self.rule.stabilizer, column_floor(total.dtype))
        return total, smaller_than(total, floor)

    def _split_uniformly(
        self, stranded: Tensor, vanished: Coordinates, columns: torch.Size | None, real: bool
    ) -> list[tuple[TermSum | None, Tensor]]:
        """Split what met vanished columns: `[K, columns]` at the coordinates `vanished`.

        Arguments:
            columns: their shape, if every one is wanted.
        """
        shares: list[tuple[TermSum | None, Tensor]] = []
        every = torch.arange(len(stranded), device=stranded.device)[:, None]
        for terms in self._fallbacks:
            parents = terms.output.detach()
            if columns is not None:
                parents = parents.expand(columns)
            at = tuple(
                axis if size > 1 else torch.zeros_like(axis)
                for axis, size in zip(vanished, parents.shape, strict=True)
            )
            count = parents[at]
            some = count > 0.5  # each counts one
            share = stranded.new_zeros((len(stranded), *parents.shape))
            divided = torch.where(some, stranded / count.clamp(min=0.5), 0.0)
            share.index_put_((every, *at), divided, accumulate=True)
            shares.append((terms, share))
            stranded = torch.where(some, 0.0, stranded)
            if not bool(stranded.any()):
                return shares
        if self.adopts_orphans:
            adopted = stranded.new_zeros((len(stranded), *self.shapes[-1]))
            shares.append((None, adopted.index_put_((every, *vanished), stranded)))
        elif real:
            raise QueryError(
                f"relevance reached neurons of {self.setting.address!r} that have no parents "
                "(their whole receptive field is padding), so it has nowhere to go. Use "
                "bias='input', or a composite whose upper rules give such neurons none."
            )
        return shares

    # -- looking at columns ----------------------------------------------------------------------

    def magnitude(self) -> Tensor:
        """`sum_i |T~_ij|` of every column."""
        if self.rule.nonnegative:
            return self._column_sums[0]
        with torch.no_grad():
            return add_up(
                _gated(
                    add_up(
                        part.add(factor.abs(), None if weight is None else part.w.size(weight))
                        for part, groups in zip(self.parts, self.terms, strict=True)
                        for factor, weight in groups[index]
                    ),
                    gate,
                ).abs()
                for index, gate in enumerate(self._gates)
            )

    def columns(self, message: Tensor, tolerance: float) -> Columns:
        mass = message.abs().sum(0)
        total, magnitude, vanished = self._columns_like(mass)
        empty = vanished & (magnitude <= torch.finfo(total.dtype).tiny)
        ratio = torch.where(vanished, 0.0, total.abs() / magnitude)
        reached = ratio[(mass > 0) & ~empty]
        return Columns(
            address=self.setting.address,
            nearly_zero=float(mass[(ratio < tolerance) & ~empty].sum()),
            negative=float(mass[(total < 0) & ~vanished].sum()),
            vanished=float(mass[empty].sum()),
            smallest=float(reached.min()) if reached.numel() else 1.0,
        )

    def _columns_like(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Column sums, their magnitudes and whether they vanish, all of the output's shape."""
        total, where = self._column_sums
        vanished = torch.zeros_like(total, dtype=torch.bool)
        if where is not None:
            vanished[where] = True
        return (
            total.expand(output.shape),
            self.magnitude().expand(output.shape),
            vanished.expand(output.shape),
        )

    def _refuse_failing_columns(self, message: Tensor) -> None:
        if self.rule.nonnegative:
            return
        total, magnitude, vanished = self._columns_like(message[0])
        # Contributions that all vanish are no violation: the uniform split defines them.
        cancelled = vanished & (magnitude > torch.finfo(total.dtype).tiny)
        failing = (total < 0) & ~vanished | cancelled
        refuse_failing(
            message,
            failing,
            self.setting.address,
            f"under {self.rule}",
            "The Gamma, ZPlus and Flat rules cannot fail so.",
        )


def _gated(share: Tensor, gate: Gate) -> Tensor:
    return share if isinstance(gate, float) and gate == 1.0 else share * gate


class AbsoluteShares(SharedOut):
    """Every connection with the absolute size of its terms."""

    nonnegative = True

    def __init__(self, owner: SharedOut) -> None:
        super().__init__(owner.parts, replace(owner.setting, strict=False), len(owner.shapes))
        self.shapes, self._owner = owner.shapes, owner
        self._sizes: dict[int, TermSum] = {}

    def _shares(
        self, message: Tensor, normalized: Normalized, every_column: bool = False, real: bool = True
    ) -> Iterator[tuple[TermSum | None, Tensor]]:
        for terms, share in self._owner._shares(message, normalized, every_column, real):
            yield None if terms is None else self._size_of(terms), share.abs()

    def _size_of(self, terms: TermSum) -> TermSum:
        if id(terms) not in self._sizes:  # the owner keeps them
            self._sizes[id(terms)] = TermSum(
                [
                    (part, factor.abs(), None if weight is None else part.w.size(weight))
                    for part, factor, weight in terms.summands
                ]
            )
        return self._sizes[id(terms)]


class _SumsOnDemand(Sequence[Tensor]):
    """Group sums, each evaluated only if a rule reads it."""

    def __init__(self, owner: SharedOut, length: int) -> None:
        self._owner, self._length = owner, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._owner.group(index).output.detach()


# -- which columns vanish, and where a message opposes them ----------------------------------------


def column_floor(dtype: torch.dtype) -> float:
    """A column whose sum is no larger than this vanishes, whatever the rule."""
    return torch.finfo(dtype).tiny


def without_vanished(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sums, through which no derivative passes where they vanish.

    A neuron whose contributions cancel has no relevance to pass on, but its derivative does not
    vanish with it.

    Returns:
        the same values; and where they are not zero but count as zero (`None`: nowhere, as far as
        is known without waiting for a device).
    """
    seen, floor = value.detach(), column_floor(value.dtype)
    if value.device.type == "cpu":
        at = smaller_than(seen, floor)
        if at is None:
            return value, None
        small = bool((seen[at] != 0).any())
        kept = torch.ones(seen.shape, dtype=torch.bool)
        kept[at] = False
    else:
        kept, small = seen.abs() > floor, True
    return with_slope(value, value, kept), (~kept & (seen != 0)) if small else None


def smaller_than(value: Tensor, bound: float) -> Coordinates | None:
    """Where `|value| <= bound`; `None`: nowhere."""
    if value.device.type != "cpu":
        small = value.abs() <= bound
        return tuple(small.nonzero(as_tuple=True)) if bool(small.any()) else None
    if 0 < value.numel() <= _PIECE and float(value.abs().amin()) > bound:
        return None
    order = _memory_order(value)
    found = []
    for begin, piece in _pieces(value.permute(order).reshape(-1)):
        size = piece.abs()
        if float(size.amin()) <= bound:
            found.append((size <= bound).nonzero()[:, 0] + begin)
    if not found:
        return None
    rest, laid = torch.cat(found), {}
    for axis in reversed(order):
        laid[axis] = rest % value.shape[axis]
        rest = rest // value.shape[axis]
    return tuple(laid[axis] for axis in range(value.dim()))


def any_below(message: Tensor, value: Tensor) -> bool:
    """Whether any of K messages `[K, *shape]` is not zero where a value `[*shape]` is negative."""
    if message.device.type != "cpu":
        return not torch.equal(message, where_not_below(message, value))
    order = _memory_order(value)
    below = value.permute(order).reshape(-1)
    for one in message:
        flat = one.permute(order).reshape(-1)
        for (_, m), (_, v) in zip(_pieces(flat), _pieces(below), strict=True):
            if not torch.equal(m, where_not_below(m, v)):
                return True
    return False


def where_not_below(message: Tensor, value: Tensor) -> Tensor:
    """The message where a value is not negative, zero elsewhere."""
    bound = -torch.finfo(value.dtype).tiny
    kept: Tensor = torch.ops.aten.threshold_backward(message, value.expand_as(message), bound)
    return kept


def _memory_order(tensor: Tensor) -> list[int]:
    """The axes as they lie in memory, the slowest first."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda axis: -strides[axis])


def _pieces(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    for begin in range(0, flat.numel(), _PIECE):
        yield begin, flat[begin : begin + _PIECE]
