"""Relevance of pairs of clusters beside what the network loses without them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import torch
from torch import Tensor

from nrm.errors import QueryError
from nrm.evaluation import Interventions, pearson
from nrm.experiments.additive.contribution import Contributions, contributions
from nrm.experiments.cnn.data import Photo
from nrm.experiments.cnn.layers import Pair
from nrm.measure import Measure
from nrm.methods import Clusters


class Score(StrEnum):
    """What is said of a pair of clusters without an intervention."""

    JOINT = "joint"
    """Walks that pass both (eq. 9)."""
    ADDITIVE = "additive"
    """The share of a walk that lies in them (Thm. 3), of the two layers: the mean marginal."""
    EITHER = "either"
    """Walks that pass one of them or both (eq. 54)."""
    PRODUCT = "product"
    """The product of the marginals: LRP, as if the layers did not interact."""
    OVERLAP = "overlap"
    """The share of the picture in both clusters: no relevance at all."""


class Effect(StrEnum):
    """What an intervention says of a pair of clusters."""

    JOINT = "joint"
    """What is lost only if both are removed (eq. 57)."""
    TOTAL = "total"
    """What is lost without both."""


@dataclass(frozen=True, eq=False)
class Compared:
    """One picture and one pair of layers.

    Attributes:
        labels: for each layer `[height, width]`, the cluster at every position.
        scores, effects: `[k, k]`, clusters of the first layer by those of the second. Effects are
            in units of the logit.
    """

    photo: Photo
    layers: Pair
    target: int
    logit: float
    labels: tuple[Tensor, Tensor]
    scores: dict[Score, Tensor]
    effects: dict[Effect, Tensor]

    def correlation(self, score: Score, effect: Effect) -> float | None:
        """Over all pairs of clusters."""
        return pearson(self.scores[score], self.effects[effect])

    def kept(self) -> dict[str, Any]:
        """All but the picture for a file, digit by digit."""
        return {
            "target": self.target,
            "logit": self.logit,
            "labels": [labels.tolist() for labels in self.labels],
            "scores": {score: values.tolist() for score, values in self.scores.items()},
            "contributions": {effect: each.tolist() for effect, each in self.effects.items()},
        }

    @classmethod
    def restored(cls, photo: Photo, layers: Pair, kept: Any) -> Self | None:
        """From what `kept` gave; nothing from anything else."""
        try:
            first, second = (torch.tensor(labels) for labels in kept["labels"])
            found = cls(
                photo,
                layers,
                kept["target"],
                kept["logit"],
                (first, second),
                {score: _matrix(kept["scores"][score]) for score in Score},
                {effect: _matrix(kept["contributions"][effect]) for effect in Effect},
            )
        except (TypeError, KeyError, ValueError):
            return None
        return found


def compare(
    R: Measure, interventions: Interventions, photo: Photo, a: Clusters, b: Clusters
) -> Compared:
    """All pairs of clusters of two layers, for the measure of one picture, and without them."""
    for family in (a, b):
        if family.labels.dim() != 3:
            raise QueryError(f"{family.layer!r} has no height and width, as a picture has.")
    assert R.target is not None
    target = int(R.target[0])
    found = contributions(interventions, a.sets, b.sets)
    return Compared(
        photo,
        (a.layer, b.layer),
        target,
        float(found.output),
        (a.labels[0].cpu(), b.labels[0].cpu()),
        {score: values.double().cpu() for score, values in scores(R, a, b).items()},
        _effects(found),
    )


def scores(R: Measure, a: Clusters, b: Clusters) -> dict[Score, Tensor]:
    """`[clusters of a, clusters of b]`, for a measure of one sample."""
    joint = torch.stack([torch.stack([R(s, t)[0] for t in b]) for s in a])
    first, second = (torch.stack([R(s)[0] for s in family]) for family in (a, b))
    return {
        Score.JOINT: joint,
        Score.ADDITIVE: (first[:, None] + second) / 2,  # Theorem 3: `R.additive` of two layers
        Score.EITHER: first[:, None] + second - joint,  # the addition law
        Score.PRODUCT: first[:, None] * second,
        Score.OVERLAP: overlap(a.labels[0], b.labels[0], len(a), len(b)),
    }


def overlap(a: Tensor, b: Tensor, first: int, second: int) -> Tensor:
    """`[first, second]`: the share of the picture in a cluster of each, at the finer grid.

    Arguments:
        a, b: `[height, width]`, the cluster at every position of each layer.
    """
    size = tuple(max(sides) for sides in zip(a.shape, b.shape, strict=True))
    fine_a, fine_b = (_resized(labels, size) for labels in (a, b))
    pairs = (fine_a * second + fine_b).flatten()
    return torch.bincount(pairs, minlength=first * second).view(first, second) / len(pairs)


def _matrix(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _effects(found: Contributions) -> dict[Effect, Tensor]:
    effects = {Effect.JOINT: found.joint, Effect.TOTAL: found.total}
    return {effect: values.double().cpu() for effect, values in effects.items()}


def _resized(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    wide = torch.nn.functional.interpolate(labels[None, None].double(), size, mode="nearest")
    return wide[0, 0].long()
