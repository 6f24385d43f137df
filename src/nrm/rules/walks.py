"""Walks by perturbation and by gradients: other ways to say what a parent contributes (3.5.3).

Each only changes `R(i|j)`, so that every query works on them as on any other rule. All divide by
column sums of either sign, as LRP-0 does: a nearly zero sum amplifies (see `diagnostics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nrm.errors import InputError
from nrm.rules.base import Activation, Rule, Term, Weight
from nrm.rules.contributions import Zero


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
    """

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
        baseline: x': a number, a tensor that broadcasts to the input, or a sequence with one of
            these for each input. Integer inputs start from it as embeddings.
        steps: into how many the way is divided; the network runs once more for each.
    """

    baseline: Tensor | float | Sequence[Tensor | float] = 0.0
    steps: int = 16
    first_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"a path has one step or more, not {self.steps!r}")

    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        return [[] if x.constant else [(x.value, w.value)]]

    def point(self, x: Tensor, step: int, name: str, place: tuple[int, int]) -> Tensor:
        """Where an input is after some steps.

        Arguments:
            x: the input itself.
            name: of the input.
            place: which input it is, and of how many.

        Raises:
            InputError: the baseline does not fit the input.
        """
        index, number = place
        chosen = self.baseline
        if not isinstance(chosen, Tensor | float | int):
            if len(chosen) != number:
                raise InputError(
                    f"{len(chosen)} baselines were given for {number} inputs; give one for each."
                )
            chosen = chosen[index]
        baseline = torch.as_tensor(chosen, dtype=x.dtype, device=x.device)
        try:
            baseline = baseline.expand(x.shape)
        except RuntimeError:
            raise InputError(
                f"a baseline {tuple(baseline.shape)} does not broadcast to {name!r} "
                f"{tuple(x.shape)}."
            ) from None
        return baseline + (step / self.steps) * (x - baseline)
