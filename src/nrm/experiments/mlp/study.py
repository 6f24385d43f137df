"""Relevance of all combinations of neurons beside interventions, by several methods (4.1, 4.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nrm.evaluation import (
    Evaluation,
    Families,
    Interventions,
    evaluate,
    joint_contributions,
    pearson,
)
from nrm.evaluation.faithfulness import SCORES, Score
from nrm.experiments import comparison
from nrm.experiments.comparison import BASELINES, steps
from nrm.experiments.mlp.data import Part
from nrm.experiments.mlp.drawing import Array, Cloud, Curve
from nrm.experiments.mlp.network import INPUT, LAYERS, Trained
from nrm.experiments.mlp.walks import PAPERS
from nrm.experiments.tables import Row
from nrm.experiments.walks import OTHERS, JointRelevance, Walks

WALKS = (PAPERS, *OTHERS)
METHODS = {walks.key: walks.method for walks in WALKS} | BASELINES
"""In the order of tables and figures."""

DOTS = 20_000
"""At most so many points of a scatter plot are drawn."""


@dataclass(frozen=True)
class Order:
    """Combinations of one neuron of each of some layers.

    Attributes:
        most: the largest k of SC_k; to order more of them takes longer than to find them.
        samples, choosing: on how many pictures by default, and on how many walks are chosen.
        paper: the correlations of Table 2, by method.
    """

    layers: tuple[str, ...]
    most: int
    samples: int
    choosing: int
    paper: dict[str, float]


SECOND = Order(
    LAYERS,
    most=100_000,
    samples=100,
    choosing=20,
    paper={"joint": 0.947, "lrp": 0.46, "occlusion": 0.20, "activation": 0.15},
)
THIRD = Order((INPUT, *LAYERS), most=100_000, samples=100, choosing=4, paper={"joint": 0.447})


class Study:
    """One network and one choice of layers."""

    def __init__(self, network: Trained, order: Order, kept: Path, seed: int) -> None:
        self.network = network
        self.order = order
        self.seed = seed
        # By the weights: what was found with others is of no use.
        self._kept = kept / f"{network.digest}-{seed}" / f"{len(order.layers)}-layers"
        self._ks = steps(min(order.most, network.combinations(order.layers)))
        self._explainer = PAPERS.explainer(network.model)

    def choose(self, part: Part, progress: bool) -> tuple[Walks, Evaluation]:
        """The walks that agree best with interventions on pictures not reported on."""
        found = self._evaluate(
            part, self.order.choosing, "choosing", self._scores(WALKS), (), progress
        )
        means = [(found.mean(walks.key).mean, walks) for walks in WALKS]
        known = [(mean, walks) for mean, walks in means if mean is not None]
        return max(known, key=lambda pair: pair[0], default=(0.0, PAPERS))[1], found

    def report(self, part: Part, count: int, progress: bool) -> Evaluation:
        """All methods on the first pictures of the test set."""
        scores = self._scores(WALKS) | {name: SCORES[name] for name in BASELINES}
        return self._evaluate(part, count, "test", scores, self._ks, progress)

    def rows(self, experiment: str, found: Evaluation) -> list[Row]:
        """The table's."""
        return comparison.rows(experiment, found, METHODS, self.order.paper)

    def curves(self, found: Evaluation) -> list[Curve]:
        """SC_k of every method."""
        return comparison.curves(found, METHODS, self._ks)

    def clouds(self, part: Part) -> list[Cloud]:
        """Scatter plots of the first picture."""
        x = part.x[:1]
        R = self._explainer(x)
        assert R.target is not None
        families = Families(R, self.order.layers, "neuron")
        interventions = Interventions(self._explainer, x, target=int(R.target[0]))
        contribution = joint_contributions(interventions, *families.sets)
        scores = self._scores(WALKS) | {name: SCORES[name] for name in BASELINES}
        clouds = []
        for key, score in scores.items():
            values = score(families, interventions)
            shown = some(values.flatten().numpy(), contribution.flatten().numpy(), self.seed)
            clouds.append(Cloud(METHODS[key], pearson(values, contribution), *shown))
        return clouds

    def _scores(self, several: Iterable[Walks]) -> dict[str, Score]:
        return {
            walks.key: SCORES["joint"]
            if walks is PAPERS
            else JointRelevance(walks, self.network.model, self.order.layers)
            for walks in several
        }

    def _evaluate(
        self,
        part: Part,
        count: int,
        name: str,
        scores: dict[str, Score],
        ks: tuple[int, ...],
        progress: bool,
    ) -> Evaluation:
        samples = [(f"{name} {n}", part.x[n : n + 1]) for n in range(min(count, len(part)))]
        return evaluate(
            self._explainer,
            samples,
            self.order.layers,
            by="neuron",
            methods=scores,
            ks=ks,
            ranked=0,
            progress=progress,
            store=self._kept / name,
            seed=self.seed,
        )


def some(score: Array, contribution: Array, seed: int, most: int = DOTS) -> tuple[Array, Array]:
    """At most so many points: the farthest from the origin, and others by chance.

    These are drawn the likelier the farther they are. Of millions of combinations nearly all lie
    at the origin: a plot of some drawn alike shows nothing else.
    """
    if len(score) <= most:
        return score, contribution
    sizes = (np.abs(values) for values in (score, contribution))
    far = np.add(*(size / (float(size.max()) or 1.0) for size in sizes)).astype(np.float32)
    # The smallest of exponential times with rates `far` are a weighted draw without replacement.
    times = np.random.default_rng(seed).standard_exponential(len(score), dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):  # what has no size comes last
        times /= far
    sure = most // 10
    times[np.argpartition(-far, sure)[:sure]] = 0
    chosen = np.argpartition(times, most)[:most]
    return score[chosen], contribution[chosen]
