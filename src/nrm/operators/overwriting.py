"""Operators that write values over others at indices, where the last one written wins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nrm.operators.base import Propagation, Setting, Slot, fill
from nrm.operators.call import Call
from nrm.operators.routing import Routing
from nrm.rules import Rule


class Overwriting(Routing):
    """`self` with what `written` holds at indices. Each neuron has one parent: what stands there.

    Its derivative would also give to values that were overwritten in turn.

    Arguments:
        passes: `self`, and the argument that is written.
    """

    def __init__(self, kind: str, passes: tuple[str, str]) -> None:
        super().__init__(kind, passes, keeps_channels=True)

    def telescopes(self, call: Call, rule: Rule) -> bool:
        return False

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        assert self.passes is not None
        base, written = (fill(call, values)[name] for name in self.passes)
        with torch.no_grad():
            output = fill(call, values)()
            numbers = torch.arange(1, written.numel() + 1, dtype=torch.float64)
            winners = call(
                **{
                    self.passes[0]: torch.zeros_like(base, dtype=torch.float64),
                    self.passes[1]: numbers.to(base.device).view(written.shape),
                }
            ).long()
        sides = [call[name].index if isinstance(call[name], Slot) else None for name in self.passes]
        return output, Overwritten(winners, written.shape, sides, len(values))


class Overwritten(Propagation):
    """`winners` numbers, from one, what was written at each neuron; zero: it is as it was."""

    exclusive = True
    nonnegative = True

    def __init__(
        self, winners: Tensor, written: torch.Size, sides: list[int | None], operands: int
    ) -> None:
        self.winners, self.written, self.sides, self.operands = winners, written, sides, operands

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: bool = True
    ) -> list[Tensor | None]:
        pulled: list[Tensor | None] = [None] * self.operands
        base, source = self.sides
        if base is not None and wanted[base]:
            pulled[base] = torch.where(self.winners == 0, message, 0.0)
        if source is not None and wanted[source]:
            count = self.written.numel()
            by_number = message.new_zeros((len(message), count + 1))
            by_number.index_add_(1, self.winners.flatten(), message.flatten(1))
            pulled[source] = by_number[:, 1:].reshape(len(message), *self.written)
        return pulled
