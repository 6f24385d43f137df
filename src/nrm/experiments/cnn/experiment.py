"""`cnn-channels` and `cnn-clusters`: joint relevance in a CNN (Table 2, Figs. 5-7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

import nrm
from nrm.evaluation.faithfulness import Evaluation
from nrm.experiments.cnn.drawing import draw_pairs
from nrm.experiments.cnn.layers import pairs
from nrm.experiments.cnn.plan import Plan
from nrm.experiments.cnn.study import METHODS, Shown, Study, typical
from nrm.experiments.cnn.subject import Subject, load
from nrm.experiments.mlp.drawing import colours, draw_correlations, draw_curves, draw_scatter
from nrm.experiments.report import Picture, Report
from nrm.experiments.request import Request
from nrm.progress import counted


class CnnPairs:
    """Relevance of pairs of sets of two layers, beside interventions."""

    options: frozenset[str] = frozenset({"layers", "weights"})

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.name, self.summary = plan.name, plan.summary

    def run(self, request: Request) -> Report:
        """Choose pictures, compare, and draw."""
        named = pairs(request.layers)
        subject = load(request, request.samples or self.plan.samples)
        with torch.no_grad():
            studies = [
                Study(subject, self.plan, layers, request.kept, request.seed)
                for layers in named or self.plan.layers[subject.kind]
            ]
            return report(studies, subject, request)


@dataclass(frozen=True, eq=False)
class Found:
    """What was found of two layers: on all pictures, and on one that is drawn."""

    study: Study
    evaluation: Evaluation
    shown: Shown

    @property
    def title(self) -> str:
        """The layers, to stand over a figure."""
        return "\n".join(self.study.layers)


def report(studies: Sequence[Study], subject: Subject, request: Request) -> Report:
    """All methods on all pictures, for every pair of layers, and figures."""
    plan = studies[0].plan
    found = [_found(study, subject, request) for study in studies]
    rows = [row for one in found for row in one.study.rows(one.evaluation)]
    return Report(
        plan.name,
        f"Joint relevance of {plan.part}s in {subject.kind}, beside interventions",
        rows,
        _pictures(plan, subject, found),
        _facts(found, subject, request.seed),
        _notes(plan, subject, any(row.paper is not None for row in rows)),
        {"layers": [_details(one, subject.classes) for one in found]},
    )


def _found(study: Study, subject: Subject, request: Request) -> Found:
    photos = subject.photos
    request.say(f"{' x '.join(study.layers)}: {len(photos)} pictures …")
    rows = []
    with counted(request.progress, "pictures", len(photos)) as advance:
        for photo in photos:
            rows += study.rows_of(photo)
            advance(1)
    evaluation = study.joined(rows)
    chosen = typical(evaluation)
    request.say(f"figures of {chosen} …")
    shown = study.shown(next(photo for photo in photos if photo.name == chosen))
    return Found(study, evaluation, shown)


_READING = (
    "The Pearson correlation of a score with the joint contribution of two sets of neurons, one "
    "of each layer, to the logit of the predicted class: over all pairs of a picture, then the "
    "mean over pictures. Neurons are removed by setting them to zero.",
    "The NRM with gamma = 0.25 and without biases is the paper's; the other two walks are not. "
    "LRP, occlusion and activation add up what is known of single sets.",
)

_PAPER = {
    "SqueezeNet": "The paper's figures are those of Table 2 for channels of VGG16: another "
    "network, beside which those of SqueezeNet stand for comparison only.",
    "VGG16": "The paper's figures are those of Table 2 for channels of VGG16, on pictures of its "
    "authors' choice.",
}


def _notes(plan: Plan, subject: Subject, papers: bool) -> tuple[str, ...]:
    return (*_READING, *((_PAPER[subject.kind],) if papers else ()), *plan.notes)


def _facts(found: Sequence[Found], subject: Subject, seed: int) -> dict[str, str | int | float]:
    studies = [one.study for one in found]
    plan = studies[0].plan
    k = plan.k.get(subject.kind)
    return {
        "network": subject.said,
        "weights": studies[0].weights,
        "data": f"{len(subject.photos)} {subject.pictures}",
        "explained": "the predicted class",
        **({} if k is None else {"clusters of each layer": k}),
        **{f"pairs of {' and '.join(s.layers)}": s.combinations for s in studies},
        "seed": seed,
        "versions": f"nrm {nrm.__version__}, torch {torch.__version__}",
    }


def _details(found: Found, classes: Sequence[str] | None) -> dict[str, object]:
    evaluation = found.evaluation
    return {
        "layers": found.study.layers,
        "means": [{**line, "method": METHODS[line["method"]]} for line in evaluation.table()],
        "samples": [
            {
                **asdict(row),
                "method": METHODS[row.method],
                "class": None if classes is None else classes[int(str(row.target))],
            }
            for row in evaluation.rows
        ],
    }


def _pictures(plan: Plan, subject: Subject, found: Sequence[Found]) -> list[Picture]:
    colour = colours(list(METHODS.values()))
    rows = [row for one in found for row in one.study.rows(one.evaluation)]
    curves = {one.title: one.study.curves(one.evaluation) for one in found}
    clouds = {f"{one.title}\n{one.shown.photo.name}": one.shown.clouds() for one in found}
    return [
        Picture(
            "correlations.png",
            "Correlation with joint contribution",
            "Means over pictures with 95 % bootstrap intervals.",
            draw_correlations(rows, colour),
        ),
        Picture(
            "curves.png",
            "SC_k: what the most relevant pairs contribute",
            "The joint contributions of the k most relevant pairs, added up, in units of the "
            "logit: means over pictures with 95 % bootstrap intervals. The sooner a curve rises "
            "the better. It falls where pairs of negative contribution are ranked last; all curves "
            "end where all pairs are taken.",
            draw_curves(curves, colour),
        ),
        *(_pairs(plan, subject, one, number, len(found)) for number, one in enumerate(found, 1)),
        Picture(
            "scatter.png",
            "Score and joint contribution, pair by pair",
            "On one picture each, on which the correlation of the paper's walks is the median. "
            "NRM, LRP and occlusion are in units of the logit.",
            draw_scatter(clouds, colour),
        ),
    ]


def _pairs(plan: Plan, subject: Subject, found: Found, number: int, count: int) -> Picture:
    layers, shown = found.study.layers, found.shown
    return Picture(
        "pairs.png" if count == 1 else f"pairs-{number}.png",
        f"The most relevant pairs of {plan.part}s of one picture: {' and '.join(layers)}",
        f"{shown.photo.name}, on which the correlation of the paper's walks is the median. "
        f"For each pair the relevance of pixels jointly with each {plan.part} and with both, "
        "by the paper's walks; above each its relevance, and for both also their joint "
        f"contribution, in logits. The numbers of {plan.part}s begin with 0.",
        draw_pairs(shown, plan, layers, subject.classes),
    )
