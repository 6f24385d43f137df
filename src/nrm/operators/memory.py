"""How tensors lie in memory: what may be overwritten, and what reads it with the least effort."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Coordinates = tuple[Tensor, ...]
"""Neurons, by one tensor of indices for each axis."""

_PIECE = 2**18  # elements: what is computed on the way stays in the cache


def dense(tensor: Tensor) -> bool:
    """Whether no two elements are in the same memory, so that what owns it may write to it.

    It says nothing of others that see this memory: those that were sliced from it, for one.
    """
    return all(
        stride or size == 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def sum_to(message: Tensor, shape: torch.Size) -> Tensor:
    """`[K, *output]` summed over the axes where `shape` has one column for all."""
    axes = [
        axis for axis, size in enumerate(shape, start=1) if size == 1 and message.shape[axis] > 1
    ]
    return message.sum(axes, keepdim=True) if axes else message


def plain_strides(x: Tensor) -> Tensor:
    """Channels last as operators recognise it also where the first axis has one element.

    Its stride says nothing then, and some operators leave one there at which others copy.
    """
    if x.dim() == 4 and len(x) == 1 and x.is_contiguous(memory_format=torch.channels_last):
        return x.as_strided(x.shape, (x.numel(), *x.stride()[1:]))
    return x


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
