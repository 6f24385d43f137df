"""What each way of propagating relevance says of every step, over several networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from nrm import rules
from nrm.composites import Composite, Everywhere, LRPAll
from nrm.experiments.recurrent.series import Series, Task, middle, train
from nrm.explainer import Explainer
from nrm.threads import one_thread

STEPS = 12
SEEDS = 8
_EXPLAINED = 200
_BAND = (0.1, 0.9)


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


def experiment(
    seeds: int = SEEDS,
    steps: int = STEPS,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train and explain `seeds` networks on each task.

    Arguments:
        done: called after every network.

    Returns:
        what `recurrent.json` holds. Curves are of the series whose label is set at the middle
        step; all other numbers are of all series explained.
    """
    result: dict[str, Any] = {"steps": steps, "seeds": seeds, "gamma": 0.25, "tasks": {}}
    for task in Task:
        networks: list[dict[str, Any]] = []
        explained: list[Series] = []
        found: dict[Method, list[Relevance]] = {method: [] for method in Method}
        for seed in range(seeds):
            trained = train(task, steps, seed)
            series = trained.held_out[:_EXPLAINED]
            for method, relevance in relevance_over_time(trained.model, series).items():
                found[method].append(relevance)
            explained.append(series)
            networks.append(
                {
                    "seed": seed,
                    "accuracy": trained.accuracy,
                    "held_out": len(trained.held_out),
                    "updates": trained.updates,
                }
            )
            done()
        label_step = torch.cat([series.label_step for series in explained])
        result["tasks"][str(task)] = {
            "networks": networks,
            "explained": len(label_step),
            "label_step": middle(steps),
            "methods": {str(m): _summary(found[m], label_step, middle(steps)) for m in Method},
        }
    return result


def _summary(found: Sequence[Relevance], label_step: Tensor, drawn: int) -> dict[str, Any]:
    """One method over all networks."""
    over_time = torch.cat([relevance.over_time for relevance in found])
    variation = torch.cat([relevance.total_variation for relevance in found])
    biases = torch.cat([relevance.biases for relevance in found])
    totals = over_time.sum(1).abs()
    at_label = over_time.gather(1, label_step[:, None])[:, 0]
    deviations = [r.cut_deviation for r in found if r.cut_deviation is not None]
    curves = over_time[label_step == drawn]
    return {
        "largest_at_label_step": float((over_time.argmax(1) == label_step).double().mean()),
        "at_label_step": _spread(at_label),
        "over_time": {"smallest": float(over_time.min()), "largest": float(over_time.max())},
        "total_variation": _spread(variation),
        "total_of_inputs": _spread(totals),
        "biases": _spread(biases),
        "worst_cut_deviation": max(deviations, default=None),
        "curve": {"mean": curves.mean(0).tolist(), **_quantiles(curves)},
        "curve_of_sizes": {"mean": curves.abs().mean(0).tolist(), **_quantiles(curves.abs())},
    }


def _spread(values: Tensor) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "median": float(values.quantile(0.5)),
        "smallest": float(values.min()),
        "largest": float(values.max()),
    }


def _quantiles(curves: Tensor) -> dict[str, list[float]]:
    low, high = _BAND
    return {
        "median": curves.quantile(0.5, 0).tolist(),
        "low": curves.quantile(low, 0).tolist(),
        "high": curves.quantile(high, 0).tolist(),
    }
