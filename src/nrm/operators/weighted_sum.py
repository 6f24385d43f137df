"""Weighted sums: the operators where a contribution rule decides how a message is shared out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nrm.operators.base import Operator, Propagation, Setting, fill
from nrm.operators.call import Call
from nrm.operators.contribution import Contribution
from nrm.operators.shared_out import SharedOut
from nrm.rules import Activation


class WeightedSum(Operator):
    """A sum of the contributions of one or several operands, plus perhaps a constant, the bias.

    A row says its `contributions` and its `bias`; propagation by any rule follows.
    """

    @abstractmethod
    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        """What each operand contributes."""

    def bias(self, call: Call, dim: int) -> Tensor | None:
        """The constant that is added, with `dim` axes as the output has, or `None`."""
        return None

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        values = [value.detach() for value in values]
        parts = self.contributions(call, values, setting)
        rule = setting.rule
        reads_sum = rule.reuses_sum or rule.by_sign
        if setting.bias_is_input:
            bias = self.bias(call, setting.output_dim)
            if bias is not None:
                parts.append(_bias_as_input(bias.to(values[0]), values[0], setting))
        shared = SharedOut(parts, setting)
        if not reads_sum:
            shared.output_is_free = True
            with torch.no_grad():
                return fill(call, values)(), shared
        output = shared.own_sum()
        if not setting.bias_is_input:
            bias = self.bias(call, setting.output_dim)
            if bias is not None:
                shared.output_is_free = True
                output = output + bias
        return output, shared


def _bias_as_input(bias: Tensor, operand: Tensor, setting: Setting) -> Contribution:
    """A bias as a late input neuron of value one and weight b_j, for every sample."""
    shape = list(bias.shape)
    if setting.batch_axes is not None:
        at_operand, at_output = setting.batch_axes
        shape[at_output] = operand.shape[at_operand]
    ones = torch.ones((), dtype=bias.dtype, device=bias.device).expand(shape)
    return Contribution(
        Activation(ones, constant=True),
        setting.weight("bias", bias),
        apply=torch.mul,
        uniform=lambda factor: factor,
    )
