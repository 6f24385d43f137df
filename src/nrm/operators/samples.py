"""Where the samples of a batch lie in what an operator computes.

Models merge the batch with other axes and move it about: attention with its heads, layers with the
positions. Sizes alone do not tell `[batch * time]` from `[time * batch]`; the operators on the way
do. Sizes are numbers here; where a graph is for any batch, those for one of an odd size (`MANY`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nrm.operators.call import Call

MANY = 10_007
"""A batch whose size, a prime, no other axis has."""


@dataclass(frozen=True)
class Samples:
    """Where the samples lie in a tensor.

    Attributes:
        axis: the axis that holds them.
        before, after: how many of a sample's neurons share it, that count slower and faster than
            the samples: its size is `before * batch * after`. One each where the samples have it
            for themselves.
    """

    axis: int
    before: int = 1
    after: int = 1


Shape = Sequence[int]


def in_place(at: Samples, read: Shape, shape: Shape, axis: int | None = None) -> Samples | None:
    """Samples that stay in their axis, or come to lie in another as they are.

    Arguments:
        at: where they lie in an operand.
        read, shape: of the operand and of the result.
    """
    axis = at.axis if axis is None else axis
    alike = 0 <= axis < len(shape) and shape[axis] == read[at.axis]
    return replace(at, axis=axis) if alike else None


def broadcast(at: Samples, read: Shape, shape: Shape) -> Samples | None:
    """Samples of an operand to which the result may have added axes in front."""
    return in_place(at, read, shape, at.axis + len(shape) - len(read))


def without(at: Samples, read: Shape, shape: Shape, along: Sequence[int]) -> Samples | None:
    """Samples that lie along none of the axes where something is done; these may be gone."""
    if at.axis in along:
        return None
    if len(shape) == len(read):
        return in_place(at, read, shape)
    if len(shape) != len(read) - len(along):
        return None
    return in_place(at, read, shape, at.axis - sum(axis < at.axis for axis in along))


def reshaped(at: Samples, read: Shape, shape: Shape) -> Samples | None:
    """Samples of a tensor whose neurons keep their order: as many follow each as before."""
    batch = read[at.axis] // (at.before * at.after)
    following = at.after * math.prod(read[at.axis + 1 :])
    for axis in reversed(range(len(shape))):
        if shape[axis] % (following * batch) == 0 and shape[axis] > following:
            return Samples(axis, shape[axis] // (following * batch), following)
        if not shape[axis] or following % shape[axis]:
            return None  # the samples are spread over several axes
        following //= shape[axis]
    return None


def moved(call: Call, at: Samples, read: Shape, shape: Shape) -> Samples | None:
    """Where samples lie that an operator moves; `None` where it is not known.

    Arguments:
        call: on graph nodes.
    """
    how = _MOVES.get(getattr(call.target, "overloadpacket", None))
    return None if how is None else how(call, at, read, shape)


_Moves = Callable[[Call, Samples, Shape, Shape], Samples | None]


def _permuted(call: Call, at: Samples, read: Shape, shape: Shape) -> Samples | None:
    if "dims" in call.arguments:
        order = [int(axis) % len(read) for axis in call["dims"]]
    else:
        order = list(range(len(read)))
        one, other = (int(call[name]) % len(read) for name in call.arguments if name != "self")
        order[one], order[other] = order[other], order[one]
    return in_place(at, read, shape, order.index(at.axis))


def _along(call: Call, at: Samples, read: Shape, shape: Shape) -> Samples | None:
    """What is done along some axes, which the result may have no more."""
    return without(at, read, shape, axes(call, len(read)))


def axes(call: Call, dim: int) -> list[int]:
    """The axes along which a call says that something is done: all, where it names none."""
    told = call.get("dim", call.get("dims"))
    several = (
        range(dim) if told is None or told == [] else [told] if isinstance(told, int) else told
    )
    return [int(axis) % dim for axis in several]


def _last(count: int) -> _Moves:
    """What is done along the last axes."""
    return lambda call, at, read, shape: without(
        at, read, shape, range(len(read) - count, len(read))
    )


def _stacked(call: Call, at: Samples, read: Shape, shape: Shape) -> Samples | None:
    return in_place(at, read, shape, at.axis + (int(call["dim"]) % len(shape) <= at.axis))


_ATEN = torch.ops.aten
_MOVES: dict[Any, _Moves] = {}
for _how, _names in (
    (
        lambda call, at, read, shape: reshaped(at, read, shape),
        "view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as reshape_as ravel",
    ),
    (
        lambda call, at, read, shape: broadcast(at, read, shape),
        "expand expand_as where masked_fill maximum minimum fmax fmin",
    ),
    (
        lambda call, at, read, shape: in_place(at, read, shape),
        "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d "
        "replication_pad2d upsample_nearest1d upsample_nearest2d",
    ),
    (_permuted, "permute transpose swapaxes swapdims"),
    (
        _along,
        "slice narrow split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk select "
        "unbind cat flip amax amin topk sort gather index_select",
    ),
    (_stacked, "stack"),
    (_last(1), "max_pool1d adaptive_max_pool1d"),
    (_last(2), "max_pool2d adaptive_max_pool2d tril triu"),
    (_last(3), "max_pool3d adaptive_max_pool3d"),
):
    _MOVES |= {getattr(_ATEN, name): _how for name in _names.split()}
