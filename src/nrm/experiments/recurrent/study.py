"""Networks, each trained and explained once, and what all of them say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from nrm.experiments.recurrent.relevance import Method, Relevance, relevance_over_time
from nrm.experiments.recurrent.series import Task, middle, train

EXPLAINED = 200
"""At most so many series are explained for each network."""
_BAND = (0.1, 0.9)


@dataclass(frozen=True, eq=False)
class Network:
    """What is said of one network.

    Attributes:
        accuracy: on so many series `held_out`.
        updates: how many batches its training took.
        label_step: `[N]`, of the series explained.
    """

    seed: int
    accuracy: float
    held_out: int
    updates: int
    label_step: Tensor
    found: Mapping[Method, Relevance]

    @classmethod
    def studied(cls, task: Task, steps: int, seed: int) -> Self:
        """Train it and explain it."""
        trained = train(task, steps, seed)
        series = trained.held_out[:EXPLAINED]
        found = relevance_over_time(trained.model, series)
        return cls(
            seed,
            trained.accuracy,
            len(trained.held_out),
            trained.updates,
            series.label_step,
            found,
        )

    def kept(self) -> dict[str, Any]:
        """All of it for a file, digit by digit."""
        return {
            **self.summary(),
            "label_step": self.label_step.tolist(),
            "found": {
                method: {
                    "over_time": relevance.over_time.tolist(),
                    "biases": relevance.biases.tolist(),
                    "cut_deviation": relevance.cut_deviation,
                }
                for method, relevance in self.found.items()
            },
        }

    @classmethod
    def restored(cls, kept: Any) -> Self | None:
        """From what `kept` gave; nothing from anything else."""
        try:
            found = {
                method: Relevance(
                    torch.tensor(kept["found"][method]["over_time"], dtype=torch.float64),
                    torch.tensor(kept["found"][method]["biases"], dtype=torch.float64),
                    kept["found"][method]["cut_deviation"],
                )
                for method in Method
            }
            explained = len(kept["label_step"])  # one row for each series
            if any(len(one.over_time) != explained for one in found.values()):
                return None
            return cls(
                kept["seed"],
                kept["accuracy"],
                kept["held_out"],
                kept["updates"],
                torch.tensor(kept["label_step"]),
                found,
            )
        except (TypeError, KeyError, ValueError):
            return None

    def summary(self) -> dict[str, Any]:
        """Of its training."""
        return {
            "seed": self.seed,
            "accuracy": self.accuracy,
            "held_out": self.held_out,
            "updates": self.updates,
        }


def summary(networks: Sequence[Network], steps: int) -> dict[str, Any]:
    """All networks of a task.

    Curves are of the series whose label is set at the middle step; all other numbers are of all
    series explained.
    """
    label_step = torch.cat([network.label_step for network in networks])
    drawn = middle(steps)
    return {
        "networks": [network.summary() for network in networks],
        "explained": len(label_step),
        "label_step": drawn,
        "methods": {
            str(method): _method([network.found[method] for network in networks], label_step, drawn)
            for method in Method
        },
    }


def _method(found: Sequence[Relevance], label_step: Tensor, drawn: int) -> dict[str, Any]:
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
