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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nrm.errors import InputError
from nrm.rules.base import Activation, Gate, Original, Rule, Term, Weight, flag, number
from nrm.tensors import check_dense, for_all_samples, like


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

    stabilizer: float = number(1e-6, least=0)


@dataclass(frozen=True)
class PlainGamma(Rule):
    """LRP-gamma as in eq. 14: `T~_ij = a_i (w_ij + gamma max(w_ij, 0))`, for nonnegative `a`."""

    gamma: float = number(0.25, least=0)

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [[(x.value, w.derive(self, lambda v: v + self.gamma * v.clamp(min=0)))]]


@dataclass(frozen=True)
class Gamma(Rule):
    """Sign-aware LRP-gamma: `T~_ij = s_j z_ij + gamma max(s_j z_ij, 0)`, `s_j = sign(sum_i z_ij)`.

    Column sums are positive for any sign of activations and weights, and
    `sum_i |R(i|j)| <= (2 + gamma) / gamma`. It equals `PlainGamma` where activations are
    nonnegative and the sum is positive, and LRP-0 at gamma = 0.
    """

    gamma: float = number(0.25, least=0)
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

    alpha: float = number(2.0, least=1)
    beta: float = number(1.0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.alpha - self.beta - 1) > 1e-12:
            raise ValueError(f"AlphaBeta needs alpha - beta = 1, got {self.alpha} and {self.beta}")

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [_same_sign(x, w), _opposite_sign(x, w)]

    def gates(self, sums: Sequence[Tensor], own_sum: Tensor | None) -> Sequence[Gate]:
        positive, negative = sums[0], sums[1]
        tiny = torch.finfo(positive.dtype).tiny
        return [
            torch.where(positive > tiny, self.alpha / positive, 0.0),
            torch.where(negative < -tiny, -self.beta / negative, 0.0),
        ]

    def original_gates(
        self, sums: Sequence[Tensor], own_sum: Tensor | None, original: Original
    ) -> Sequence[Gate]:
        return [
            self.alpha / original.stabilized(sums[0], self),
            -self.beta / original.stabilized(sums[1], self),
        ]


@dataclass(frozen=True)
class Flat(Rule):
    """LRP-flat: every parent contributes the same, `T~_ij = 1`."""

    nonnegative: ClassVar[bool] = True
    counts_biases: ClassVar[bool] = False

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
        low, high: bounds of the inputs; numbers, or tensors or arrays that broadcast to the input.

    A bias seen as an input is a box of one point, so it contributes nothing.
    """

    low: Tensor | float
    high: Tensor | float
    nonnegative: ClassVar[bool] = True
    bounds_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        low, high = (_bound(name, getattr(self, name)) for name in ("low", "high"))
        try:
            crossed = int((torch.as_tensor(low) > torch.as_tensor(high)).sum())
        except RuntimeError:
            raise ValueError(
                f"ZBox: low {tuple(torch.as_tensor(low).shape)} and high "
                f"{tuple(torch.as_tensor(high).shape)} do not broadcast"
            ) from None
        if crossed:
            raise ValueError(f"ZBox: low lies above high in {crossed} places")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        if x.constant:
            return [[]]
        a = x.value
        low, high = (_fitted(bound, a) for bound in (self.low, self.high))
        slack = 1e-4 * float((high - low).abs().max())
        if bool((a < low - slack).any()) or bool((a > high + slack).any()):
            raise InputError(
                f"the ZBox rule was told that inputs lie in [{float(low.min()):.4g}, "
                f"{float(high.max()):.4g}], but they reach [{float(a.min()):.4g}, "
                f"{float(a.max()):.4g}]. Give it the bounds of the data."
            )
        # a w - low w+ - high w- as two products of one sign each: nothing to cancel.
        above, below = (a - low).clamp(min=0), (a - high).clamp(max=0)
        if x.real is not None:  # explicit zeros are no parents, in whatever box
            above, below = above * x.ones, below * x.ones
        return [[(above, w.positive), (below, w.negative)]]


def _bound(name: str, given: Any) -> Tensor | float:
    """A bound of a box: a finite number, or a finite tensor of its own."""
    if isinstance(given, Real) and not isinstance(given, bool):
        given = float(given)
    elif isinstance(given, np.ndarray | list | tuple):
        given = torch.as_tensor(np.array(given))
    numeric = isinstance(given, Tensor) and given.dtype is not torch.bool
    if isinstance(given, bool) or not (isinstance(given, float) or numeric):
        raise TypeError(f"ZBox: {name} is a number, a tensor or an array, not {given!r}")
    if isinstance(given, Tensor):
        check_dense(given, f"ZBox: {name}")
    if isinstance(given, Tensor) and given.is_complex():
        raise TypeError(f"ZBox: {name} is a real number or tensor, not {given.dtype}")
    if isinstance(given, float) and math.isfinite(given):
        return given
    if not isinstance(given, Tensor) or not bool(given.isfinite().all()):
        raise ValueError(f"ZBox: {name} holds NaN or infinite values")
    return given.detach().clone()


def _fitted(bound: Tensor | float, a: Tensor) -> Tensor:
    """A bound of the type of an input, on its device.

    Raises:
        InputError: it does not broadcast to the input.
    """
    found = like(bound, a)
    try:
        found.expand(a.shape)
    except RuntimeError:
        raise InputError(
            f"a bound {tuple(found.shape)} of the ZBox rule does not broadcast to the neurons "
            f"{tuple(a.shape)} that it is applied to."
        ) from None
    return found


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


# -- Walks by perturbation and by gradients: other ways to say what a parent contributes (3.5.3).
# Each only changes `R(i|j)`, so that every query works on them as on any other rule. All divide by
# column sums of either sign, as LRP-0 does: a nearly zero sum amplifies (see `diagnostics`).

Baseline = Tensor | npt.NDArray[Any] | float
"""Where one input starts: a number, or what broadcasts to it."""


@dataclass(frozen=True)
class Occlusion(Zero):
    """What is lost without a parent: `T~_ij = phi(z_j) - phi(z_j - z_ij)`.

    `z_j` is what the operation computes, its bias included whether or not biases are parents, and
    phi the activation that follows it, if that alone reads it; without one it is LRP-0. A
    rectified neuron that is active has `T~_ij = min(z_ij, z_j)`. Products, norms and softmax
    are as under LRP-0.

    Evaluated connection by connection, so that a message costs some ten times what it costs
    under LRP-0. Weighted sums that an activation follows say their `connections`: layers,
    convolutions and sums do; others are refused there.

    Arguments:
        rest_to_bias: a bias that is an input takes what no other parent alone takes, `phi(z_j)`
            less all other `T~_ij`, instead of what is lost without it. A column then sums to the
            neuron's activation, of which its relevance is a part, so that divisions by small sums
            cancel along the depth. Where later neurons act linearly on the output, `f(x) R(i, j)`
            is what an intervention on both finds, for each j with an activation. Sums without
            such a bias are divided by their sum still, and norms and softmax are as ever.
    """

    rest_to_bias: bool = flag(False)
    reads_ahead: ClassVar[bool] = True


@dataclass(frozen=True)
class LocalLinear(Zero):
    """The function to first order at the input: `T~_ij = x_i dy_j/dx_i`.

    LRP-0 for weighted sums. Products, norms and softmax by all their derivatives: every factor is
    a parent, and so is every neuron that a scale depends on. Where a column is zero, as where a
    function is constant to first order, relevance ends in a leaf.
    """

    first_order: ClassVar[bool] = True


@dataclass(frozen=True)
class FromUniform(Rule):
    """For a softmax whose weights are multiplied with values: between no preference and its own.

    Its scores `s` are compared with scores of zero, for which the weights are uniform over all that
    is not masked, `P'`. With the slope between the two (`nrm.operators.secants`) scores contribute
    `S s`, which adds up to `P - P'`. In the product with values, `P v`, weights contribute
    `share (P - P') v`, and values all the rest of it. So every column sums to what there is, as
    under LRP-0, and no share is larger for weights near zero or one, where derivatives vanish.

    Arguments:
        share: how much the weights take of what their preference changes.
    """

    share: float = number(0.1, least=0, most=1)

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [[(x.value, w.value)]]


@dataclass(frozen=True, eq=False)
class PathIntegrated(Rule):
    """Contributions added up on the way from a baseline x' to the input x.

    `T~_ij = integral over t of dy_j/dx_i (x(t)) dx_i(t)`, where `x_i(t)` is the value of parent i
    when the network runs on `x' + t (x - x')`. By the midpoint rule, where it is not constant:

        T~_ij = sum over s of  dy_j/dx_i ((x(t_s) + x(t_s+1)) / 2) * (x_i(t_s+1) - x_i(t_s))

    so that `sum_i T~_ij` converges to `y_j(x) - y_j(x')`. A weighted sum is LRP-0 on the
    differences from the baseline, to which a bias contributes nothing. Masks and conditions that
    carry no relevance are those at the input.

    Arguments:
        baseline: x': a number or a tensor, which is to broadcast to every input, or for a model
            with several a mapping from the name of each to one of these. Integer inputs start
            from it as embeddings, and go by the names of those (`Graph.inputs` has all names).
        steps: into how many the way is divided; the network runs once more for each.
    """

    baseline: Baseline | Mapping[str, Baseline] = 0.0
    steps: int = number(16, least=1, whole=True)
    first_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.baseline
        known = (
            {name: _checked(start) for name, start in given.items()}
            if isinstance(given, Mapping)
            else _checked(given)
        )
        object.__setattr__(self, "baseline", known)

    def __eq__(self, other: object) -> bool:
        """Whether it is the same path; tensors are compared by value."""
        if not isinstance(other, PathIntegrated):
            return NotImplemented
        return self.steps == other.steps and _same(self.baseline, other.baseline)

    def __hash__(self) -> int:
        return hash((PathIntegrated, self.steps))

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [[] if x.constant else [(x.value, w.value)]]

    def point(
        self, x: Tensor, step: int, name: str, start: Baseline, batch_axis: int | None = 0
    ) -> Tensor:
        """Where an input is after some steps.

        Arguments:
            x: the input itself.
            name: of the input.
            start: its baseline; what has an axis less is one sample for all.
            batch_axis: of the input.

        Raises:
            InputError: the baseline does not fit the input.
        """
        baseline = like(start, x)
        try:
            baseline = for_all_samples(baseline, x, batch_axis)
        except RuntimeError:
            raise InputError(
                f"a baseline {tuple(baseline.shape)} does not broadcast to {name!r} "
                f"{tuple(x.shape)}."
            ) from None
        return baseline + (step / self.steps) * (x - baseline)


def _checked(start: Any) -> Tensor | float:
    """A baseline as a tensor of its own or a number, both finite."""
    if isinstance(start, np.ndarray):
        start = torch.as_tensor(start.copy())
    elif isinstance(start, Real) and not isinstance(start, bool):  # as numpy's numbers are
        start = float(start)
    if not isinstance(start, Tensor | float):
        raise TypeError(
            "a baseline is a number, a tensor or an array, or a mapping from the names of the "
            f"inputs to these, not {start!r}"
        )
    if isinstance(start, Tensor):
        check_dense(start, "a baseline")
    finite = start.isfinite().all() if isinstance(start, Tensor) else math.isfinite(start)
    if not bool(finite):
        raise InputError("a baseline holds NaN or infinite values.")
    return start.detach().clone() if isinstance(start, Tensor) else start


def _same(a: Any, b: Any) -> bool:
    """Whether two baselines are equal."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.device == b.device
        return a is b or (alike and torch.equal(a, b))
    return isinstance(a, float) and isinstance(b, float) and a == b
