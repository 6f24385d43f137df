"""Tables and curves of an evaluation: what experiments on interventions have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nrm.evaluation.faithfulness import Evaluation
from nrm.experiments.mlp.drawing import Curve
from nrm.experiments.tables import Row

BASELINES = {"lrp": "LRP", "occlusion": "occlusion", "activation": "activation"}
"""What `evaluate` calls them, and tables do."""


def rows(
    experiment: str, found: Evaluation, methods: Mapping[str, str], paper: Mapping[str, float]
) -> list[Row]:
    """The table's.

    Arguments:
        methods: what tables call them, in order.
        paper: the paper's correlations, by method.
    """
    means = {key: found.mean(key) for key in methods}
    return [
        Row(
            experiment,
            found.layers,
            methods[key],
            mean.mean,
            mean.low,
            mean.high,
            paper.get(key),
            mean.samples,
        )
        for key, mean in means.items()
    ]


def curves(found: Evaluation, methods: Mapping[str, str], ks: Sequence[int]) -> list[Curve]:
    """SC_k of every method."""
    lines = []
    for key, method in methods.items():
        means = [found.mean(key, f"SC_{k}") for k in ks]
        ends = np.array([[m.mean, m.low, m.high] for m in means], dtype=np.float64).T
        lines.append(Curve(method, ks, *ends))
    return lines


def steps(most: int) -> tuple[int, ...]:
    """1, 2, 3, 5, 7, 10, 15, 20, … and the last."""
    found = {
        tenths * 10**power // 10
        for power in range(len(str(most)))
        for tenths in (10, 15, 20, 30, 50, 70)
    }
    return (*sorted(k for k in found if k < most), most)
