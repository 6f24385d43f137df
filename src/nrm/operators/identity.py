"""Operators with one parent per neuron: the message passes unchanged, at no cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.operators.base import Operator, Propagation, Setting, fill
from nrm.operators.call import Call
from nrm.operators.gradient_share import with_slope
from nrm.rules import Rule


class Identity(Operator):
    """Elementwise operators: activations, dropout in evaluation mode, casts.

    Where the operator broadcasts its operand, the message is summed over the copies.

    Arguments:
        at_zero: what is known of the function at zero: `"linear"` functions, those that are linear
            on either side of it (a `"ramp"`) and those that are `"zero"` there have a slope
            `f(x) / x`, of the first two it is the derivative; others may not.
        elementwise: whether it is; some that are not pass relevance as if they were.
    """

    def __init__(
        self,
        kind: str,
        at_zero: Literal["linear", "ramp", "zero", "unknown"] = "unknown",
        elementwise: bool = True,
    ) -> None:
        super().__init__(kind)
        self.at_zero, self.elementwise = at_zero, elementwise

    def curves(self, operands: Sequence[tuple[str, Node]], along_path: bool) -> bool:
        return not self.elementwise

    def check(self, call: Call, operands: Sequence[tuple[str, Node]], address: str) -> None:
        if len(operands) > 1:
            raise UnsupportedOperatorError(
                f"{call.target} at {address!r} combines several tensors that depend on the input, "
                "and no rule says how they share the relevance."
            )
        if call.get("train") is True or call.get("training") is True:
            raise UnsupportedOperatorError(
                f"{call.target} at {address!r} is random (its training flag is set). "
                "Pass training=self.training in the model's code."
            )

    def telescopes(self, call: Call, rule: Rule) -> bool:
        return self.at_zero != "unknown"

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        if self.at_zero in ("linear", "ramp"):
            return super().frozen(call, values, setting)
        x = values[0].detach()
        with torch.no_grad():
            output: Tensor = fill(call, [x])()
            slope = torch.where(x == 0, 0.0, output / x)
        return with_slope(values[0], output, slope)

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        with torch.no_grad():
            output = fill(call, values)()
        return output, Unchanged(values[0].shape, output.shape)


class Copy(Identity):
    """`copy(self, src)`: the values of `src`, broadcast and cast to look like `self`."""

    passes = ("src",)

    def __init__(self, kind: str) -> None:
        super().__init__(kind, at_zero="linear")

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        output = self.frozen(call, [values[0].detach()], setting)
        return output, Unchanged(values[0].shape, output.shape)

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        like: Tensor = call["self"]
        return values[0].to(like.dtype).expand(like.shape)


class Unchanged(Propagation):
    """The message as it is, summed over the copies where the operand was broadcast."""

    exclusive = True
    nonnegative = True

    def __init__(self, operand: torch.Size, output: torch.Size) -> None:
        self.operand, self.broadcast = operand, operand != output

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: bool = True
    ) -> list[Tensor | None]:
        if self.broadcast:
            added = message.dim() - 1 - len(self.operand)
            if added:
                message = message.sum(tuple(range(1, 1 + added)))
            stretched = [
                axis
                for axis, size in enumerate(self.operand, start=1)
                if size == 1 and message.shape[axis] != 1
            ]
            if stretched:
                message = message.sum(stretched, keepdim=True)
        return [message]

    def push(
        self, masses: Sequence[Tensor | None], shape: torch.Size, normalized: bool = True
    ) -> Tensor:
        (mass,) = masses
        assert mass is not None
        if not self.broadcast:
            return mass
        added = (1,) * (len(shape) - len(self.operand))
        return mass.reshape(len(mass), *added, *self.operand).expand(len(mass), *shape)
