"""What the library needs of tensors beyond torch: types and axes, memory, derivatives, threads.

`torch.as_tensor(0.7)` is of single precision whatever it meets later, so that a double model loses
half its digits. Whatever a user gives, and whatever constant a graph holds, comes through `like`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nrm.errors import InputError, NrmError


def like(value: Any, reference: Tensor) -> Tensor:
    """A number, array or tensor with the type of `reference`, on its device.

    Python numbers, lists and arrays go there at once, without a detour over single precision.
    """
    return torch.as_tensor(value, dtype=reference.dtype, device=reference.device)


def per_channel(value: Tensor, dim: int, axis: int = 1) -> Tensor:
    """`[channels]` with `dim` axes, broadcastable to a tensor with its channels along `axis`."""
    axis %= dim
    return value.view((1,) * axis + (-1,) + (1,) * (dim - 1 - axis))


def aligned(value: Tensor, dim: int) -> Tensor:
    """A tensor with `dim` axes, its own at the end, as it broadcasts."""
    return value.view((1,) * (dim - value.dim()) + tuple(value.shape))


def check_dense(x: Tensor, what: str, error: type[NrmError] = InputError) -> None:
    """Refuse a tensor whose elements are not all there, each a number of its own.

    Arguments:
        what: it is called in the message.
        error: what to raise.

    Raises:
        NrmError: says what it is, and how to make a dense tensor of it.
    """
    if x.is_nested:
        kind, cure = "nested", "give torch.nested.to_padded_tensor(x, 0.0), and the model a mask"
    elif x.is_mkldnn:
        kind, cure = "in MKL-DNN's layout", "give x.to_dense()"
    elif x.layout is not torch.strided:
        kind, cure = f"sparse ({x.layout})", "give x.to_dense()"
    elif x.is_quantized:
        kind, cure = f"quantised ({x.dtype})", "give x.dequantize()"
    elif x.is_meta:
        kind, cure = "on the meta device, where tensors hold no values", "give it values"
    else:
        return
    raise error(f"{what} is {kind}, and is to be a dense tensor: {cure}.")


# -- How tensors lie in memory: what may be overwritten, and what reads it with the least effort.

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


# -- Values as they are, with derivatives of another size: what relevance over value passes by.
# The values are those of the operators themselves, to the last bit: where something cancels to zero
# for messages it does so for derivatives, and the two ways (`nrm.telescope`) agree.


def gradient_share(value: Tensor, share: float) -> Tensor:
    """`value`, through which derivatives pass times `share`: how a factor takes its alpha."""
    if share == 1 or not value.requires_grad:
        return value
    if share == 0:
        return value.detach()
    return with_slope(value, value, share)


def with_slope(x: Tensor, output: Tensor, slope: Tensor | float) -> Tensor:
    """`output`, through which derivatives pass to `x` times `slope`."""
    shown: Tensor = _Slope.apply(x, output, slope)  # type: ignore[no-untyped-call]
    return shown


def with_transpose(x: Tensor, output: Tensor, transpose: Callable[[Tensor], Tensor]) -> Tensor:
    """`output`, through which derivatives pass to `x` by a linear map."""
    shown: Tensor = _Transpose.apply(x, output, transpose)  # type: ignore[no-untyped-call]
    return shown


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


class _Slope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, output: Tensor, slope: Tensor | float) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | float], output: Tensor
    ) -> None:
        ctx.slope = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient * ctx.slope, None, None


class _Transpose(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, output: Tensor, transpose: Callable[[Tensor], Tensor]) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Callable[[Tensor], Tensor]], output: Tensor
    ) -> None:
        ctx.transpose = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.transpose(gradient), None, None


# -- How many threads PyTorch computes with.


@contextmanager
def one_thread() -> Iterator[None]:
    """More threads gain a small network nothing, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
