"""All combinations of sets of several families: each removed in turn, what is shared run once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.run import Values
from nrm.engine import in_chunks
from nrm.evaluation.channels import ByChannel, by_channel
from nrm.evaluation.removal import Family
from nrm.evaluation.rerun import Part, Rerun, gradients


@dataclass(frozen=True, eq=False)
class State:
    """Copies of the sample, each with a choice of sets removed, up to some place of the graph.

    Attributes:
        count: how many.
        values: of the changed nodes that are still read.
        chosen: for each family so far `[copies]`, the number of a set from one on, or zero.
    """

    count: int
    values: Values
    chosen: tuple[Tensor, ...]


class Combinations:
    """All combinations of sets of some families, those that are computed first being removed first.

    Arguments:
        removed: `[neurons]` of each node, what activations become when they are removed.
        output: `f_y(x)`.
        target: the number of the explained output among all of a sample.
        memory: bytes that copies may take.
        shortcuts: whether to leave out runs whose result is known without them.

    Attributes:
        affine: the last family's effects are sums over its neurons, found without runs.
    """

    def __init__(
        self,
        rerun: Rerun,
        families: Sequence[Family],
        removed: Mapping[Node, Tensor],
        output: Tensor,
        target: int,
        memory: int,
        shortcuts: bool = True,
    ) -> None:
        self.rerun, self.families, self.removed = rerun, families, removed
        self.output, self.target, self.shortcuts = output, target, shortcuts
        self.told: Callable[[int], None] = lambda done: None
        nodes = [list(family.picked) for family in families]
        self.begins = [min(self.rerun.place[node] for node in found) for found in nodes]
        self.changed = [
            self.rerun.changed_by({node for found in nodes[: level + 1] for node in found})
            for level in range(len(families))
        ]
        self.gradients = self._gradients(nodes) if self.shortcuts else None
        self.batched = all(
            self.rerun.copies.axis(node) is not None
            for node in (*self.removed, self.rerun.graph.explained)
        )
        self.channels = self._by_channel(nodes) if self.shortcuts else None
        self.parts = self._parts()
        self.memory = max(1, memory // len(families))

    @property
    def affine(self) -> bool:
        return self.gradients is not None

    @property
    def total(self) -> int:
        """How many combinations there are to find: the output itself is known."""
        known = not self.affine and len(self.families) == 1
        return math.prod(self._shape(0)) - known

    def effects(self, told: Callable[[int], None]) -> Tensor:
        """`[sets of the first family and none in front, ..., of the last]`.

        The output; where the last family is affine, what it loses without each of its sets, which
        has no entry for none.

        Arguments:
            told: how many combinations have just been found.
        """
        self.told = told
        return self._effects(0, State(1, {}, ()))[0]

    def _gradients(self, nodes: Sequence[Sequence[Node]]) -> dict[Node, Tensor] | None:
        others = {node for found in nodes[:-1] for node in found}
        return gradients(self.rerun, nodes[-1], others, self.target, self.removed)

    def _by_channel(self, nodes: Sequence[Sequence[Node]]) -> ByChannel | None:
        """How the channels of the last family lead on, where nothing else is needed."""
        if self.affine or not self.batched:
            return None
        others = {node for found in nodes[:-1] for node in found}
        found = by_channel(self.rerun, self.families[-1], others, self.changed[-1])
        if found is None:
            return None
        above = self._above(found)
        if above.changed != {found.total} or not others.isdisjoint(above.plan.nodes):
            return None  # something else enters, or is removed, after the weighted sum
        known = (self.rerun.values[found.node], self.removed[found.node])
        finite = all(bool(torch.isfinite(values).all()) for values in known)
        return found if finite else None  # infinity less infinity is not nothing

    def _above(self, found: ByChannel) -> Part:
        """What to compute after the weighted sum."""
        begin = self.rerun.place[found.total]
        return self.rerun.part({self.rerun.graph.explained}, self.changed[-1], begin, True)

    def _parts(self) -> list[Part]:
        """What to compute after the removal of each family, from the last back to the first."""
        wanted = {self.rerun.graph.explained}
        if self.channels is not None:
            wanted = {self.channels.total}
        if self.affine:
            before = self.changed[-2] if len(self.changed) > 1 else set()
            wanted = {node for node in self.families[-1].picked if node in before}
        parts: list[Part] = []
        levels = range(len(self.families) - self.affine)
        for level in reversed(levels):
            changed = self.changed[level]
            part = self.rerun.part(wanted, changed, self.begins[level], self.batched)
            parts.insert(0, part)
            # What comes before is to keep what this one reads of it, and what is removed here.
            before = self.changed[level - 1] if level else set()
            wanted = {node for node in part.changed if node in before}
            wanted |= {self._first(level)} & before
        return parts

    def _first(self, level: int) -> Node:
        """The node of a family that has been computed when its removal begins."""
        return self.rerun.order[self.begins[level]]

    # -- one family after the other --------------------------------------------------------------

    def _effects(self, level: int, state: State) -> Tensor:
        """`[copies, *effects of this family and those after it]`."""
        if self.affine and level == len(self.families) - 1:
            return self._sums(state)
        if self.channels is not None and level == len(self.families) - 1:
            return self._one_by_one(self.channels, state)
        last = level == len(self.families) - 1
        family, deeper = self.families[level], self._shape(level + 1)
        found = self.output.new_empty(state.count, len(family) + 1, *deeper)
        rows, sets, same = self._pairs(level, state)
        if last and not state.chosen:  # nothing removed at all: that is known
            found[0, 0] = self.output
            rows, sets = rows[1:], sets[1:]

        def work(chunk: Sequence[int]) -> None:
            part = slice(chunk[0], chunk[-1] + 1)
            after = self._removed(level, state, rows[part], sets[part])
            if last:
                output = after.values[self.rerun.graph.explained]
                values = self.rerun.copies.rows(self.rerun.graph.explained, output, after.count)
                found[rows[part], sets[part]] = values[:, self.target]
                self.told(after.count)
            else:
                found[rows[part], sets[part]] = self._effects(level + 1, after)

        each = self.parts[level].bytes + 2 * math.prod(deeper) * found.element_size()
        if self.channels is not None:  # of each copy the weighted sum is kept
            each += self.channels.bytes
        in_chunks(range(len(rows)), self.memory if self.batched else 1, each, work)
        if same is not None:
            found[same[0], same[1] + 1] = found[same[0], 0]
            self.told(len(same[0]) * math.prod(deeper))
        return found

    def _one_by_one(self, channels: ByChannel, state: State) -> Tensor:
        """`[copies, sets and none in front]`, by what each set adds to the next weighted sum.

        Pairs go set after set: all copies without the same channel are one small computation.
        """
        level, above = len(self.families) - 1, self._above(channels)
        found = self.output.new_empty(state.count, len(self.families[-1]) + 1)
        rows, sets, same = self._pairs(level, state)
        everywhere = self.rerun.values[channels.total]
        total = everywhere.new_empty(state.count, *everywhere.shape[1:])

        def sums(chunk: Sequence[int]) -> None:
            part = rows[chunk[0] : chunk[-1] + 1]
            after = self._removed(level, state, part, torch.zeros_like(part))
            total[part] = after.values[channels.total]

        in_chunks(range(state.count), self.memory, self.parts[level].bytes, sums)
        by_set = sets.argsort(stable=True)
        rows, sets = rows[by_set], sets[by_set]
        if not state.chosen:  # nothing removed at all: that is known
            found[0, 0] = self.output
            rows, sets = rows[1:], sets[1:]
        changed = channels.node in state.values
        layer = (state.values if changed else self.rerun.values)[channels.node]
        removed = self.removed[channels.node]
        output = self.rerun.graph.explained

        def work(chunk: Sequence[int]) -> None:
            part = slice(chunk[0], chunk[-1] + 1)
            values, begin = total[rows[part]], 0
            for number, count in _runs(sets[part]):
                some, begin = slice(begin, begin + count), begin + count
                if number:
                    at = rows[part][some]
                    at = at if changed else torch.zeros_like(at)
                    values[some] += channels.change(number - 1, layer, at, removed)
            base = torch.zeros_like(rows[part])
            after = self.rerun.compute(above, {channels.total: values}, base, None)
            outputs = self.rerun.copies.rows(output, after[output], len(base))
            found[rows[part], sets[part]] = outputs[:, self.target]
            self.told(len(base))

        in_chunks(range(len(rows)), self.memory, above.bytes + channels.bytes, work)
        if same is not None:
            found[same[0], same[1] + 1] = found[same[0], 0]
            self.told(len(same[0]))
        return found

    def _shape(self, level: int) -> list[int]:
        """The shape of the effects of a family and those after it."""
        sizes = [len(family) + 1 for family in self.families[level:]]
        if sizes and self.affine:
            sizes[-1] -= 1
        return sizes

    def _pairs(
        self, level: int, state: State
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Which sets are removed from which copies: none first, then those that change something.

        Returns:
            copies, sets from one on; and copies and sets, from zero on, where nothing changes.
        """
        family, device = self.families[level], self.output.device
        changing = self._changing(level, state) if self.shortcuts else None
        if changing is None:
            changing = torch.ones(state.count, len(family), dtype=torch.bool, device=device)
        copies, sets = changing.nonzero().unbind(1)
        none = torch.arange(state.count, device=device)
        same = (~changing).nonzero()
        return (
            torch.cat([none, copies]),
            torch.cat([torch.zeros_like(none), sets + 1]),
            (same[:, 0], same[:, 1]) if len(same) else None,
        )

    def _changing(self, level: int, state: State) -> Tensor | None:
        """`[copies, sets]`: where an activation differs from what it becomes; `None`: not known."""
        family = self.families[level]
        if level and len(family.picked) > 1:
            return None  # some of it is computed after the removal of the rest
        found = None
        for node, picked in family.picked.items():
            differs = self._rows(node, state) != self.removed[node]
            several = picked.sums(differs.to(self.output.dtype)) > 0
            found = several if found is None else found | several
        return None if found is None else found.expand(state.count, -1)

    def _rows(self, node: Node, state: State) -> Tensor:
        """`[copies, neurons]`, or one row where they are all alike."""
        if node in state.values:
            return self.rerun.copies.rows(node, state.values[node], state.count)
        return self.rerun.copies.rows(node, self.rerun.values[node], 1)

    def _removed(self, level: int, state: State, rows: Tensor, sets: Tensor) -> State:
        """Copies of copies without sets of a family, computed up to the next one."""
        rerun, part = self.rerun, self.parts[level]
        copies = rows if self.batched else None
        chosen = (*(known[rows] for known in state.chosen), sets)
        base = torch.zeros_like(rows) if self.batched else None
        entering: Values = {}
        for node in part.changed:
            if node in state.values:
                entering[node] = rerun.copied(node, state.values[node], copies)
            else:
                entering[node] = rerun.copied(node, rerun.values[node], base)
        first = self._first(level)
        if first in entering:
            entering[first] = self._put(level, first, entering[first], sets)

        def change(node: Node, value: Any) -> Any:
            for before in range(level + 1):
                if node in self.families[before].picked:
                    value = self._put(before, node, value, chosen[before])
            return value

        values = rerun.compute(part, entering, base, change)
        return State(len(rows), values, chosen)

    def _put(self, level: int, node: Node, value: Tensor, sets: Tensor) -> Tensor:
        """A value without the neurons of the sets of a family."""
        rows = self.rerun.copies.rows(node, value, len(sets)).clone()
        self.families[level].picked[node].put(rows, sets, self.removed[node])
        return self.rerun.copies.unrows(node, rows)

    def _sums(self, state: State) -> Tensor:
        """`[copies, sets]`, what the output loses without each set of the last family."""
        assert self.gradients is not None
        found = None
        for node, picked in self.families[-1].picked.items():
            change = (self._rows(node, state) - self.removed[node]).mul_(self.gradients[node])
            lost = picked.sums(change)
            found = lost if found is None else found + lost
        assert found is not None
        self.told(state.count * found.shape[1])
        return found.expand(state.count, -1)


def _runs(sets: Tensor) -> list[tuple[int, int]]:
    """Numbers that follow each other, and how often each does."""
    numbers, counts = torch.unique_consecutive(sets, return_counts=True)
    return list(zip(numbers.tolist(), counts.tolist(), strict=True))
