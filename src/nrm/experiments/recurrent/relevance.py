"""What each way of propagating relevance says of every step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from nrm import rules
from nrm.composites import Composite, Everywhere, LRPAll
from nrm.experiments.recurrent.series import Series
from nrm.explainer import Explainer
from nrm.tensors import one_thread


class Method(StrEnum):
    """How relevance is propagated.

    Attributes:
        PLAIN: the normalised measure under the paper's rule, gamma = 0.25, biases dropped.
        UNNORMALIZED: the original walk relevance (eq. 26) under the same rule.
        SIGN_AWARE: the normalised measure under the sign-aware rule, gamma = 0.25.
        LRP_ALL: the normalised measure under LRP-0, with biases as inputs.
    """

    PLAIN = "plain"
    UNNORMALIZED = "unnormalized"
    SIGN_AWARE = "sign_aware"
    LRP_ALL = "lrp_all"


COMPOSITES: dict[Method, Composite] = {
    Method.PLAIN: Everywhere(rules.PlainGamma(0.25)),
    Method.SIGN_AWARE: Everywhere(rules.Gamma(0.25)),
    Method.LRP_ALL: LRPAll(),
}
"""Those of the normalised measures; the unnormalised one is of the plain rule."""


@dataclass(frozen=True)
class Relevance:
    """What one method says about some series.

    Attributes:
        over_time: `[N, steps]`, the relevance of the input neurons of every step; what is
            unnormalised is given in units of the logit.
        biases: `[N]`, the share that ends at biases; nothing for what is unnormalised.
        cut_deviation: the largest deviation from one of a total over a cut, relative to
            max(1, total variation). There is a cut between any two steps.
    """

    over_time: Tensor
    biases: Tensor
    cut_deviation: float | None

    @property
    def total_variation(self) -> Tensor:
        """`[N]`: the sum over steps of absolute relevances."""
        return self.over_time.abs().sum(1)


def relevance_over_time(model: nn.Module, series: Series) -> dict[Method, Relevance]:
    """What every method says of each step, for the label of each series."""
    found: dict[Method, Relevance] = {}
    with one_thread():
        for method, composite in COMPOSITES.items():
            R = Explainer(model, composite)(series.x, target=series.label)
            checks = R.diagnostics()
            found[method] = Relevance(
                R.heatmap().sum(-1), checks.bias_share, checks.worst_cut_deviation
            )
            if method is Method.PLAIN:
                unnormalized = R.heatmap(normalized=False).sum(-1) / R.scale[:, None]
                nothing = torch.zeros_like(R.scale)
                found[Method.UNNORMALIZED] = Relevance(unnormalized, nothing, None)
    return found
