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
        constant = self.bias(call, values, setting.output_dim)
        reads_sum = setting.rule.reuses_sum or setting.rule.by_sign
        if setting.late_leaf == "bias":
            assert constant is not None
            output = _run(call, values)
            parts.append(_bias_as_input(constant.to(output), output, setting, len(values)))
            shared = SharedOut(parts, setting, len(values) + 1)
            if reads_sum:
                # The output is what all contributions add up to, but where a mask adds -inf.
                finite = bool(torch.isfinite(constant).all())
                shared.own_sum(output if finite else None)
            else:
                shared.output_is_free = True
            return output, shared
        shared = SharedOut(parts, setting, len(values))
        if not reads_sum:
            output = _run(call, values)
            shared.output_is_free = True
        elif constant is None:
            output = _run(call, values)
            shared.own_sum(output)
        else:
            output = shared.own_sum() + constant
            shared.output_is_free = True
        shared.adopt_orphans(output.shape)
        return output, shared


def _run(call: Call, values: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = fill(call, values)()
    return output


def _bias_as_input(bias: Tensor, output: Tensor, setting: Setting, number: int) -> Contribution:
    """A bias as late input neurons: of value one and weight b_j, one for each neuron j."""
    # A mask adds -inf. No relevance gets there, and nothing times a finite weight is nothing.
    limit = torch.finfo(bias.dtype).max / 8
    ones = torch.ones((), dtype=bias.dtype, device=bias.device).expand(output.shape)
    return Contribution(
        Activation(ones, constant=True),
        setting.weight("bias", bias.clamp(-limit, limit)),
        apply=torch.mul,
        uniform=lambda factor: factor,
        transpose=torch.mul,
        operand=number,
    )
