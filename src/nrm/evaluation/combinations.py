"""All combinations of sets of several families: each removed in turn, what is shared run once.

Where single channels are removed, each channel is computed by itself up to the next weighted sum,
which changes by what the one channel adds to it: nothing else needs to be computed again. What is
left of the sum is as exact as the sum itself: where one channel outweighs all others, to the
rounding of what it added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.run import Values
from nrm.engine import in_chunks
from nrm.evaluation.rerun import Family, Part, Picked, Rerun, gradients
from nrm.graph import Operation
from nrm.operators import Call, Operator, fill, standard

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ByChannel:
    """From sets of single channels of a layer to the next weighted sum.

    Attributes:
        node: the layer's node; its first axis is that of copies, its second that of channels.
        total: the node of the weighted sum.
        functions: the functions applied to a channel between the layer and the sum.
        added: `added(begin, end)` is the function from channels `begin` to `end` of the sum's
            operand to what they add to the sum.
        channels: the channel that each set lies in.
        picked: the neurons of each set.
        neurons: how many neurons a channel has.
        begin, width: at which channel of the sum's operand the layer begins, and how many channels
            of the operand one of the layer's takes.
        bytes: memory that one set of one copy needs.
    """

    node: Node
    total: Node
    functions: tuple[Function, ...]
    added: Callable[[int, int], Function]
    channels: tuple[int, ...]
    picked: Picked
    neurons: int
    begin: int
    width: int
    bytes: int

    def change(self, number: int, values: Tensor, rows: Tensor, removed: Tensor) -> Tensor:
        """How the sum changes when a set is removed: `[rows, ...]`.

        Arguments:
            number: which set, from zero on.
            values: the layer's values, `[copies, channels, ...]`.
            rows: which copies.
            removed: `[neurons]`, what removed activations become.
        """
        channel = self.channels[number]
        begin = int(self.picked.begin[number])
        index = self.picked.index[begin : begin + int(self.picked.count[number])]
        before = values[rows, channel : channel + 1]
        after = before.reshape(len(rows), -1).clone()
        after[:, index - channel * self.neurons] = removed[index]
        there = self.begin + channel * self.width
        change = self._through(after.view_as(before)) - self._through(before)
        return self.added(there, there + self.width)(change)

    def _through(self, values: Tensor) -> Tensor:
        for function in self.functions:
            values = function(values)
        return values


def by_channel(
    rerun: Rerun, family: Family, others: Collection[Node], changed: Collection[Node]
) -> ByChannel | None:
    """The way from a family to the next weighted sum.

    Arguments:
        others: nodes of the families below.
        changed: by all families.

    Returns:
        `None` where sets are not of single channels, or there is another way to the output.
    """
    if len(family.picked) > 1:
        return None
    ((node, picked),) = family.picked.items()
    after = rerun.changed_by([node])
    if not _has_channels(rerun, node) or any(o in after for o in others if o is not node):
        return None
    neurons = rerun.values[node].shape[2:].numel()
    channels = _channels(picked, neurons)
    if channels is None:
        return None
    functions: list[Function] = []
    now, begin, width = node, 0, 1  # where the layer is along the axis, and of how many a channel
    while True:
        reader = _only_reader(rerun, now, after)
        if reader is None:
            return None
        operation, row = reader
        call, user = operation.call, operation.output.node
        assert user is not None
        value, below = rerun.values[user], rerun.values[now]
        others_read = [other for other in user.all_input_nodes if other is not now]
        if row.adds_up and row.is_layer:
            added = _added(rerun, operation, row) if operation.slots == (now,) else None
            if added is None or any(other in changed for other in others_read):
                return None
            bytes = 3 * (value.numel() + neurons) * value.element_size()  # while they change
            found = tuple(functions)
            return ByChannel(
                node, user, found, added, channels, picked, neurons, begin, width, bytes
            )
        if row.joined_axis(call, value.dim()) == 1:
            operands = [operand for _, operand in call.nodes()]
            if operands.count(now) != 1:
                return None
            before = operands[: operands.index(now)]
            begin += sum(int(rerun.values[operand].shape[1]) for operand in before)
        elif others_read:
            return None
        elif row.keeps_order(call) and value.dim() == 2:
            size = below.shape[2:].numel()
            begin, width = begin * size, width * size
            functions.append(_flat)
        elif row.acts_by_channel(call, below.dim()):
            functions.append(partial(_applied, call))
        else:
            return None
        now = user


def _has_channels(rerun: Rerun, node: Node) -> bool:
    """Whether the first axis is that of copies alone, and there is a second one."""
    value = rerun.values[node]
    one = isinstance(value, Tensor) and value.dim() >= 2 and len(value) == 1
    return one and rerun.copies.axis(node) == 0


def _channels(picked: Picked, neurons: int) -> tuple[int, ...] | None:
    """The channel of each set; `None`: one has neurons of several channels, or none at all."""
    of = picked.index // neurons
    sets = len(picked.count)
    least = of.new_full((sets,), -1).scatter_reduce(0, picked.owner, of, "amin", include_self=False)
    most = of.new_full((sets,), -1).scatter_reduce(0, picked.owner, of, "amax", include_self=False)
    single = bool((least == most).all()) and bool((picked.count > 0).all())
    return tuple(least.tolist()) if single else None


def _only_reader(
    rerun: Rerun, node: Node, after: Collection[Node]
) -> tuple[Operation, Operator] | None:
    """The one operation on the way to the output that reads a node, and the row of its operator."""
    users = [user for user in node.users if user in after]
    if len(users) != 1 or not _has_channels(rerun, users[0]):
        return None
    variable = rerun.graph.by_node.get(users[0])
    operation = None if variable is None else variable.producer
    row = None if operation is None else standard(operation.call)
    return None if operation is None or row is None else (operation, row)


def _added(
    rerun: Rerun, operation: Operation, row: Operator
) -> Callable[[int, int], Function] | None:
    """How a layer's sum changes where some channels of its operand do."""
    call = operation.call.with_values(operation.arguments, rerun.values.__getitem__)
    if call["weight"].dim() != rerun.values[operation.slots[0]].dim():
        return None  # the second axis is not that of channels
    if row.of_channels(call, 0, 1) is None:
        return None

    def added(begin: int, end: int) -> Function:
        part = row.of_channels(call, begin, end)
        assert part is not None
        return partial(_on, part)

    return added


def _on(call: Call, value: Tensor) -> Tensor:
    """What a call with one slot gives for a value."""
    found: Tensor = fill(call, [value])()
    return found


def _applied(call: Call, values: Tensor) -> Tensor:
    """What a call that reads one node gives for other values of it."""

    def substitute(leaf: Any) -> Any:
        return values if isinstance(leaf, Node) else leaf

    found: Tensor = call.map(substitute)()
    return found


def _flat(values: Tensor) -> Tensor:
    return values.flatten(1)


# -- all combinations ------------------------------------------------------------------------------


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
    """The effects of removing one set (or none) of each of several families, in all combinations.

    Families go in the order in which the network computes them: what lies below the sets that
    differ is run once and shared.

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
        self.advance: Callable[[int], None] = lambda done: None
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

    def effects(self, advance: Callable[[int], None]) -> Tensor:
        """The output for every combination of removed sets, one set or none of each family.

        `[1 + sets of the first family, ..., 1 + sets of the last]`: along every axis place 0 is
        for "none removed", place s + 1 for set s. Where the last family is `affine`, the result is
        how much the output loses without each of its sets, and the last axis has no place for none.

        Arguments:
            advance: how many combinations have just been found.
        """
        self.advance = advance
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
                self.advance(after.count)
            else:
                found[rows[part], sets[part]] = self._effects(level + 1, after)

        each = self.parts[level].bytes + 2 * math.prod(deeper) * found.element_size()
        if self.channels is not None:  # of each copy the weighted sum is kept
            each += self.channels.bytes
        in_chunks(range(len(rows)), self.memory if self.batched else 1, each, work)
        if same is not None:
            found[same[0], same[1] + 1] = found[same[0], 0]
            self.advance(len(same[0]) * math.prod(deeper))
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
            self.advance(len(base))

        in_chunks(range(len(rows)), self.memory, above.bytes + channels.bytes, work)
        if same is not None:
            found[same[0], same[1] + 1] = found[same[0], 0]
            self.advance(len(same[0]))
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
        later = {node for other in self.families[level + 1 :] for node in other.picked}
        woken = {n for node in later for n in self.rerun.changed_by({node}) - {node}}
        if not woken.isdisjoint(family.picked):
            return None  # what is silent now may not be once a later family is removed
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
        self.advance(state.count * found.shape[1])
        return found.expand(state.count, -1)


def _runs(sets: Tensor) -> list[tuple[int, int]]:
    """Numbers that follow each other, and how often each does."""
    numbers, counts = torch.unique_consecutive(sets, return_counts=True)
    return list(zip(numbers.tolist(), counts.tolist(), strict=True))
