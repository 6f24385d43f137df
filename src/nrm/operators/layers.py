"""The layers of networks: linear layers, convolutions and transposed convolutions.

First what convolutions need of their derivatives, by input and by weight; then their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from nrm.errors import UnsupportedOperatorError
from nrm.operators.call import Call
from nrm.operators.connections import Dense, Kernel, for_each_axis
from nrm.operators.propagation import Contribution, Setting, through_matrix
from nrm.operators.sums import WeightedSum
from nrm.rules import Activation, Rule
from nrm.tensors import per_channel

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
        self.stride, self.dilation = (
            for_each_axis(call[name], axes) for name in ("stride", "dilation")
        )
        self.output_padding = (
            for_each_axis(call["output_padding"], axes) if transposed else [0] * axes
        )
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
            return for_each_axis(padding, axes), []
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


# -- The weighted sums of convolutional and fully connected networks.


class Layer(WeightedSum):
    """Convolutions and linear layers: an input, a weight with output channels first, a bias."""

    affine = True
    passes = ("input",)
    is_layer = True
    applies_weights = True

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return call["bias"] is not None

    def acts_on_last_axis(self, call: Call) -> bool:
        return bool(call["weight"].meta["val"].dim() == 2)

    def factors(self, call: Call) -> Sequence[Any]:
        return [call["input"], call["weight"]] if self.acts_on_last_axis(call) else ()

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        return "padding" if _sees_only_padding(call) else None

    def check(self, call: Call, operands: Sequence[tuple[str, Node]], address: str) -> None:
        if call["weight"].meta["val"].dim() < 2:
            raise UnsupportedOperatorError(
                f"{call.target} at {address!r} has a weight of one axis. Give it a weight "
                "[1, inputs] and drop the axis afterwards."
            )

    def channel_axis(self, call: Call, inherited: int | None) -> int | None:
        return -self._channel_from_end(call["weight"].meta["val"])

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        x, weight = values[0], call["weight"]
        channel_axis = -self._channel_from_end(weight)
        groups = call.get("groups", 1)

        def apply(factor: Tensor, weight: Tensor) -> Tensor:
            output: Tensor = call(input=factor, weight=weight, bias=None)
            return output

        def uniform(factor: Tensor) -> Tensor:
            # All channels of a group give and get the same: add them up, and compute one.
            shape = (groups, 1, *weight.shape[2:])
            if groups == 1:
                return apply(factor.sum(channel_axis, keepdim=True), weight.new_ones(shape))
            added = torch.unflatten(factor, channel_axis, (groups, -1)).sum(channel_axis)
            return apply(added, weight.new_ones(shape)).repeat_interleave(
                weight.shape[0] // groups, channel_axis
            )

        if weight.dim() == 2:
            return [
                Contribution(
                    Activation(x),
                    setting.weight("weight", weight),
                    apply,
                    uniform,
                    torch.matmul,
                    transposes_anew=True,
                    by_channels=through_matrix,
                    keeps_sign=True,
                    connections=lambda output: Dense(weight),
                )
            ]
        convolution = Convolution(call)

        def transpose(message: Tensor, weight: Tensor) -> Tensor:
            return convolution.by_input(message, x, weight)

        return [
            Contribution(
                Activation(x),
                setting.weight("weight", weight),
                apply,
                uniform,
                transpose if x.dim() == weight.dim() else None,
                transposes_anew=True,
                by_channels=convolution.by_channels,
                keeps_sign=True,
                connections=partial(Kernel, call, x.shape),
            )
        ]

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        bias: Tensor | None = call["bias"]
        if bias is None:
            return None
        return per_channel(bias, dim, -self._channel_from_end(call["weight"]))

    def of_channels(self, call: Call, begin: int, end: int) -> Call | None:
        if call.get("groups", 1) != 1:
            return None
        weight: Tensor = call["weight"]
        changed = {"weight": weight[:, begin:end], "bias": None}
        return Call(call.target, call.arguments | changed, call.item)

    def mixed_axes(self, call: Call, dim: int) -> list[int] | None:
        """The axes of an operand of `dim` along which alone neurons are added up: those of the
        positions, where every channel has a kernel of its own; else `None`."""
        weight: Tensor = call["weight"].meta["val"]
        if weight.dim() <= 2 or weight.shape[1] != 1 or call["groups"] != weight.shape[0]:
            return None
        return list(range(dim - weight.dim() + 2, dim))

    @staticmethod
    def _channel_from_end(weight: Tensor) -> int:
        return max(weight.dim() - 1, 1)


def _sees_only_padding(call: Call) -> bool:
    """Whether some neuron of a convolution has its whole receptive field in the padding."""
    weight, x = call["weight"].meta["val"], call["input"].meta["val"]
    axes = weight.dim() - 2
    if axes <= 0 or isinstance(call["padding"], str):
        return False
    for axis in range(axes):
        size, kernel = x.shape[axis - axes], weight.shape[axis - axes]
        stride, padding, dilation = (
            call[name][axis if len(call[name]) > 1 else 0]
            for name in ("stride", "padding", "dilation")
        )
        if padding == 0 or not isinstance(size, int):
            continue
        last = size + 2 * padding - dilation * (kernel - 1) - 1
        for begin in range(-padding, last - padding + 1, stride):
            if not any(0 <= begin + dilation * k < size for k in range(kernel)):
                return True
    return False


# -- Transposed convolutions: weighted sums whose weight has the input channels first.


class TransposedConvolution(WeightedSum):
    """`conv_transpose1d` to `3d`. Where strides leave gaps, neurons have no parent but the bias."""

    affine = True
    passes = ("input",)
    applies_weights = True

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return call["bias"] is not None

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        return "gaps"

    def channel_axis(self, call: Call, inherited: int | None) -> int | None:
        weight: Tensor = call["weight"].meta["val"]
        return 1 - weight.dim()

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        weight = call["weight"]

        def apply(factor: Tensor, weight: Tensor) -> Tensor:
            output: Tensor = call(input=factor, weight=weight, bias=None)
            return output

        x, convolution = values[0], Convolution(call, transposed=True)

        def transpose(message: Tensor, weight: Tensor) -> Tensor:
            return convolution.by_input(message, x, weight)

        return [
            Contribution(
                Activation(x),
                setting.weight("weight", weight),
                apply,
                uniform=lambda factor: apply(factor, weight.new_ones(weight.shape)),
                transpose=transpose if x.dim() == weight.dim() else None,
                transposes_anew=True,
                by_channels=convolution.by_channels,
                keeps_sign=True,
                connections=partial(Kernel, call, x.shape, transposed=True),
            )
        ]

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        bias: Tensor | None = call["bias"]
        if bias is None:
            return None
        return per_channel(bias, dim, 1 - call["weight"].dim())


def plain_strides(x: Tensor) -> Tensor:
    """Channels last as operators recognise it also where the first axis has one element.

    Its stride says nothing then, and some operators leave one there at which others copy.
    """
    if x.dim() == 4 and len(x) == 1 and x.is_contiguous(memory_format=torch.channels_last):
        return x.as_strided(x.shape, (x.numel(), *x.stride()[1:]))
    return x
