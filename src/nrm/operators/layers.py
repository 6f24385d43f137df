"""The weighted sums of convolutional and fully connected networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.like import like
from nrm.operators.base import Propagation, Setting, Slot, fill
from nrm.operators.call import Call
from nrm.operators.connections import Dense, Kernel, OneParent
from nrm.operators.contribution import Contribution
from nrm.operators.convolutions import Convolution
from nrm.operators.identity import Unchanged
from nrm.operators.weighted_sum import WeightedSum
from nrm.rules import Activation, Rule


class Layer(WeightedSum):
    """Convolutions and linear layers: an input, a weight with output channels first, a bias."""

    passes = ("input",)

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return call["bias"] is not None

    def acts_on_last_axis(self, call: Call) -> bool:
        return bool(call["weight"].meta["val"].dim() == 2)

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
        after = self._channel_from_end(call["weight"]) - 1
        return bias.view((1,) * (dim - 1 - after) + (-1,) + (1,) * after)

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


def through_matrix(x: Tensor, weight: Tensor | None, share: Tensor) -> Tensor:
    """`w_ij x_i share_j` of each two channels, for a weight `[outputs, inputs]`; added up over all
    other axes."""
    passed = share.reshape(-1, share.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
    return passed if weight is None else passed.mul_(weight)


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


class Elementwise(WeightedSum):
    """A weighted sum with at most one parent per neuron and operand; alone it is an identity."""

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        if len(values) == 1 and setting.late_leaf is None:
            with torch.no_grad():
                output = fill(call, values)()
            return output, Unchanged(values[0].shape, output.shape)
        return super().prepare(call, values, setting)


class Sum(Elementwise):
    """Addition and subtraction of tensors; all operands are normalised jointly."""

    passes = ("self", "other")

    def __init__(self, kind: str, signs: Callable[[Call], tuple[float, float]]) -> None:
        super().__init__(kind)
        self.signs = signs

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        if len(operands) > 1:
            return False
        signs = zip(self.passes, self.signs(call), strict=True)
        return all(sign != 0 for name, sign in signs if name != operands[0][0])

    def adds(self, call: Call, name: str) -> bool:
        return name in self.passes

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        alike = all(value.shape == values[0].shape for value in values)
        parts = []
        for name, sign in zip(("self", "other"), self.signs(call), strict=True):
            if isinstance(call[name], Slot):
                x = values[call[name].index]
                w = setting.weight(name, like(sign, x))
                parts.append(
                    Contribution(
                        Activation(x),
                        w,
                        apply=torch.mul,
                        # A sign of zero, as in `x.add(y, alpha=0)`, connects nothing.
                        uniform=partial(torch.mul, other=0.0) if sign == 0 else _itself,
                        transpose=torch.mul if alike and len(values) > 1 else None,
                        transposes_anew=True,
                        operand=call[name].index,
                        keeps_sign=True,
                        connections=partial(OneParent, w.value, x.shape),
                    )
                )
        return parts

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        for name, sign in zip(("self", "other"), self.signs(call), strict=True):
            if sign != 0 and not isinstance(call[name], Slot):
                given, x = call[name], values[0]
                # Before it is multiplied: integers and Python numbers have no precision to keep.
                kind = torch.result_type(x, given) if isinstance(given, Tensor) else x.dtype
                constant = like(given, x.new_empty((), dtype=kind)) * sign
                return constant.view((1,) * (dim - constant.dim()) + tuple(constant.shape))
        return None


def _itself(factor: Tensor) -> Tensor:
    return factor
