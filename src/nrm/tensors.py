"""What the library needs of tensors beyond torch: types and axes, derivatives, threads, precision.

`torch.as_tensor(0.7)` is of single precision whatever it meets later, so that a double model loses
half its digits. Whatever a user gives, and whatever constant a graph holds, comes through `like`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nrm.errors import InputError, NrmError


def like(value: Any, reference: Tensor) -> Tensor:
    """A number, array or tensor with the type of `reference`, on its device.

    Python numbers, lists and arrays go there at once, without a detour over single precision.
    """
    return torch.as_tensor(value, dtype=reference.dtype, device=reference.device)


def for_all_samples(value: Tensor, x: Tensor, batch_axis: int | None) -> Tensor:
    """A value given for an input, as large as it; what has an axis less is one sample for all.

    Arguments:
        x: the input.
        batch_axis: where its samples lie; `None`: all of it is one.

    Raises:
        RuntimeError: it does not broadcast.
    """
    if batch_axis and value.dim() == x.dim() - 1:
        value = value.unsqueeze(batch_axis)
    return value.expand(x.shape)


def per_channel(value: Tensor, dim: int, axis: int = 1) -> Tensor:
    """`[channels]` with `dim` axes, broadcastable to a tensor with its channels along `axis`."""
    axis %= dim
    return value.view((1,) * axis + (-1,) + (1,) * (dim - 1 - axis))


def aligned(value: Tensor, dim: int) -> Tensor:
    """A tensor with `dim` axes, its own at the end, as it broadcasts."""
    return value.view((1,) * (dim - value.dim()) + tuple(value.shape))


def not_finite(model: nn.Module) -> str | None:
    """The first parameter or buffer of a model that holds NaN or infinite values, if one does."""
    held = chain(
        (("parameter", *each) for each in model.named_parameters()),
        (("buffer", *each) for each in model.named_buffers()),
    )
    for kind, name, value in held:
        if not value.is_floating_point():
            continue
        if bool(value.isnan().any()):
            return f"the model's {kind} {name!r} holds NaN values"
        masks = kind == "buffer" and not bool((value == torch.inf).any())  # with -inf, as they do
        if not masks and not bool(torch.isfinite(value).all()):
            return f"the model's {kind} {name!r} holds infinite values"
    return None


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
        kind, cure = f"sparse ({x.layout})", "give x.to_dense(); of a graph's edges, edge_index"
    elif x.is_quantized:
        kind, cure = f"quantised ({x.dtype})", "give x.dequantize()"
    elif x.is_meta:
        kind, cure = "on the meta device, where tensors hold no values", "give it values"
    else:
        return
    raise error(f"{what} is {kind}, and is to be a dense tensor: {cure}.")


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


# -- How PyTorch computes: threads, and how precisely.


@contextmanager
def one_thread() -> Iterator[None]:
    """More threads gain a small network nothing, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """Single precision as it is: without the shorter mantissa (TF32) of some GPUs.

    torch takes it for convolutions there unless told otherwise. Relevance divides what one
    convolution adds up by what another does, and totals would be off in the third digit. The
    setting is the process's: it is put back.
    """
    switches = _switches()
    before = [get() for get, _, _ in switches]
    for (_, put, full), was in zip(switches, before, strict=True):
        if was != full:
            put(full)
    try:
        yield
    finally:
        for (_, put, full), was in zip(switches, before, strict=True):
            if was != full:
                put(was)


Switch = tuple[Callable[[], Any], Callable[[Any], None], Any]
"""What says how precise some products are, what sets it, and the full precision."""


def _switches() -> list[Switch]:
    """Those of torch's ways to say so that it was told by: it refuses to read the other then."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    legacy = [_switch(cudnn, "allow_tf32", False), _switch(cuda.matmul, "allow_tf32", False)]
    try:
        for get, _, _ in legacy:
            get()
    except RuntimeError:  # since torch 2.9
        holders: list[Any] = [cudnn.conv, cudnn.rnn, cuda.matmul]  # type: ignore[attr-defined]
        return [_switch(holder, "fp32_precision", "ieee") for holder in holders]
    return legacy


def _switch(holder: Any, name: str, full: Any) -> Switch:
    return partial(getattr, holder, name), partial(setattr, holder, name), full
