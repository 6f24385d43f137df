"""Operators between two inputs: how a change of their operands changes what they compute.

With a reference x', an operand contributes `S_ji (a_i - a'_i)`, where `S` is a slope between the
two points: `sum_i S_ji (a_i - a'_i) = y_j - y'_j`, exactly (`Operator.secant`). Linear maps have
their weights for it, elementwise functions the slope of the chord, products the mean of the other
factor, softmax and norms what is said in their rows. So every column sums to a difference, and what
follows divides by the very same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import InputError, UnsupportedOperatorError
from nrm.operators.call import Call, fill
from nrm.operators.derivatives import Step
from nrm.operators.propagation import Ends, Propagation, Setting, pull_back
from nrm.operators.row import Operator
from nrm.rules import Normalized


def change(before: Tensor, after: Tensor) -> Tensor:
    """`after - before`; zero where both are the same, as what is masked with -inf.

    Raises:
        InputError: something is infinite at one of the two alone.
    """
    difference = after.detach() - before.detach()
    if not bool(difference.sum().isfinite()):  # one pass, and no mask; it may overflow as well
        difference = torch.where(after == before, 0.0, difference)
        if not bool(difference.isfinite().all()):
            raise InputError(
                "something is infinite at the input or at the reference and not at the other, "
                "such as a score that a mask hides in one of them: there is no difference to "
                "share out. Give both the same mask."
            )
    return difference


def midpoint(before: Tensor, after: Tensor) -> Tensor:
    """Half way between the two."""
    return (before.detach() + after.detach()) / 2


def moved(point: Tensor, move: Tensor) -> Tensor:
    """The point, which depends on a move with slope one."""
    return point.detach() + (move - move.detach())


def chord(call: Call, before: Tensor, after: Tensor, move: Tensor) -> Tensor:
    """An elementwise function: its operand's move times the slope of the chord.

    Where the two points are so close that the difference of their values is mostly rounding, it is
    the derivative half way, which differs from it by as little.
    """
    with torch.no_grad():
        low, high = fill(call, [before.detach()])(), fill(call, [after.detach()])()
    middle = midpoint(before, after).requires_grad_()
    with torch.enable_grad():
        output = fill(call, [middle])()
        tangent = torch.zeros_like(middle)
        if output.requires_grad:
            (tangent,) = torch.autograd.grad(output, middle, torch.ones_like(output))
    if output.shape != middle.shape:  # an operand that is stretched: the same slope for all copies
        stretched = middle.detach().expand(output.shape).clone().requires_grad_()
        with torch.enable_grad():
            (tangent,) = torch.autograd.grad(
                fill(call, [stretched])(), stretched, torch.ones_like(output)
            )
    distance, rise = change(before, after), change(low, high)
    kind = torch.finfo(rise.dtype)
    size = torch.maximum(low.abs(), high.abs()).to(rise.dtype)
    for point in (before, after):
        size = torch.maximum(size, point.detach().abs().to(rise.dtype), out=size)
    near = distance.abs() <= kind.eps ** (1 / 3) * size
    # A kink between the two, however close: there the chord says more.
    smooth = (rise - tangent * distance).abs() <= 32 * kind.eps * size
    slope = torch.where(near & smooth | (distance == 0), tangent, rise / distance)
    slope = torch.where(slope.isfinite(), slope, 0.0)  # the derivative of what is masked
    return move.to(rise.dtype) * slope


def weights(
    before: Sequence[Tensor], after: Sequence[Tensor], alphas: Sequence[float]
) -> list[Tensor]:
    """What each operand is for the other one of a product: `a b - a' b' = w_b Da + w_a Db`.

    The mean of both points. Where alphas are given, each factor takes that much of what both bring
    about together, `Da Db`: `w_a = a' + (1 - alpha_a) Da`.
    """
    if len(alphas) < len(before):
        return [midpoint(x, y) for x, y in zip(before, after, strict=True)]
    return [
        torch.lerp(x.detach(), y.detach(), 1 - alpha)
        for x, y, alpha in zip(before, after, alphas, strict=True)
    ]


def factors(ends: Ends, alphas: Sequence[float] = ()) -> Tensor:
    """The product of two, `a b`, between two points: `w_b Da + w_a Db`."""
    (a, b), (da, db) = weights(ends.before, ends.after, alphas), ends.moves
    return b * da + a * db


def inverse_root(before: Tensor, after: Tensor) -> Tensor:
    """The slope of `1 / s` by `v = s ** 2` between two positive numbers: `-1 / (s s' (s + s'))`."""
    low, high = before.detach().sqrt(), after.detach().sqrt()
    return -1 / (low * high * (low + high))


def winners(
    calls: tuple[Call, Call],
    ends: Ends,
    setting: Setting,
    by_rank: bool = False,
) -> Tensor:
    """Maxima and minima: the winners at both points share, by where they change places.

    On the straight way from one to the other the winner at the reference, of value `b'`, gives way
    to that at the input, of value `a`, when both are equal; with `a'` and `b` what each of them is
    at the other point, that is at `t = (b' - a') / ((a - b) + (b' - a'))` of the way. The first
    counts as far as that, the second from there on: `(1 - t)(a - a') + t (b - b') = a - b'`.

    Arguments:
        calls: that at the reference, and that at the input.
        by_rank: who comes where depends on all, of which nothing is known but where it is the same.
    """
    then, now = (
        Step.of(calls[0], ends.before, ends.after),
        Step.of(calls[1], ends.after, ends.before),
    )
    a, b_then = now.output.detach(), then.output.detach()
    a_then, b = now.columns(), then.columns()
    if by_rank:
        if not torch.equal(a_then, b_then):
            raise UnsupportedOperatorError(
                f"{calls[0].target} at {setting.address!r} puts its operand in another order at "
                "the reference, and no exact slope between two orders is known."
            )
        share: Tensor | float = 0.0
    else:
        gap = (a - b) + (b_then - a_then)
        share = torch.where(gap == 0, 0.0, (b_then - a_then) / gap)
        share = torch.where(share.isfinite(), share.clamp(0, 1), 0.0)
    results = [
        fill(call, [moved(x, m) for x, m in zip(point, ends.moves, strict=True)])()
        for call, point in zip(calls, (ends.before, ends.after), strict=True)
    ]
    result: Tensor = share * results[0] + (1 - share) * results[1]
    return result


# -- the row of what is no weighted sum -----------------------------------------------------------


class Secants(Operator):
    """The operator of another row between two inputs, by its own slope.

    Arguments:
        row: the other row.
        keeps: whether a rule above may give relevance to neurons that are the same in both. It
            ends in the leaf `flat` then; else none gets there.
    """

    def __init__(self, row: Operator, keeps: bool = False) -> None:
        super().__init__(row.kind)
        self.row, self.passes, self.keeps = row, row.passes, keeps

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        return "flat" if self.keeps else None

    def channel_axis(self, call: Call, inherited: int | None) -> int | None:
        return self.row.channel_axis(call, inherited)

    def acts_on_last_axis(self, call: Call) -> bool:
        return self.row.acts_on_last_axis(call)

    def check(self, call: Call, operands: Sequence[tuple[str, Node]], address: str) -> None:
        self.row.check(call, operands, address)

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        return self.row.secant(call, ends, setting)

    def indifferent(self, call: Call, values: Sequence[Tensor]) -> list[Tensor] | None:
        return self.row.indifferent(call, values)

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        assert setting.before is not None
        with torch.no_grad():
            output: Tensor = fill(call, values)()
        leaves = [
            change(x, y).requires_grad_()
            for x, y in zip(setting.before.operands, values, strict=True)
        ]
        rise = change(setting.before.output, output)
        with torch.enable_grad():
            linear = difference(self, call, values, leaves, setting).expand(rise.shape)
        return output, Chord(leaves, linear, rise, setting)


def difference(
    row: Operator,
    call: Call,
    after: Sequence[Tensor],
    moves: Sequence[Tensor],
    setting: Setting,
) -> Tensor:
    """Something linear in the moves whose derivatives are the row's slopes.

    Arguments:
        after: the operands' values at the input.
    """
    assert setting.before is not None
    after = [value.detach() for value in after]
    with torch.enable_grad():
        linear = row.secant(call, Ends(setting.before.operands, after, moves), setting)
        return linear if linear.requires_grad else linear + 0 * moves[0].sum()


class Chord(Propagation):
    """An operation between two inputs: `R(i|j) = S_ji (a_i - a'_i) / (y_j - y'_j)`.

    What reaches neurons that are the same in both goes to the late leaf, if there is one.

    Arguments:
        moves: `[*operand]` of each operand, with a local autograd graph to
        linear: what the slopes make of them.
        rise: `y - y'`.
    """

    exclusive = True

    def __init__(
        self, moves: Sequence[Tensor], linear: Tensor, rise: Tensor, setting: Setting
    ) -> None:
        self.moves, self.linear, self.setting = moves, linear, setting
        self.still = rise == 0
        self.divisor = torch.where(self.still, 1.0, rise)

    def late_shape(self) -> torch.Size:
        return self.divisor.shape

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: Normalized = True
    ) -> list[Tensor | None]:
        share = message
        if normalized:
            share = message / self.divisor
            share = torch.where(self.still, 0.0, share)
        gradients = pull_back(self.linear, self.moves, share)
        pulled = [
            gradient * move.detach() if want else None
            for gradient, move, want in zip(gradients, self.moves, wanted, strict=False)
        ]
        if len(wanted) > len(self.moves):
            ended = torch.where(self.still, message, 0.0) if normalized is True else 0 * message
            pulled.append(ended if wanted[-1] else None)
        return pulled
