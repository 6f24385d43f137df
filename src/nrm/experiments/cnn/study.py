"""Relevance of all pairs beside interventions, by several methods, picture by picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from nrm.evaluation.faithfulness import SCORES, Evaluation, Families, Score, evaluate
from nrm.evaluation.faithfulness import Row as Found
from nrm.evaluation.fingerprint import digest
from nrm.evaluation.intervention import Interventions, joint_contributions
from nrm.evaluation.metrics import pearson
from nrm.experiments import comparison
from nrm.experiments.cnn.data import Photo
from nrm.experiments.cnn.layers import Pair, combinations
from nrm.experiments.cnn.one_class import of_class
from nrm.experiments.cnn.plan import Plan
from nrm.experiments.cnn.subject import Subject
from nrm.experiments.cnn.walks import PAPERS
from nrm.experiments.comparison import BASELINES, steps
from nrm.experiments.mlp.drawing import Cloud, Curve
from nrm.experiments.tables import Row
from nrm.experiments.walks import OTHERS, JointRelevance
from nrm.explainer import Explainer
from nrm.measure import Measure

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
    """One network and two of its layers.

    Arguments:
        kept: a folder for what an interrupted run leaves.

    Attributes:
        combinations: how many pairs of sets there are, up to which SC_k goes.

    Raises:
        UnknownLayerError, QueryError: the layers cannot be compared.
    """

    def __init__(self, subject: Subject, plan: Plan, layers: Pair, kept: Path, seed: int) -> None:
        self.model, self.plan, self.layers, self.seed = subject.model, plan, layers, seed
        self.weights = digest(self.model)[:12]
        self._by = plan.by(subject.kind, seed)
        self._narrow: dict[int, tuple[Explainer, dict[str, Score]]] = {}
        first = subject.photos[0]
        explainer, _ = self._of_class(self.explained(first))
        self.combinations = combinations(explainer.graph(first.x), layers, plan.k.get(subject.kind))
        self._paper = plan.papers(subject.kind, layers)
        self._ks = steps(self.combinations)
        # By the weights: what was found with others is of no use.
        self._kept = kept / f"{plan.name}-{self.weights}-{seed}" / digest(layers)[:12]

    def rows_of(self, photo: Photo) -> list[Found]:
        """All methods on one picture, as they were kept or found."""
        number = self.explained(photo)
        explainer, scores = self._of_class(number)
        found = evaluate(
            explainer,
            [(photo.name, photo.x)],
            self.layers,
            by=self._by,
            methods=scores,
            ks=self._ks,
            target=0,
            store=self._kept / f"class-{number}",
            seed=self.seed,
        )
        return [replace(row, target=number) for row in found.rows]

    def joined(self, rows: Sequence[Found]) -> Evaluation:
        """The rows of all pictures."""
        return Evaluation(self.layers, tuple(rows), self.seed)

    def explained(self, photo: Photo) -> int:
        """The class with the largest logit."""
        return int(self.model(photo.x)[0].argmax())

    def rows(self, found: Evaluation) -> list[Row]:
        """The table's."""
        return comparison.rows(self.plan.name, found, METHODS, self._paper)

    def curves(self, found: Evaluation) -> list[Curve]:
        """SC_k of every method."""
        return comparison.curves(found, METHODS, self._ks)

    def shown(self, photo: Photo) -> Shown:
        """One picture with all of its pairs, to be drawn."""
        number = self.explained(photo)
        explainer, methods = self._of_class(number)
        R = explainer(photo.x, target=0)
        families = Families(R, self.layers, self._by)
        interventions = Interventions(explainer, photo.x, target=0)
        contribution = joint_contributions(interventions, *families.sets)
        scores = {key: score(families, interventions) for key, score in methods.items()}
        return Shown(photo, number, R, families, scores, contribution)

    def _of_class(self, number: int) -> tuple[Explainer, dict[str, Score]]:
        """The paper's walks and all methods, for a class; captured once while it stays the same."""
        if number not in self._narrow:
            self._narrow.clear()  # each holds modified weights: those of VGG16 take gigabytes
            model = of_class(self.model, number)
            others = {w.key: JointRelevance(w, model, self.layers, self._by) for w in OTHERS}
            self._narrow[number] = (
                PAPERS.explainer(model),
                {
                    PAPERS.key: SCORES["joint"],
                    **others,
                    **{name: SCORES[name] for name in BASELINES},
                },
            )
        return self._narrow[number]


def typical(found: Evaluation) -> str:
    """The picture on which the correlation of the paper's walks is the median."""
    names = [row.sample for row in found.rows if row.method == PAPERS.key]
    known = [
        (value, name)
        for value, name in zip(found.values(PAPERS.key), names, strict=True)
        if value is not None
    ]
    return sorted(known)[len(known) // 2][1] if known else names[0]
