"""The contribution rules, one small class each (eq. 14 and appendix E).

What each does with a column whose sum fails the positive-sum condition (15):

================  ==========================================================================
rule              policy
================  ==========================================================================
`Flat`, `WSquare`,  contributions are never negative: a column sums to more than zero, or all of
`ZPlus`, `ZBox`     it vanishes
`Gamma`           the sum is positive by construction, whatever the signs; it can only vanish
`Zero`, `Epsilon`,  the column is divided by its sum, whatever its sign: totals stay exact, but a
`PlainGamma`        negative sum flips signs and a nearly zero one amplifies (see `diagnostics`)
`AlphaBeta`       the same; where one sign is missing the other takes all
================  ==========================================================================

A column whose sum vanishes (`|sum| <= stabilizer`) is split uniformly over its parents by every
rule, so that no relevance is ever lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nrm.errors import InputError
from nrm.rules.base import Activation, Gate, Rule, Term, Weight


@dataclass(frozen=True)
class Identity(Rule):
    """The message passes unchanged, each neuron to the one it stands at.

    For operators that can be seen so: normalisation layers and softmax.
    """

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [[(x.ones, w.derive("ones", torch.ones_like))]]


@dataclass(frozen=True)
class Zero(Rule):
    """LRP-0: `T~_ij = a_i w_ij`."""

    reuses_sum: ClassVar[bool] = True

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [[(x.value, w.value)]]


@dataclass(frozen=True)
class Epsilon(Zero):
    """LRP-epsilon: LRP-0 with a stabiliser.

    Exact normalisation cancels an epsilon in the denominator, so it acts only where it is meant
    to: a column whose sum is within epsilon of zero is split uniformly over its parents.
    """

    stabilizer: float = 1e-6


@dataclass(frozen=True)
class PlainGamma(Rule):
    """LRP-gamma as in eq. 14: `T~_ij = a_i (w_ij + gamma max(w_ij, 0))`, for nonnegative `a`."""

    gamma: float = 0.25

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [[(x.value, w.derive(self, lambda v: v + self.gamma * v.clamp(min=0)))]]


@dataclass(frozen=True)
class Gamma(Rule):
    """Sign-aware LRP-gamma: `T~_ij = s_j z_ij + gamma max(s_j z_ij, 0)`, `s_j = sign(sum_i z_ij)`.

    Column sums are positive for any sign of activations and weights, and
    `sum_i |R(i|j)| <= (2 + gamma) / gamma`. It equals `PlainGamma` where activations are
    nonnegative and the sum is positive, and LRP-0 at gamma = 0.
    """

    gamma: float = 0.25
    by_sign: ClassVar[bool] = True

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        if self.gamma == 0:
            return [[(x.value, w.value)], [(x.value, w.value)]]
        raise_positive = w.derive(("up", self), lambda v: v + self.gamma * v.clamp(min=0))
        raise_negative = w.derive(("down", self), lambda v: v + self.gamma * v.clamp(max=0))
        agree: list[Term] = [(x.positive, raise_positive)]  # columns with a positive sum
        oppose: list[Term] = [(x.positive, raise_negative)]  # columns with a negative sum
        if x.negative is not None:
            agree.append((x.negative, raise_negative))
            oppose.append((x.negative, raise_positive))
        return [agree, oppose]

    def opposed_sum(self, first: Tensor, own_sum: Tensor) -> Tensor:
        # The terms of both groups add up to (2 + gamma) z_ij.
        return torch.sub((2 + self.gamma) * own_sum, first)


@dataclass(frozen=True)
class ZPlus(Rule):
    """LRP-z+ (gamma to infinity): `T~_ij = max(z_ij, 0)`."""

    nonnegative: ClassVar[bool] = True

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [_same_sign(x, w)]


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """LRP-alpha-beta: `alpha z+_ij / z+_j - beta z-_ij / z-_j`, with `alpha - beta = 1`."""

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-12:
            raise ValueError(
                f"AlphaBeta needs beta >= 0 and alpha - beta = 1, got {self.alpha} and {self.beta}"
            )

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [_same_sign(x, w), _opposite_sign(x, w)]

    def gates(self, sums: Sequence[Tensor], own_sum: Tensor | None) -> Sequence[Gate]:
        positive, negative = sums[0], sums[1]
        tiny = torch.finfo(positive.dtype).tiny
        return [
            torch.where(positive > tiny, self.alpha / positive, 0.0),
            torch.where(negative < -tiny, -self.beta / negative, 0.0),
        ]


@dataclass(frozen=True)
class Flat(Rule):
    """LRP-flat: every parent contributes the same, `T~_ij = 1`."""

    nonnegative: ClassVar[bool] = True

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [[(x.ones, None)]]


@dataclass(frozen=True)
class WSquare(Rule):
    """LRP-w2: `T~_ij = w_ij^2`."""

    nonnegative: ClassVar[bool] = True

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [[(x.ones, w.derive("square", torch.square))]]


@dataclass(frozen=True, eq=False)
class ZBox(Rule):
    """LRP-zB for inputs in a box: `T~_ij = a_i w_ij - low_i max(w_ij, 0) - high_i min(w_ij, 0)`.

    Arguments:
        low, high: bounds of the inputs; numbers or tensors that broadcast to the input.

    A bias seen as an input is a box of one point, so it contributes nothing.
    """

    low: Tensor | float
    high: Tensor | float
    nonnegative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            bound = getattr(self, name)
            if isinstance(bound, Tensor):  # callers reuse theirs
                object.__setattr__(self, name, bound.detach().clone())

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        if x.constant:
            return [[]]
        a = x.value
        low = torch.as_tensor(self.low, dtype=a.dtype, device=a.device)
        high = torch.as_tensor(self.high, dtype=a.dtype, device=a.device)
        slack = 1e-4 * float((high - low).abs().max())
        if bool((a < low - slack).any()) or bool((a > high + slack).any()):
            raise InputError(
                f"the ZBox rule was told that inputs lie in [{float(low.min()):.4g}, "
                f"{float(high.max()):.4g}], but they reach [{float(a.min()):.4g}, "
                f"{float(a.max()):.4g}]. Give it the bounds of the data."
            )
        # a w - low w+ - high w- as two products of one sign each: nothing to cancel.
        return [[((a - low).clamp(min=0), w.positive), ((a - high).clamp(max=0), w.negative)]]


def _same_sign(x: Activation, w: Weight) -> list[Term]:
    """The terms of `max(z_ij, 0)`."""
    terms: list[Term] = [(x.positive, w.positive)]
    if x.negative is not None:
        terms.append((x.negative, w.negative))
    return terms


def _opposite_sign(x: Activation, w: Weight) -> list[Term]:
    """The terms of `min(z_ij, 0)`."""
    terms: list[Term] = [(x.positive, w.negative)]
    if x.negative is not None:
        terms.append((x.negative, w.positive))
    return terms
