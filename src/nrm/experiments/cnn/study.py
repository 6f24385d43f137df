"""Relevance of all pairs beside interventions, by several methods, picture by picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from nrm.evaluation.baselines import SCORES, Families, Score
from nrm.evaluation.faithfulness import Evaluation, evaluate
from nrm.evaluation.faithfulness import Row as Found
from nrm.evaluation.fingerprint import digest
from nrm.evaluation.intervention import Interventions, joint_contributions
from nrm.evaluation.metrics import pearson
from nrm.experiments.cnn.data import Photo
from nrm.experiments.cnn.one_class import of_class
from nrm.experiments.cnn.plan import Plan
from nrm.experiments.cnn.walks import PAPERS
from nrm.experiments.mlp.drawing import Cloud, Curve
from nrm.experiments.report import Row
from nrm.experiments.walks import OTHERS, JointRelevance
from nrm.measure import Measure

BASELINES = {"lrp": "LRP", "occlusion": "occlusion", "activation": "activation"}
"""What `evaluate` calls them, and tables do."""

METHODS = {walks.key: walks.method for walks in (PAPERS, *OTHERS)} | BASELINES
"""In the order of tables and figures."""


@dataclass(frozen=True, eq=False)
class Shown:
    """One picture with all of its pairs.

    Attributes:
        number: of the explained class.
        R: the measure by the paper's walks, of a network that has this class only.
        scores: by method, `[sets of the first layer, of the second]`.
        contribution: of the same shape, in logits.
    """

    photo: Photo
    number: int
    R: Measure
    families: Families
    scores: dict[str, Tensor]
    contribution: Tensor

    def clouds(self) -> list[Cloud]:
        """Scatter plots of every method."""
        return [
            Cloud(
                METHODS[key],
                pearson(score, self.contribution),
                score.flatten().numpy(),
                self.contribution.flatten().numpy(),
            )
            for key, score in self.scores.items()
        ]

    def top(self, count: int) -> list[tuple[int, int]]:
        """The most relevant pairs by the paper's walks, the first being the most relevant."""
        flat = self.scores[PAPERS.key].flatten() / self.R.scale
        columns = self.contribution.shape[1]
        found = flat.topk(min(count, len(flat))).indices.tolist()
        return [divmod(place, columns) for place in found]


class Study:
    """One network and one plan.

    Arguments:
        kept: a folder for what an interrupted run leaves.
    """

    def __init__(self, model: nn.Module, plan: Plan, kept: Path, seed: int) -> None:
        self.model, self.plan, self.seed = model, plan, seed
        self.weights = digest(model)[:12]
        self._by = plan.by(seed)
        self._ks = steps(plan.combinations)
        # By the weights: what was found with others is of no use.
        self._kept = kept / f"{plan.name}-{self.weights}-{seed}"

    def rows_of(self, photo: Photo) -> list[Found]:
        """All methods on one picture, as they were kept or found."""
        number = self.explained(photo)
        model = of_class(self.model, number)
        found = evaluate(
            PAPERS.explainer(model),
            [(photo.name, photo.x)],
            self.plan.layers,
            by=self._by,
            methods=self._scores(model),
            ks=self._ks,
            target=0,
            store=self._kept / f"class-{number}",
            seed=self.seed,
        )
        return [replace(row, target=number) for row in found.rows]

    def joined(self, rows: Sequence[Found]) -> Evaluation:
        """The rows of all pictures."""
        return Evaluation(self.plan.layers, tuple(rows), self.seed)

    def explained(self, photo: Photo) -> int:
        """The class with the largest logit."""
        return int(self.model(photo.x)[0].argmax())

    def rows(self, found: Evaluation) -> list[Row]:
        """The table's."""
        rows = []
        for key, method in METHODS.items():
            mean = found.mean(key)
            rows.append(
                Row(
                    self.plan.name,
                    self.plan.layers,
                    method,
                    mean.mean,
                    mean.low,
                    mean.high,
                    self.plan.paper.get(key),
                    mean.samples,
                )
            )
        return rows

    def curves(self, found: Evaluation) -> list[Curve]:
        """SC_k of every method."""
        curves = []
        for key, method in METHODS.items():
            means = [found.mean(key, f"SC_{k}") for k in self._ks]
            ends = np.array([[m.mean, m.low, m.high] for m in means], dtype=np.float64).T
            curves.append(Curve(method, self._ks, *ends))
        return curves

    def shown(self, photo: Photo) -> Shown:
        """One picture with all of its pairs, to be drawn."""
        number = self.explained(photo)
        model = of_class(self.model, number)
        explainer = PAPERS.explainer(model)
        R = explainer(photo.x, target=0)
        families = Families(R, self.plan.layers, self._by)
        interventions = Interventions(explainer, photo.x, target=0)
        contribution = joint_contributions(interventions, *families.sets)
        scores = {key: score(families, interventions) for key, score in self._scores(model).items()}
        return Shown(photo, number, R, families, scores, contribution)

    def _scores(self, model: nn.Module) -> dict[str, Score]:
        others = {w.key: JointRelevance(w, model, self.plan.layers, self._by) for w in OTHERS}
        return {
            PAPERS.key: SCORES["joint"],
            **others,
            **{name: SCORES[name] for name in BASELINES},
        }


def typical(found: Evaluation) -> str:
    """The picture on which the correlation of the paper's walks is the median."""
    names = [row.sample for row in found.rows if row.method == PAPERS.key]
    known = [
        (value, name)
        for value, name in zip(found.values(PAPERS.key), names, strict=True)
        if value is not None
    ]
    return sorted(known)[len(known) // 2][1] if known else names[0]


def steps(most: int) -> tuple[int, ...]:
    """1, 2, 3, 5, 7, 10, 15, 20, … and the last."""
    found = {
        tenths * 10**power // 10
        for power in range(len(str(most)))
        for tenths in (10, 15, 20, 30, 50, 70)
    }
    return (*sorted(k for k in found if k < most), most)
