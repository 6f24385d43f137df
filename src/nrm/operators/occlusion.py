"""A weighted sum under occlusion: `T~_ij = phi(z_j) - phi(z_j - z_ij)` (section 3.5.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nrm.operators.call import Call, fill
from nrm.operators.columns import SharedOut
from nrm.operators.connections import Connections, Piece
from nrm.operators.propagation import Contribution, Propagation, Setting, TermSum, add_up
from nrm.rules import Occlusion

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
        rule, biased = setting.rule, setting.late_leaf == "bias"
        rests = biased and isinstance(rule, Occlusion) and rule.rest_to_bias
        self._lost = Losses(parts, output, setting.following, rests)

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
    """What is lost without each operand's neurons, in place of a sum of terms.

    Arguments:
        rests: the last operand, the bias, takes what the others leave.
    """

    def __init__(
        self,
        parts: Sequence[Contribution],
        output: Tensor,
        following: Sequence[Call],
        rests: bool = False,
    ) -> None:
        super().__init__([])
        self.operands = [part.operand for part in parts]
        self.rests = rests
        self.activation = Following(output, following)
        alone = [Loss(part, self.activation) for part in (parts[:-1] if rests else parts)]
        self.parts: list[Loss | Rest] = [*alone]
        if rests:
            self.parts.append(Rest(alone, self.activation))

    @cached_property
    def output(self) -> Tensor:
        with torch.no_grad():
            if self.rests:
                return self.activation.value
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


@dataclass(frozen=True, eq=False)
class Following:
    """A weighted sum and the activation phi that follows it.

    Attributes:
        sum: z, of the output's shape.
    """

    sum: Tensor
    calls: Sequence[Call]

    @property
    def rectifies(self) -> bool:
        return [call.target for call in self.calls] == [torch.ops.aten.relu.default]

    @cached_property
    def value(self) -> Tensor:
        """phi(z)."""
        return self(self.sum)

    def __call__(self, value: Tensor) -> Tensor:
        for call in self.calls:
            value = fill(call, [value])()
        return value

    def slope(self, value: Tensor) -> Tensor:
        """phi'; zero where autograd knows none."""
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            found = self(leaf)
            if not found.requires_grad:
                return torch.zeros_like(value)
            (slope,) = torch.autograd.grad(found.sum(), leaf, materialize_grads=True)
        return slope


class Loss:
    """`T~_ij` of one operand, some connections of every neuron at a time."""

    def __init__(self, part: Contribution, activation: Following) -> None:
        assert part.connections is not None
        self.x, self.activation = part.x.value, activation
        self.shape = activation.sum.shape
        self.connections: Connections = part.connections(self.shape)

    def columns(self, size: Callable[[Tensor], Tensor] = lambda lost: lost) -> Tensor:
        """`sum_i size(T~_ij)`, of the output's shape."""
        found = torch.zeros_like(self._neurons)
        for _, lost in self._pieces():
            found += size(lost).sum(0)
        return found.reshape(self.shape)

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
        return torch.stack(found).reshape(many, *self.shape)

    def _pieces(self) -> Iterator[tuple[Piece, Tensor]]:
        """`T~_ij`, as `[connections, samples, groups, outputs, positions]`."""
        x = self.x.unsqueeze(0)
        for piece in self.connections.pieces(max(1, CHUNK // self.shape.numel())):
            weight, met = self.connections.weight(piece), self.connections.gather(x, piece)
            yield piece, self._lost(weight, met)

    def _lost(self, weight: Tensor, x: Tensor) -> Tensor:
        if self.activation.rectifies:
            # min(z_ij, z_j) where z_j > 0, and min(z_ij - z_j, 0) elsewhere: nothing cancels
            silent, active = self._sides
            return torch.addcmul(silent, weight, x).clamp_(max=active)
        without = torch.addcmul(self._neurons, weight, x, value=-1)
        # phi may have parameters, and say by axis which are whose: hence one at a time.
        lost = [
            self._change(one, weight_x) for one, weight_x in zip(without, weight * x, strict=True)
        ]
        return torch.stack(lost)

    def _change(self, without: Tensor, z_ij: Tensor) -> Tensor:
        """`phi(z_j) - phi(z_j - z_ij)`, also where that is less than the rounding of either.

        The activation of a neuron may be tiny, as in the tail of GELU, and what it takes away from
        another is then nothing but rounding, by which its relevance would be divided later. Where
        the difference cannot be told from what the slopes make of it, the slopes are exact.
        """
        phi, shape = self._sides[1], self.shape
        rest = self.activation(without.reshape(shape)).reshape(without.shape)
        slope = self.activation.slope(without.reshape(shape)).reshape(without.shape)
        difference = phi - rest
        linear = z_ij * (slope + self._slope) / 2
        steepest = torch.maximum(slope.abs(), self._slope.abs())
        rounding = phi.abs() + rest.abs() + steepest * (self._neurons.abs() + z_ij.abs())
        rounding *= 4 * torch.finfo(phi.dtype).eps
        return torch.where((difference - linear).abs() <= rounding, linear, difference)

    @cached_property
    def _neurons(self) -> Tensor:
        return self.connections.neurons(self.activation.sum.unsqueeze(0)).contiguous()

    @cached_property
    def _slope(self) -> Tensor:
        slope = self.activation.slope(self.activation.sum)
        return self.connections.neurons(slope.unsqueeze(0)).contiguous()

    @cached_property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """`max(-z, 0)` and `phi(z)`."""
        active = self.connections.neurons(self.activation.value.unsqueeze(0)).contiguous()
        return (-self._neurons).clamp(min=0), active


class Rest:
    """What no other operand takes of `phi(z_j)`: the `T~_ij` of a bias, one for each neuron."""

    def __init__(self, others: Sequence[Loss], activation: Following) -> None:
        self._others, self._activation = others, activation

    @cached_property
    def _left(self) -> Tensor:
        return self._activation.value - add_up(other.columns() for other in self._others)

    def columns(self, size: Callable[[Tensor], Tensor] = lambda lost: lost) -> Tensor:
        return size(self._left)

    def pull(self, share: Tensor) -> Tensor:
        return share * self._left

    def push(self, masses: Tensor) -> Tensor:
        return masses * self._left
