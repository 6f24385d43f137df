"""Sums over indices: scatter and index add, as message passing on graphs uses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.like import like
from nrm.operators.base import Propagation, Setting, Slot, fill
from nrm.operators.call import Call
from nrm.operators.contribution import Contribution
from nrm.operators.routing import Routing
from nrm.operators.weighted_sum import WeightedSum
from nrm.rules import Activation, Rule


class ScatterMaximum(Routing):
    """The largest (or smallest) of what is scattered to a neuron takes all; ties share evenly."""

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        if not call["include_self"]:
            # `self` counts only where nothing arrives; elsewhere it must not tie with a winner.
            base, src = fill(call, values)["self"], fill(call, values)["src"]
            least = -torch.inf if call["reduce"] == "amax" else torch.inf
            arrived = torch.zeros_like(base).scatter_add(
                call["dim"], call["index"], torch.ones_like(src)
            )
            replaced = torch.where(arrived > 0, least, base)
            index = call["self"].index if isinstance(call["self"], Slot) else None
            if index is not None:
                values = [replaced if i == index else v for i, v in enumerate(values)]
            changed = {"include_self": True} | ({} if index is not None else {"self": replaced})
            call = Call(call.target, call.arguments | changed, call.item)
        return super().prepare(call, values, setting)


class ScatterSum(WeightedSum):
    """`self` plus what is added at indices, or the mean of all that comes together there.

    A neuron to which nothing is added is the constant `self`, mostly zero: a node without
    neighbours. What reaches it ends in a leaf.

    Arguments:
        added: the argument that is added.
        scale: factor of what is added.
    """

    def __init__(
        self, kind: str, added: str, scale: Callable[[Call], float] = lambda call: 1.0
    ) -> None:
        super().__init__(kind)
        self.added, self.scale = added, scale
        self.passes = ("self", added)

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
                    torch.mul,
                    lambda factor: factor,
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
