"""Operators that put a constant in the place of some neurons: padding, masking, triangles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from nrm.operators.base import Propagation, Setting, fill
from nrm.operators.call import Call
from nrm.operators.routing import Routed, Routing


class Filling(Routing):
    """A routing in which some neurons have no parent: what reaches those ends in a leaf.

    Arguments:
        passes: the one argument that carries relevance.
        filler: the argument that holds the constant, if it is not always zero.
    """

    def __init__(self, kind: str, passes: tuple[str, ...], filler: str | None = None) -> None:
        super().__init__(kind, passes, keeps_channels=True)
        self.filler = filler

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        return "fill"

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        output, routed = super().prepare(call, values, setting)
        assert isinstance(routed, Routed)
        with torch.no_grad():
            blank = {} if self.filler is None else {self.filler: 0}
            kept = fill(call, [torch.ones_like(value) for value in values])(**blank)
        return output, Filled(routed, kept == 0)


class Filled(Propagation):
    nonnegative = True

    def __init__(self, routed: Routed, filled: Tensor) -> None:
        self.routed, self.filled = routed, filled
        self.exclusive = routed.exclusive

    def late_shape(self) -> torch.Size:
        return self.filled.shape

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: bool = True
    ) -> list[Tensor | None]:
        constant = torch.where(self.filled, message, 0.0) if wanted[-1] else None
        return [*self.routed.pull(message, wanted[:-1], normalized), constant]
