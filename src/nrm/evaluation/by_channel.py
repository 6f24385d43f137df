"""From a removed channel to the next weighted sum, where no other channel changes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from nrm.evaluation.downstream import Replay
from nrm.evaluation.families import Family, Picked

Step = Callable[[Tensor], Tensor]
"""What is applied to a channel by itself."""
Added = Callable[[int, int, Tensor], Tensor]
"""The change of a weighted sum where the operand changes from one place to another."""


@dataclass(frozen=True, eq=False)
class ByChannel:
    """From sets of single channels of a layer to the next weighted sum.

    Up to there each channel is computed by itself, and the sum changes by what the one channel
    adds to it: nothing else needs to be computed again. What is left of the sum is as exact as the
    sum itself: where one channel outweighs all others, to the rounding of what it added.

    Attributes:
        node: of the layer; its first axis is that of copies, its second one of channels.
        total: the weighted sum.
        steps: what is applied to a channel in between.
        added: the change of the sum `[copies, ...]`, from where the sum's operand changes, and by
            what.
        channels: of each set.
        neurons: of a channel.
        begin, width: where the layer begins in the sum's operand, and what a channel takes there.
        each: bytes for one set of one copy.
    """

    node: Node
    total: Node
    steps: tuple[Step, ...]
    added: Added
    channels: tuple[int, ...]
    picked: Picked
    neurons: int
    begin: int
    width: int
    each: int

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
        return self.added(there, there + self.width, change)

    def _through(self, values: Tensor) -> Tensor:
        for step in self.steps:
            values = step(values)
        return values


def by_channel(
    replay: Replay, family: Family, others: Collection[Node], changed: Collection[Node]
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
    after = replay.changed_by([node])
    if not _has_channels(replay, node) or any(o in after for o in others if o is not node):
        return None
    shape = replay.values[node].shape
    neurons = shape[2:].numel()
    channels = _channels(picked, neurons)
    if channels is None:
        return None
    steps: list[Step] = []
    now, begin, width = node, 0, 1  # where the layer is along the axis, and of how many a channel
    while True:
        users = [user for user in now.users if user in after]
        if len(users) != 1 or not _has_channels(replay, users[0]):
            return None
        (user,) = users
        kind = str(user.target)
        others_read = [other for other in user.all_input_nodes if other is not now]
        if kind in _SUMS:
            if user.args[0] is not now or any(other in changed for other in others_read):
                return None
            add = _SUMS[kind](replay, user)
            if add is None:
                return None
            each = _bytes(replay.values[user], neurons)
            return ByChannel(
                node, user, tuple(steps), add, channels, picked, neurons, begin, width, each
            )
        if kind == "aten.cat.default":
            before = _before(replay, user, now)
            if before is None:
                return None
            begin += before
        elif others_read or not _is_by_channel(replay, user, now):
            return None
        else:
            steps.append(partial(_applied, user))
            if kind == _FLATTEN:
                size = replay.values[now].shape[2:].numel()
                begin, width = begin * size, width * size
        now = user


_FLATTEN = "aten.flatten.using_ints"
_BY_NEURON = ("relu", "sigmoid", "tanh", "gelu", "silu", "elu", "leaky_relu", "hardtanh", "clone")
_BY_PLANE = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")


def _has_channels(replay: Replay, node: Node) -> bool:
    """Whether the first axis is that of copies alone, and there is a second one."""
    value = replay.values[node]
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != 1:
        return False
    spread = replay.spreads.get(node)
    return spread is not None and spread[0].axis == 0


def _channels(picked: Picked, neurons: int) -> tuple[int, ...] | None:
    """The channel of each set; `None`: one has neurons of several channels, or none at all."""
    of = picked.index // neurons
    sets = len(picked.count)
    least = of.new_full((sets,), -1).scatter_reduce(0, picked.owner, of, "amin", include_self=False)
    most = of.new_full((sets,), -1).scatter_reduce(0, picked.owner, of, "amax", include_self=False)
    single = bool((least == most).all()) and bool((picked.count > 0).all())
    return tuple(least.tolist()) if single else None


def _is_by_channel(replay: Replay, node: Node, below: Node) -> bool:
    """Whether a node computes each channel of the one below by itself."""
    kind = str(node.target)
    if kind == _FLATTEN:
        return tuple(node.args[1:]) in ((1,), (1, -1)) and replay.values[node].dim() == 2
    name: str = kind.removeprefix("aten.").removesuffix(".default")
    if name == "dropout":
        return bool(node.args[2] is False)
    if name in _BY_PLANE:  # of three axes the first would be that of channels
        return bool(replay.values[below].dim() == 4)
    return name in _BY_NEURON


def _applied(node: Node, values: Tensor) -> Tensor:
    """What a node with one operand makes of other values."""
    target: Any = node.target
    found: Tensor = target(values, *node.args[1:], **node.kwargs)
    return found


def _bytes(total: Tensor, neurons: int) -> int:
    """What a channel and the sum take while they change."""
    return 3 * (total.numel() + neurons) * total.element_size()


def _before(replay: Replay, node: Node, operand: Node) -> int | None:
    """How much of a concatenation of channels stands before an operand."""
    tensors: Any
    tensors, *axis = node.args
    if node.kwargs or axis not in ([1], [1 - replay.values[node].dim()]):
        return None
    if list(tensors).count(operand) != 1:
        return None
    place = list(tensors).index(operand)
    return int(sum(replay.values[other].shape[1] for other in tensors[:place]))


def _convolution(replay: Replay, node: Node) -> Added | None:
    """How a convolution changes, where it mixes all channels."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.pop("groups", 1) != 1 or replay.values[node].dim() != 4:
        return None
    weight = replay.values[given["weight"]]
    options = {name: given[name] for name in ("stride", "padding", "dilation") if name in given}
    return lambda begin, end, change: F.conv2d(change, weight[:, begin:end], **options)


def _linear(replay: Replay, node: Node) -> Added | None:
    """How a linear layer changes."""
    if replay.values[node].dim() != 2:
        return None
    weight = replay.values[node.all_input_nodes[1]]
    return lambda begin, end, change: F.linear(change, weight[:, begin:end])


_SUMS = {"aten.conv2d.default": _convolution, "aten.linear.default": _linear}
