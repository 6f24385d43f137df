"""The derivatives of convolutions and transposed convolutions, by their input and their weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nrm.operators.call import Call
from nrm.operators.memory import plain_strides

_MANY = 64
"""From so many channels on it is worth to look for those that hold nothing."""


class Convolution:
    """A convolution of any dimension as its derivatives see it.

    Arguments:
        call: the operator's call.
        transposed: whether it is the transpose of a convolution.
    """

    def __init__(self, call: Call, transposed: bool = False) -> None:
        self.weight: Tensor = call["weight"]
        self.transposed, self.groups = transposed, int(call["groups"])
        axes = self.weight.dim() - 2
        self.stride, self.dilation = (_each(call[name], axes) for name in ("stride", "dilation"))
        self.output_padding = _each(call["output_padding"], axes) if transposed else [0] * axes
        self.padding, self.margins = self._padding(call["padding"])

    def by_input(self, message: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The transpose: `[K, *output]` to `[K, *x]`, all messages as one batch."""
        message, weight = self._where_held(message, weight)
        many = len(message)
        shape = [*x.shape[:2], *self._padded(x)]
        if many > 1 or self.margins:
            x = x.new_empty(()).expand(many * shape[0], *shape[1:])  # only its shape is read
        one = message.flatten(0, 1) if many > 1 else message[0]
        gradient = self._backward(one, x, weight, [True, False, False])[0]
        for axis, (before, after) in enumerate(self.margins, start=2):
            gradient = gradient.narrow(axis, before, gradient.shape[axis] - before - after)
        if many == 1:
            return plain_strides(gradient).unsqueeze(0)
        return torch.unflatten(gradient, 0, (many, shape[0]))

    def _where_held(self, message: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Messages and weight without the channels where no message holds anything."""
        if self.groups > 1 or self.transposed or message.requires_grad:
            return message, weight
        held = _held(message, 2)
        if held is None:
            return message, weight
        return message.index_select(2, held), weight.index_select(0, held)

    def by_channels(self, x: Tensor, weight: Tensor | None, share: Tensor) -> Tensor:
        """`w_ij x_i share_j` of each two channels: the gradient by the weight, times the weight.

        Arguments:
            x, share: of one sample, like the input and the output.
            weight: in place of the convolution's own; `None`: one everywhere.

        Returns:
            `[outputs, inputs]`.
        """
        if x.dim() < self.weight.dim():
            x, share = x.unsqueeze(0), share.unsqueeze(0)
        held = None
        if self.groups == 1 and not self.transposed:
            held = _held(share, 1)
        if held is not None:
            outputs = share.shape[1]
            share = share.index_select(1, held)
            weight = None if weight is None else weight.index_select(0, held)
        if self.margins:
            x = F.pad(x, [side for pair in reversed(self.margins) for side in pair])
        like = self.weight if held is None else self.weight[: len(held)]
        passed = self._backward(share, x.contiguous(), like, [False, True, False])[1]
        joined = (passed if weight is None else passed.mul_(weight)).flatten(2).sum(2)
        if self.groups > 1:
            blocks = torch.unflatten(joined, 0, (self.groups, -1))
            joined = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        if held is not None:
            return joined.new_zeros((outputs, joined.shape[1])).index_copy_(0, held, joined)
        return joined.mT if self.transposed else joined

    def _backward(
        self, message: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
    ) -> Sequence[Tensor]:
        found: Sequence[Tensor] = torch.ops.aten.convolution_backward(
            message,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            wanted,
        )
        return found

    def _padding(self, padding: str | Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The padding of every axis, and what the input is padded by before, where sides differ."""
        axes = self.weight.dim() - 2
        if not isinstance(padding, str):
            return _each(padding, axes), []
        if padding == "valid":
            return [0] * axes, []
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        if all(r % 2 == 0 for r in reach):
            return [r // 2 for r in reach], []
        return [0] * axes, [(r // 2, r - r // 2) for r in reach]

    def _padded(self, x: Tensor) -> list[int]:
        """The sizes of an input's positions with its margins."""
        sizes = list(x.shape[2:])
        for axis, (before, after) in enumerate(self.margins):
            sizes[axis] += before + after
        return sizes


def _held(message: Tensor, axis: int) -> Tensor | None:
    """The channels that hold anything, if they are few: after a mask nearly all hold nothing.

    Looking costs as much as a fraction of a channel.
    """
    channels = message.shape[axis]
    if channels < _MANY:
        return None
    others = [other for other in range(message.dim()) if other != axis]
    held = message.abs().amax(others).nonzero()[:, 0]
    return held if 0 < len(held) <= channels // 2 else None


def _each(setting: Sequence[int], axes: int) -> list[int]:
    """One number for each axis."""
    return list(setting) * (axes if len(setting) == 1 else 1)
