"""Transposed convolutions: weighted sums whose weight has the input channels first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.fx import Node

from nrm.operators.base import Setting
from nrm.operators.call import Call
from nrm.operators.connections import Kernel
from nrm.operators.contribution import Contribution
from nrm.operators.convolutions import Convolution
from nrm.operators.weighted_sum import WeightedSum
from nrm.rules import Activation, Rule


class TransposedConvolution(WeightedSum):
    """`conv_transpose1d` to `3d`. Where strides leave gaps, neurons have no parent but the bias."""

    passes = ("input",)

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
        after = call["weight"].dim() - 2
        return bias.view((1,) * (dim - 1 - after) + (-1,) + (1,) * after)
