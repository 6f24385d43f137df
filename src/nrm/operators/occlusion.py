"""A weighted sum under occlusion: `T~_ij = phi(z_j) - phi(z_j - z_ij)` (section 3.5.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from nrm.operators.base import Propagation, Setting, fill
from nrm.operators.call import Call
from nrm.operators.connections import Connections, Piece
from nrm.operators.contribution import Contribution, TermSum
from nrm.operators.contribution import total as add_up
from nrm.operators.shared_out import SharedOut

CHUNK = 2**20
"""How many connections are looked at together, at least one of every neuron."""


class Occluded(SharedOut):
    """A weighted sum whose operands contribute what is lost without them.

    Arguments:
        parts: what each operand adds; each can say its connections.
        output: what the operation computes.
    """

    def __init__(
        self, parts: list[Contribution], setting: Setting, operands: int, output: Tensor
    ) -> None:
        super().__init__(parts, setting, operands)
        self._lost = Losses(parts, output, setting.following)

    def group(self, index: int, known: Tensor | None = None) -> TermSum:
        return self._lost

    def absolute(self) -> Propagation | None:
        return None

    def by_channels(
        self, message: Tensor, operand: int, samples: int, onward: Tensor | None = None
    ) -> Iterator[Tensor] | None:
        return None  # it is no sum of terms

    def magnitude(self) -> Tensor:
        with torch.no_grad():
            return add_up(part.columns(torch.abs) for part in self._lost.parts)


class Losses(TermSum):
    """What is lost without each operand's neurons, in place of a sum of terms."""

    def __init__(
        self, parts: Sequence[Contribution], output: Tensor, following: Sequence[Call]
    ) -> None:
        super().__init__([])
        self.operands = [part.operand for part in parts]
        self.parts = [Loss(part, output, following) for part in parts]

    @cached_property
    def output(self) -> Tensor:
        with torch.no_grad():
            return add_up(part.columns() for part in self.parts)

    def pull(self, share: Tensor, wanted: Sequence[bool], pulled: list[Tensor | None]) -> None:
        for operand, part in zip(self.operands, self.parts, strict=True):
            if wanted[operand]:
                product = part.pull(share)
                before = pulled[operand]
                pulled[operand] = product if before is None else before + product

    def push(self, masses: Sequence[Tensor | None]) -> Tensor | None:
        pushed = [
            part.push(mass)
            for operand, part in zip(self.operands, self.parts, strict=True)
            if (mass := masses[operand]) is not None
        ]
        return add_up(pushed) if pushed else None


class Loss:
    """`T~_ij` of one operand, some connections of every neuron at a time."""

    def __init__(self, part: Contribution, output: Tensor, following: Sequence[Call]) -> None:
        assert part.connections is not None
        self.x, self.output, self.following = part.x.value, output, following
        self.connections: Connections = part.connections(output.shape)

    def columns(self, size: Callable[[Tensor], Tensor] = lambda lost: lost) -> Tensor:
        """`sum_i size(T~_ij)`, of the output's shape."""
        found = torch.zeros_like(self._neurons)
        for _, lost in self._pieces():
            found += size(lost).sum(0)
        return found.reshape(self.output.shape)

    def pull(self, share: Tensor) -> Tensor:
        """`[K, *output]` to `sum_j T~_ij share_j`, `[K, *operand]`."""
        parents = share.new_zeros((len(share), *self.x.shape))
        shares = torch.unflatten(self.connections.neurons(share), 0, (len(share), -1))
        for piece, lost in self._pieces():
            met = [(lost * one).sum(3) for one in shares]
            self.connections.scatter(torch.cat(met, 1), piece, parents)
        return parents

    def push(self, masses: Tensor) -> Tensor:
        """`[K, *operand]` to `sum_i T~_ij mass_i`, `[K, *output]`: the transpose."""
        many = len(masses)
        shape = self._neurons.shape
        found = [masses.new_zeros(shape) for _ in range(many)]
        for piece, lost in self._pieces():
            met = torch.unflatten(self.connections.gather(masses, piece), 1, (many, -1))
            found = [f + (lost * met[:, k]).sum(0) for k, f in enumerate(found)]
        return torch.stack(found).reshape(many, *self.output.shape)

    def _pieces(self) -> Iterator[tuple[Piece, Tensor]]:
        """`T~_ij`, as `[connections, samples, groups, outputs, positions]`."""
        x = self.x.unsqueeze(0)
        for piece in self.connections.pieces(max(1, CHUNK // self.output.numel())):
            weight, met = self.connections.weight(piece), self.connections.gather(x, piece)
            yield piece, self._lost(weight, met)

    def _lost(self, weight: Tensor, x: Tensor) -> Tensor:
        if self._rectified:
            # min(z_ij, z_j) where z_j > 0, and min(z_ij - z_j, 0) elsewhere: nothing cancels
            silent, active = self._sides
            return torch.addcmul(silent, weight, x).clamp_(max=active)
        without = torch.addcmul(self._neurons, weight, x, value=-1)
        for one in without:  # phi may have parameters, and say by axis which are whose
            rest = self._phi(one.reshape(self.output.shape)).reshape(one.shape)
            torch.sub(self._sides[1], rest, out=one)
        return without

    @property
    def _rectified(self) -> bool:
        return [call.target for call in self.following] == [torch.ops.aten.relu.default]

    def _phi(self, value: Tensor) -> Tensor:
        for call in self.following:
            value = fill(call, [value])()
        return value

    @cached_property
    def _neurons(self) -> Tensor:
        return self.connections.neurons(self.output.unsqueeze(0)).contiguous()

    @cached_property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """`max(-z, 0)` and `phi(z)`."""
        active = self.connections.neurons(self._phi(self.output).unsqueeze(0)).contiguous()
        return (-self._neurons).clamp(min=0), active
