"""Correlations per picture, and how sure one is of their mean over pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nrm.evaluation import pearson

RESAMPLES = 10_000
LEVEL = 95
"""Per cent of the bootstrap's means that lie in the interval."""


@dataclass(frozen=True)
class Mean:
    """A mean over pictures with its bootstrap interval.

    Attributes:
        pictures: how many it is of; those without a correlation are left out.
    """

    mean: float
    low: float
    high: float
    pictures: int


def additive_ceiling(values: Tensor) -> float | None:
    """The largest correlation that any sum of a number for each row and one for each column has.

    No score that is additive over the two layers can do better, whatever it gives each set.
    """
    values = values.double()
    return pearson(values.mean(1, keepdim=True) + values.mean(0), values)


def mean_with_interval(values: Sequence[float | None], seed: int) -> Mean | None:
    """The mean, and between which percentiles it lies when pictures are drawn again.

    With the same seed, lists that lack the same values are drawn alike.
    """
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    drawn = np.random.default_rng(seed).integers(0, len(known), (RESAMPLES, len(known)))
    ends = np.percentile(known[drawn].mean(1), [50 - LEVEL / 2, 50 + LEVEL / 2])
    return Mean(float(known.mean()), float(ends[0]), float(ends[1]), len(known))
