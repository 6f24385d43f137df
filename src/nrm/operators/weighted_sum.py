"""Weighted sums: the operators where a contribution rule decides how a message is shared out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.operators.base import Operator, Propagation, Setting, fill
from nrm.operators.call import Call
from nrm.operators.connections import OneParent
from nrm.operators.contribution import Contribution
from nrm.operators.occlusion import Occluded
from nrm.operators.shared_out import SharedOut
from nrm.rules import Activation, LocalLinear, Rule, Zero


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

    def real_bias(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor | None:
        """Where that constant is a parent: 0 where explicit zeros are added, else 1, as the
        constant has axes; `None`: everywhere."""
        if not setting.addend:
            return None
        told = Call(call.target, {**call.arguments, **setting.addend}, call.item)
        found = self.bias(told, values, setting.output_dim)
        return None if found is None else found != 0

    def telescopes(self, call: Call, rule: Rule) -> bool:
        return type(rule) in (Zero, LocalLinear)

    def reads_ahead(self, operands: Sequence[tuple[str, Node]]) -> bool:
        return True

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        values = [value.detach() for value in values]
        added = values
        if setting.path:  # linear: the differences from the baseline
            added = [x - start for x, start in zip(values, setting.path[0], strict=True)]
        parts = self.contributions(call, added, setting)
        for part in parts:
            if setting.real and setting.real[part.operand] is not None:
                part.x = Activation(part.x.value, part.x.constant, setting.real[part.operand])
        constant = self.bias(call, values, setting.output_dim)
        if setting.following:
            return self._occlude(call, values, setting, parts, constant)
        reads_sum = setting.rule.reuses_sum or setting.rule.by_sign
        if setting.late_leaf == "bias":
            assert constant is not None
            output = _run(call, values)
            real = self.real_bias(call, values, setting)
            bias, whole = _bias_as_input(constant.to(output), output, real, setting, len(values))
            parts.append(bias)
            shared = SharedOut(parts, setting, len(values) + 1)
            if reads_sum:
                # The output is what all contributions add up to, but where a mask adds -inf.
                shared.own_sum(output if whole else None)
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

    def _occlude(
        self,
        call: Call,
        values: Sequence[Tensor],
        setting: Setting,
        parts: list[Contribution],
        constant: Tensor | None,
    ) -> tuple[Tensor, Propagation]:
        if any(part.connections is None for part in parts):
            raise UnsupportedOperatorError(
                f"{setting.rule} looks at the connections of {call.target} at "
                f"{setting.address!r} one by one, because an activation follows, and its row does "
                "not say them. Choose another rule for it in the composite, such as "
                f"(path({setting.address!r}), Zero())."
            )
        output = _run(call, values)
        operands = len(values)
        if setting.late_leaf == "bias":
            assert constant is not None
            real = self.real_bias(call, values, setting)
            parts.append(_bias_as_input(constant.to(output), output, real, setting, operands)[0])
            operands += 1
        occluded = Occluded(parts, setting, operands, output)
        occluded.adopt_orphans(output.shape)
        return output, occluded


def _run(call: Call, values: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = fill(call, values)()
    return output


def _bias_as_input(
    bias: Tensor, output: Tensor, real: Tensor | None, setting: Setting, number: int
) -> tuple[Contribution, bool]:
    """A bias as late input neurons, of value one and weight b_j, one for each neuron j; and
    whether that is all of it."""
    # A mask adds -inf, or the least number there is. No relevance gets there, and nothing times a
    # finite weight is nothing; but the rule may square the weight.
    limit = torch.finfo(bias.dtype).max ** 0.5 / 8
    whole = bool((bias.abs() <= limit).all())
    ones = torch.ones((), dtype=bias.dtype, device=bias.device).expand(output.shape)
    weight = setting.weight("bias", bias if whole else bias.clamp(-limit, limit))
    contribution = Contribution(
        Activation(ones, constant=True, real=None if real is None else real.expand(output.shape)),
        weight,
        apply=torch.mul,
        uniform=lambda factor: factor,
        transpose=torch.mul,
        transposes_anew=True,
        operand=number,
        keeps_sign=True,
        connections=lambda shape: OneParent(weight.value, shape, shape),
    )
    return contribution, whole
