"""From a removed channel to the next weighted sum, where no other channel changes.

Up to there each channel is computed by itself, and the sum changes by what the one channel adds to
it: nothing else needs to be computed again. What is left of the sum is as exact as the sum itself:
where one channel outweighs all others, to the rounding of what it added.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import Node

from nrm.evaluation.removal import Family, Picked
from nrm.evaluation.rerun import Rerun
from nrm.graph import Operation
from nrm.operators import Call, Operator, fill, standard

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ByChannel:
    """From sets of single channels of a layer to the next weighted sum.

    Attributes:
        node: of the layer; its first axis is that of copies, its second one of channels.
        total: the weighted sum.
        functions: what is applied to a channel in between.
        added: what channels of the sum's operand, from one to another, add to it.
        channels: of each set.
        picked: the neurons of each set.
        neurons: of a channel.
        begin, width: where the layer begins in the sum's operand, and what a channel takes there.
        bytes: for one set of one copy.
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
        """What is added to the sum when a set is removed, `[rows, ...]`.

        Arguments:
            number: of the set, from zero on.
            values: of the layer, `[copies, channels, ...]`.
            rows: which copies.
            removed: `[neurons]`, what activations become.
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
