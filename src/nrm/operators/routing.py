"""Operators that move neurons about: the message follows the indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from nrm.operators.base import Operator, Propagation, Setting, fill, pull_back
from nrm.operators.call import Call
from nrm.rules import Rule


class Routing(Operator):
    """Views, permutations, slices, concatenation, max-pooling: the operator's own transpose.

    The winner of a maximum takes all, which is what the operator's derivative says.
    """

    adopts_constants: ClassVar[bool] = True

    def __init__(self, kind: str, passes: tuple[str, ...], keeps_channels: bool = False) -> None:
        super().__init__(kind)
        self.passes = passes
        self.keeps_channels = keeps_channels

    def channel_axis(self, call: Call, inherited: int | None) -> int | None:
        return inherited if self.keeps_channels else None

    def curves(self, operands: Sequence[tuple[str, Node]], along_path: bool) -> bool:
        return along_path and self.kind == "maxpool"  # the winner changes on the way

    def telescopes(self, call: Call, rule: Rule) -> bool:
        return True

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        leaves = [value.detach().requires_grad_() for value in values]
        with torch.enable_grad():
            output = fill(call, leaves)()
        routed = Routed(leaves, output)
        # A function of a user's own may have derivatives that share memory with anything.
        routed.exclusive = getattr(call.target, "namespace", None) == "aten"
        return output.detach(), routed


class Routed(Propagation):
    nonnegative = True

    def __init__(self, leaves: list[Tensor], output: Tensor) -> None:
        self.leaves, self.output = leaves, output

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: bool = True
    ) -> list[Tensor | None]:
        chosen = [leaf for leaf, want in zip(self.leaves, wanted, strict=True) if want]
        if not chosen:
            return [None] * len(wanted)
        pulled = iter(pull_back(self.output, chosen, message))
        return [next(pulled) if want else None for want in wanted]
