"""`cnn-channels` and `cnn-clusters`: joint relevance in a CNN (Table 2, Figs. 5-7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import nrm
from nrm.evaluation.faithfulness import Evaluation
from nrm.experiments.cnn.data import PICTURES, Photo, choose, labels, network, read
from nrm.experiments.cnn.drawing import draw_pairs
from nrm.experiments.cnn.plan import Plan
from nrm.experiments.cnn.study import METHODS, Shown, Study, typical
from nrm.experiments.mlp.drawing import (
    Curve,
    colours,
    draw_correlations,
    draw_curves,
    draw_scatter,
)
from nrm.experiments.report import Picture, Report, Row
from nrm.experiments.request import Request
from nrm.progress import counted


class CnnPairs:
    """Relevance of pairs of sets of two layers, beside interventions."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.name, self.summary = plan.name, plan.summary
        self.options: frozenset[str] = frozenset()

    def run(self, request: Request) -> Report:
        """Choose pictures, compare, and draw."""
        data = Path(request.data)
        files = choose(data / PICTURES, request.samples or self.plan.samples, request.seed)
        study = Study(network(data), self.plan, request.kept, request.seed)
        photos = [read(file) for file in files]
        return report(study, photos, labels(data), request)


def report(
    study: Study, photos: Sequence[Photo], names: Sequence[str] | None, request: Request
) -> Report:
    """All methods on some pictures, and figures of one of them."""
    plan = study.plan
    request.say(f"{' x '.join(plan.layers)}: {len(photos)} pictures …")
    with torch.no_grad():
        rows = []
        with counted(request.progress, "pictures", len(photos)) as advance:
            for photo in photos:
                rows += study.rows_of(photo)
                advance(1)
        found = study.joined(rows)
        chosen = typical(found)
        request.say(f"figures of {chosen} …")
        shown = study.shown(next(photo for photo in photos if photo.name == chosen))
        table = study.rows(found)
        pictures = _pictures(plan, table, study.curves(found), shown, names)
    return Report(
        plan.name,
        plan.title,
        table,
        pictures,
        _facts(study, len(photos)),
        (*_READING, *plan.notes),
        _details(found, names),
    )


_READING = (
    "The Pearson correlation of a score with the joint contribution of two sets of neurons, one "
    "of each layer, to the logit of the predicted class: over all pairs of a picture, then the "
    "mean over pictures. Neurons are removed by setting them to zero.",
    "The NRM with gamma = 0.25 and without biases is the paper's; the other two walks are not. "
    "LRP, occlusion and activation add up what is known of single sets.",
    "With biases as inputs, LRP-0 divides the relevance of a neuron by its activation, of which "
    "it is a multiple: nothing is amplified. What occlusion walks divide by may be nearly zero or "
    "negative: on some pictures a few pairs then have relevances far above the logit, which spoil "
    "the correlation.",
)


def _facts(study: Study, pictures: int) -> dict[str, str | int | float]:
    plan = study.plan
    return {
        "network": "SqueezeNet 1.0, pretrained on ImageNet",
        "weights": study.weights,
        "pictures": pictures,
        "explained": "the predicted class",
        "pairs": plan.combinations,
        **({} if plan.k is None else {"clusters of each layer": plan.k}),
        "seed": study.seed,
        "versions": f"nrm {nrm.__version__}, torch {torch.__version__}",
    }


def _details(found: Evaluation, names: Sequence[str] | None) -> dict[str, object]:
    return {
        "means": [{**line, "method": METHODS[line["method"]]} for line in found.table()],
        "samples": [
            {
                **asdict(row),
                "method": METHODS[row.method],
                "class": None if names is None else names[int(str(row.target))],
            }
            for row in found.rows
        ],
    }


def _pictures(
    plan: Plan,
    rows: Sequence[Row],
    curves: Sequence[Curve],
    shown: Shown,
    names: Sequence[str] | None,
) -> list[Picture]:
    colour = colours(list(METHODS.values()))
    layers = "\n".join(plan.layers)
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
            draw_curves({layers: curves}, colour),
        ),
        Picture(
            "pairs.png",
            f"The most relevant pairs of {plan.part}s of one picture",
            f"{shown.photo.name}, on which the correlation of the paper's walks is the median. "
            f"For each pair the relevance of pixels jointly with each {plan.part} and with both, "
            "by the paper's walks; above each its relevance, and for both also their joint "
            f"contribution, in logits. The numbers of {plan.part}s begin with 0.",
            draw_pairs(shown, plan, names),
        ),
        Picture(
            "scatter.png",
            "Score and joint contribution, pair by pair",
            f"{shown.photo.name}. NRM, LRP and occlusion are in units of the logit.",
            draw_scatter({layers: shown.clouds()}, colour),
        ),
    ]
