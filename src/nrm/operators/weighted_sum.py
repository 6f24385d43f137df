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
from nrm.rules import Activation, Rule, Zero


class WeightedSum(Operator):
    """A sum of the contributions of one or several operands, plus perhaps a constant, the bias.

    A row says its `contributions` and its `bias`; propagation by any rule follows.
    """

    @abstractmethod
    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        """What each operand contributes."""

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        """The constant that is added, with `dim` axes as the output has, or `None`."""
        return None

    def telescopes(self, call: Call, rule: Rule) -> bool:
        return type(rule) is Zero

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        values = [value.detach() for value in values]
        parts = self.contributions(call, values, setting)
        operands = len(values)
        constant = self.bias(call, values, setting.output_dim)
        if setting.late_leaf == "bias":
            assert constant is not None
            parts.append(_bias_as_input(constant.to(values[0]), values[0], setting, operands))
            operands += 1
        shared = SharedOut(parts, setting, operands)
        if not (setting.rule.reuses_sum or setting.rule.by_sign):
            output = _run(call, values)
            shared.output_is_free = True
        elif constant is None or (
            setting.late_leaf == "bias" and bool(torch.isfinite(constant).all())
        ):
            # The output is what all contributions add up to: no need to do so again.
            output = _run(call, values)
            shared.own_sum(output)
        elif setting.late_leaf == "bias":  # a mask that holds -inf
            output = _run(call, values)
            shared.own_sum()
        else:
            output = shared.own_sum() + constant
            shared.output_is_free = True
        shared.adopt_orphans(output.shape)
        return output, shared


def _run(call: Call, values: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = fill(call, values)()
    return output


def _bias_as_input(bias: Tensor, operand: Tensor, setting: Setting, number: int) -> Contribution:
    """A bias as a late input neuron of value one and weight b_j, for every sample."""
    # A mask adds -inf. No relevance gets there, and nothing times a finite weight is nothing.
    limit = torch.finfo(bias.dtype).max / 8
    bias = bias.clamp(-limit, limit)
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
        operand=number,
    )
