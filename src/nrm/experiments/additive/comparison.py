"""Relevance of pairs of clusters, and its correlation with what the network loses without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from nrm.clusters import Clusters, clusters
from nrm.errors import InputError, QueryError
from nrm.evaluation import Interventions, pearson
from nrm.experiments.additive.contribution import Contributions, contributions
from nrm.experiments.additive.correlation import additive_ceiling, mean_with_interval
from nrm.explainer import Explainer
from nrm.measure import Measure

Pair = tuple[str, str]


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
class Sample:
    """A picture.

    Attributes:
        x: the model's input, `[1, C, H, W]`.
        shown: `[H, W, 3]` or `[H, W]` from 0 to 1.
    """

    name: str
    x: Tensor
    shown: Any


@dataclass(frozen=True, eq=False)
class Compared:
    """One picture and one pair of layers.

    Attributes:
        labels: for each layer `[height, width]`, the cluster at every position.
        scores, effects: `[k, k]`, clusters of the first layer by those of the second. Effects are
            in units of the logit.
    """

    sample: Sample
    layers: Pair
    target: int
    logit: float
    labels: tuple[Tensor, Tensor]
    scores: dict[Score, Tensor]
    effects: dict[Effect, Tensor]

    def correlation(self, score: Score, effect: Effect) -> float | None:
        """Over all pairs of clusters."""
        return pearson(self.scores[score], self.effects[effect])


def compare(
    R: Measure, interventions: Interventions, sample: Sample, a: Clusters, b: Clusters
) -> Compared:
    """All pairs of clusters of two layers, for the measure of one picture, and without them."""
    for family in (a, b):
        if family.labels.dim() != 3:
            raise QueryError(f"{family.layer!r} has no height and width, as a picture has.")
    assert R.target is not None
    target = int(R.target[0])
    found = contributions(interventions, a.sets, b.sets)
    return Compared(
        sample,
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


def experiment(
    explainer: Explainer,
    samples: Iterable[Sample],
    layers: Sequence[str],
    k: int,
    seed: int = 0,
    done: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], list[Compared]]:
    """Compare every pair of layers on every picture, each for the class with the largest logit.

    Arguments:
        done: called after every picture.

    Returns:
        what `additive.json` of the results holds, and the first pair of layers on all pictures.
    """
    if len(set(layers)) < 2 or len(set(layers)) < len(layers):
        raise QueryError(f"name at least two layers, each once, not {', '.join(layers)}")
    pairs = list(combinations(layers, 2))
    found: dict[Pair, list[Compared]] = {pair: [] for pair in pairs}
    composite = ""
    for sample in samples:
        R = explainer(sample.x)
        interventions = Interventions(explainer, sample.x, target=R.target)
        composite = repr(R.graph.specification)
        parts = {layer: clusters(R, layer, k, seed) for layer in layers}
        for a, b in pairs:
            found[a, b].append(compare(R, interventions, sample, parts[a], parts[b]))
        done()
    if not composite:
        raise InputError("there are no pictures to explain")
    result = {
        "composite": composite,
        "clusters": k,
        "seed": seed,
        "pairs": [_summary(pair, compared, seed) for pair, compared in found.items()],
    }
    return result, found[pairs[0]]


def _summary(pair: Pair, compared: Sequence[Compared], seed: int) -> dict[str, Any]:
    """One pair of layers over all pictures."""
    each = {
        effect: {score: [one.correlation(score, effect) for one in compared] for score in Score}
        for effect in Effect
    }
    return {
        "layers": list(pair),
        "correlations": {
            effect: {score: _mean(values, seed) for score, values in by_score.items()}
            for effect, by_score in each.items()
        },
        "additive_ceiling": {
            effect: _mean([additive_ceiling(one.effects[effect]) for one in compared], seed)
            for effect in Effect
        },
        "joint_minus_additive": {
            effect: _mean(_differences(by_score[Score.JOINT], by_score[Score.ADDITIVE]), seed)
            for effect, by_score in each.items()
        },
        "either_minus_additive": {
            effect: _mean(_differences(by_score[Score.EITHER], by_score[Score.ADDITIVE]), seed)
            for effect, by_score in each.items()
        },
        "pictures": [
            {
                "picture": one.sample.name,
                "target": one.target,
                "logit": one.logit,
                "correlations": {
                    effect: {score: each[effect][score][number] for score in Score}
                    for effect in Effect
                },
                "scores": {score: values.tolist() for score, values in one.scores.items()},
                "contributions": {e: values.tolist() for e, values in one.effects.items()},
            }
            for number, one in enumerate(compared)
        ],
    }


def _mean(values: Sequence[float | None], seed: int) -> dict[str, Any] | None:
    found = mean_with_interval(values, seed)
    return None if found is None else asdict(found)


def _differences(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


def _effects(found: Contributions) -> dict[Effect, Tensor]:
    effects = {Effect.JOINT: found.joint, Effect.TOTAL: found.total}
    return {effect: values.double().cpu() for effect, values in effects.items()}


def _resized(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    wide = torch.nn.functional.interpolate(labels[None, None].double(), size, mode="nearest")
    return wide[0, 0].long()
