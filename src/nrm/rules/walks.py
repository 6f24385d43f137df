"""Walks by perturbation and by gradients: other ways to say what a parent contributes (3.5.3).

Each only changes `R(i|j)`, so that every query works on them as on any other rule. All divide by
column sums of either sign, as LRP-0 does: a nearly zero sum amplifies (see `diagnostics`).
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
from nrm.like import check_dense, like
from nrm.rules.base import Activation, Rule, Term, Weight
from nrm.rules.contributions import Zero
from nrm.rules.options import flag, number

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

    def point(self, x: Tensor, step: int, name: str, start: Baseline) -> Tensor:
        """Where an input is after some steps.

        Arguments:
            x: the input itself.
            name: of the input.
            start: its baseline.

        Raises:
            InputError: the baseline does not fit the input.
        """
        baseline = like(start, x)
        try:
            baseline = baseline.expand(x.shape)
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
