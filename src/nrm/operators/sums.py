"""Weighted sums: the operators where a contribution rule decides how a message is shared out.

What all have in common (`WeightedSum`), addition and subtraction, batch norm in evaluation mode,
and sums over indices. Layers, averages, matrix products and norms are in files of their own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.operators.call import UNKNOWN, Call, Function, Order, Rescaling, Slot, fill, only_operand
from nrm.operators.columns import SharedOut
from nrm.operators.connections import OneParent
from nrm.operators.occlusion import Occluded
from nrm.operators.propagation import Contribution, Ends, Propagation, Setting, add_up
from nrm.operators.routing import Unchanged
from nrm.operators.row import Operator, ReadsZeros, TellsZeros
from nrm.operators.secants import change, weights
from nrm.rules import Activation, LocalLinear, Rule, Zero
from nrm.tensors import aligned, like, per_channel


class WeightedSum(Operator):
    """A sum of the contributions of one or several operands, plus perhaps a constant, the bias.

    A row says its `contributions` and its `bias`; propagation by any rule follows.
    """

    adds_up = True
    affine: ClassVar[bool] = False
    """The sum is an affine function of its operands, jointly; others are for one at a time."""

    def affine_in(self, call: Call, read: Sequence[str]) -> bool:
        return self.affine and set(read) <= set(self.passes or ())

    @abstractmethod
    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        """What each operand contributes."""

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

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        # A weight that is another operand's value lies between the points: the product rule.
        middle = weights(ends.before, ends.after, setting.alphas)
        parts = self.contributions(call, middle, replace(setting, alphas=()))
        return add_up(part.apply(ends.moves[part.operand], part.w.value) for part in parts)

    def reads_ahead(self, operands: Sequence[tuple[str, Node]]) -> bool:
        return True

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        values = [value.detach() for value in values]
        added = values
        if setting.path:  # linear: the differences from the baseline
            added = [x - start for x, start in zip(values, setting.path[0], strict=True)]
        if setting.before is not None:
            added = [
                change(start, x) for start, x in zip(setting.before.operands, values, strict=True)
            ]
        parts = self.contributions(call, added, setting)
        for part in parts:
            if setting.real and setting.real[part.operand] is not None:
                part.x = Activation(part.x.value, part.x.constant, setting.real[part.operand])
        constant = self.bias(call, values, setting.output_dim)
        if setting.following:
            return self._occlude(call, values, setting, parts, constant)
        reads_sum = setting.rule.reuses_sum or setting.rule.by_sign
        if setting.before is not None:
            output = _run(call, values)
            shared = SharedOut(parts, setting, len(values))
            if reads_sum:
                # The very numbers that whoever reads the result takes for its differences: what
                # rounding leaves of them cancels, however small they are.
                shared.own_sum(change(setting.before.output, output))
            shared.output_is_free = True
            shared.adopt_orphans(output.shape)
            return output, shared
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
        transpose=torch.mul,
        transposes_anew=True,
        operand=number,
        keeps_sign=True,
        connections=lambda shape: OneParent(weight.value, shape, shape),
    )
    return contribution, whole


class Elementwise(WeightedSum):
    """A weighted sum with at most one parent per neuron and operand; alone it is an identity."""

    def mixed_axes(self, call: Call, dim: int) -> list[int] | None:
        return []

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        if len(values) == 1 and setting.late_leaf is None:
            with torch.no_grad():
                output = fill(call, values)()
            return output, Unchanged(values[0].shape, output.shape)
        return super().prepare(call, values, setting)


class Sum(Elementwise):
    """Addition and subtraction of tensors; all operands are normalised jointly.

    Arguments:
        signs: of a call, the signs of `self` and `other`, or what they are multiplied by.
    """

    affine = True
    passes: tuple[str, ...] = ("self", "other")

    def __init__(
        self,
        kind: str,
        signs: Callable[[Call], tuple[float, float]],
        function: Function = UNKNOWN,
    ) -> None:
        super().__init__(kind)
        self.signs, self.function = signs, function

    def order(self, call: Call, name: str) -> Order | None:
        if not isinstance(call["alpha"], int | float):
            return None
        signs = dict(zip(self.passes, self.signs(call), strict=True))
        return None if 0 in signs.values() else Order(signs[name] < 0)

    def shown(self, call: Call, carries: Callable[[Node], bool]) -> Node | None:
        return only_operand(call, carries)

    def rescaling(self, call: Call, name: str) -> Rescaling | None:
        place = self.passes.index(name)
        other = call[self.passes[1 - place]]
        if not isinstance(other, Node | int | float) or not isinstance(call["alpha"], int | float):
            return None
        signs = self.signs(call)
        scale, factor = signs[place], signs[1 - place]
        matters = isinstance(other, Node) or scale < 0
        return Rescaling("plus", (other, scale, factor), matters, shifts=True)

    def may_hold_zeros(self, call: Call, reads: Sequence[str], graph: ReadsZeros) -> bool:
        return bool(reads)

    def real(self, call: Call, told: TellsZeros) -> Tensor:
        sides = [told.real(call[name]) for name in self.passes]
        return torch.maximum(*sides).expand(told.value.shape)

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
                        # A sign of zero, as in `x.add(y, alpha=0)`, connects nothing.
                        uniform=partial(torch.mul, other=0.0) if sign == 0 else None,
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
                return aligned(constant, dim)
        return None


# -- Batch norm in evaluation mode: a fixed scale and shift per channel.


class BatchNorm(Elementwise):
    """Batch norm that no layer before it could take in (see `nrm.capture.rewrite`)."""

    affine = True
    passes = ("input",)
    applies_weights = True

    def rescaling(self, call: Call, name: str) -> Rescaling | None:
        if name != "input" or call.get("training") or call["running_mean"] is None:
            return None  # refused by name when the graph is built
        return Rescaling("norm", tuple(statistics(call).values()), matters=True, shifts=True)

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return True

    def check(self, call: Call, operands: Sequence[tuple[str, Node]], address: str) -> None:
        if call.get("training") or call["running_mean"] is None:
            raise UnsupportedOperatorError(
                f"batch norm at {address!r} uses the statistics of the batch, which ties the "
                "samples of a batch together. Call model.eval(), and keep track_running_stats."
            )

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        scale, _ = scale_and_shift(**statistics(call))
        weight = per_channel(scale, values[0].dim())
        return [
            Contribution(
                Activation(values[0]),
                setting.weight("scale", weight),
                keeps_sign=True,
                connections=partial(OneParent, weight, values[0].shape),
            )
        ]

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        _, shift = scale_and_shift(**statistics(call))
        return per_channel(shift, dim)


def statistics(call: Call) -> dict[str, Any]:
    """What decides scale and shift, by the names that `scale_and_shift` takes."""
    return {
        "gain": call["weight"],
        "offset": call["bias"],
        "mean": call["running_mean"],
        "variance": call["running_var"],
        "eps": call["eps"],
    }


def scale_and_shift(
    gain: Tensor | None, offset: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`(x - mean) / sqrt(variance + eps) * gain + offset` as `x * scale + shift`."""
    scale = torch.rsqrt(variance + eps)
    if gain is not None:
        scale = scale * gain
    shift = -mean * scale
    if offset is not None:
        shift = shift + offset
    return scale, shift


# -- Sums over indices: scatter and index add, as message passing on graphs uses them.


class ScatterSum(WeightedSum):
    """`self` plus what is added at indices, or the mean of all that comes together there.

    A neuron to which nothing is added is the constant `self`, mostly zero: a node without
    neighbours. What reaches it ends in a leaf.

    Arguments:
        added: the argument that is added.
        scale: factor of what is added.
    """

    scatters = True

    def __init__(
        self, kind: str, added: str, scale: Callable[[Call], float] = lambda call: 1.0
    ) -> None:
        super().__init__(kind)
        self.added, self.scale = added, scale
        self.passes: tuple[str, ...] = ("self", added)

    def check(self, call: Call, operands: Sequence[tuple[str, Node]], address: str) -> None:
        if call.get("include_self") is False and "self" in [name for name, _ in operands]:
            raise UnsupportedOperatorError(
                f"{call.target} at {address!r} writes over a tensor that depends on the input. "
                "Scatter into zeros, and add."
            )

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return "self" not in [name for name, _ in operands]

    def adds(self, call: Call, name: str) -> bool:
        return name == "self"

    def may_hold_zeros(self, call: Call, reads: Sequence[str], graph: ReadsZeros) -> bool:
        return "self" in reads and graph.placed(call, self)

    def real(self, call: Call, told: TellsZeros) -> Tensor:
        # Zeros are left where nothing arrives.
        changed: dict[str, Any] = {name: told.real(call[name]) for name in self.passes}
        return told.run(**changed | ({"alpha": 1} if "alpha" in call.arguments else {})) != 0

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        return "empty" if "self" not in [name for name, _ in operands] else None

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        base, added = (
            values[argument.index] if isinstance(argument, Slot) else argument
            for argument in (call["self"], call[self.added])
        )
        scale = like(self.scale(call), added)
        share = base.new_ones(())
        if _is_mean(call):
            share = scale = _count(call, base, added).reciprocal()

        plain: dict[str, Any] = {"alpha": 1} if "alpha" in call.arguments else {}
        if _is_mean(call):
            plain = {"reduce": "sum"}

        def scatter(factor: Tensor) -> Tensor:
            blank = base.new_zeros(base.shape)
            summed: Tensor = call(**plain, **{"self": blank, self.added: factor})
            return summed

        parts = []
        if isinstance(call["self"], Slot):
            parts.append(
                Contribution(
                    Activation(base),
                    setting.weight("self", share),
                    operand=call["self"].index,
                    keeps_sign=True,
                )
            )
        if isinstance(call[self.added], Slot):
            parts.append(
                Contribution(
                    Activation(added),
                    setting.weight("added", scale),
                    lambda factor, weight: scatter(factor) * weight,
                    # An alpha of zero connects nothing.
                    lambda factor: scatter(factor) * (scale != 0),
                    operand=call[self.added].index,
                    keeps_sign=True,
                )
            )
        return parts

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        if isinstance(call["self"], Slot):
            return None
        base: Tensor = call["self"]
        if call.get("include_self") is False:  # kept only where nothing is added
            added = call[self.added]
            blank = torch.zeros_like(values[added.index] if isinstance(added, Slot) else added)
            base = call(**{self.added: blank})
        elif _is_mean(call):
            base = base / _count(call, base, values[call[self.added].index])
        return base

    def real_bias(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor | None:
        if call.get("include_self") is False and not setting.addend:
            # No parent where something is added in its place.
            setting = replace(setting, addend={"self": torch.ones_like(call["self"])})
        return super().real_bias(call, values, setting)


def _is_mean(call: Call) -> bool:
    return bool(call.get("reduce") == "mean")


def _count(call: Call, base: Tensor, added: Tensor) -> Tensor:
    """How many come together at every neuron, one at least."""
    start = torch.full_like(base, 1.0 if call["include_self"] else 0.0)
    arrived = start.scatter_add(call["dim"], call["index"], torch.ones_like(added))
    return arrived.clamp(min=1)
