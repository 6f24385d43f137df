"""`additive`: additive and joint relevance beside interventions (Def. 3, Fig. A.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

import nrm
from nrm.experiments.additive.comparison import Compared
from nrm.experiments.additive.correlation import Mean
from nrm.experiments.additive.drawing import EFFECTS, SCORES, draw
from nrm.experiments.additive.study import COMPOSITE, Study, details, limits, means
from nrm.experiments.cnn.layers import Pair, pairs
from nrm.experiments.cnn.subject import Kind, Subject, load
from nrm.experiments.report import Picture, Report
from nrm.experiments.request import Request
from nrm.experiments.tables import Row, Table
from nrm.progress import counted

SAMPLES = 24
CLUSTERS = 5
"""In each layer."""
LAYERS: Mapping[Kind, Pair] = {
    "SqueezeNet": ("features.10", "features.12"),
    "VGG16": ("features.22", "features.29"),
    "DigitNet": ("relu2", "relu3"),
}
"""After their activation functions, where nothing is what removal leaves."""


class Additive:
    """Pairs of clusters of two layers."""

    name = "additive"
    summary = "additive and joint relevance beside interventions (Def. 3, Fig. A.3)"
    options = frozenset({"layers", "weights"})

    def run(self, request: Request) -> Report:
        """Choose pictures, compare, and draw."""
        named = pairs(request.layers)
        subject = load(request, request.samples or SAMPLES)
        layers = named or [LAYERS[subject.kind]]
        study = Study(subject, layers, CLUSTERS, request.kept, request.seed)
        request.say(f"{len(subject.photos)} pictures …")
        each: list[list[Compared]] = []
        with torch.no_grad(), counted(request.progress, "pictures", len(subject.photos)) as tell:
            for photo in subject.photos:
                each.append(study.compared(photo))
                tell(1)
        return report(study, subject, list(zip(*each, strict=True)))


def report(study: Study, subject: Subject, found: Sequence[Sequence[Compared]]) -> Report:
    """Tables and figures of every pair of layers, each on all pictures."""
    return Report(
        Additive.name,
        f"Additive and joint relevance in {subject.kind}, beside interventions",
        [row for compared in found for row in _rows(compared, study.seed)],
        [
            _picture(compared, number, subject, study.seed)
            for number, compared in enumerate(found, 1)
        ],
        {
            "network": subject.said,
            "weights": study.weights,
            "rules": repr(COMPOSITE),
            "pictures": len(subject.photos),
            "explained": "the predicted class",
            "clusters of each layer": study.k,
            "seed": study.seed,
            "versions": f"nrm {nrm.__version__}, torch {torch.__version__}",
        },
        _READING,
        {"pairs": [details(compared, study.seed) for compared in found]},
        heading="Correlation with what removing two clusters does",
        tables=[_limits(found, study.seed)],
    )


_READING = (
    "The Pearson correlation of a score with what the logit of the predicted class loses: over "
    "all pairs of clusters of a picture, one of each layer, then the mean over pictures, with a "
    "95 % bootstrap interval. Clusters are removed by setting their neurons to zero. The total "
    "contribution is what is lost without both, the joint contribution what is lost only if both "
    "are removed.",
    "Joint relevance is of walks that pass both clusters, either of those that pass one of them or "
    "both, additive relevance their mean. Product is that of the marginal relevances. Overlap is "
    "the share of the picture in both clusters, and no relevance at all.",
    "The paper gives a figure and no numbers.",
)


def _rows(compared: Sequence[Compared], seed: int) -> list[Row]:
    rows = []
    for effect, by_score in means(compared, seed).items():
        for score, found in by_score.items():
            mean, low, high, pictures = _ends(found)
            method = f"{SCORES[score]}, with {EFFECTS[effect]}"
            layers = compared[0].layers
            rows.append(Row(Additive.name, layers, method, mean, low, high, None, pictures))
    return rows


_LIMITS = {
    "additive_ceiling": "any score that adds up over the layers, at most",
    "joint_minus_additive": "joint relevance minus additive relevance",
    "either_minus_additive": "either minus additive relevance",
}


def _limits(found: Sequence[Sequence[Compared]], seed: int) -> Table:
    lines = [
        (", ".join(compared[0].layers), EFFECTS[effect], _LIMITS[name], *_ends(mean))
        for compared in found
        for effect, by_name in limits(compared, seed).items()
        for name, mean in by_name.items()
    ]
    return Table(
        "What additive relevance lacks",
        ("layers", "with", "correlation of", "mean", "from", "to", "pictures"),
        lines,
        group=2,
        note="Differences are picture by picture. The largest correlation of scores that add up "
        "is that of the best such score, fitted to the contributions themselves.",
    )


def _ends(mean: Mean | None) -> tuple[float | None, float | None, float | None, int]:
    return (
        (None, None, None, 0) if mean is None else (mean.mean, mean.low, mean.high, mean.pictures)
    )


def _picture(compared: Sequence[Compared], number: int, subject: Subject, seed: int) -> Picture:
    return Picture(
        "additive.png" if number == 1 else f"additive-{number}.png",
        f"Pairs of clusters of {' and '.join(compared[0].layers)}",
        "Above: the picture on which the correlation of joint relevance with joint contribution "
        "is the median. Middle: all its pairs of clusters, for relevance the shares of the whole, "
        "for contributions those of the logit; every matrix has a scale of its own. Below: the "
        "pairs of all pictures, and mean correlations with 95 % bootstrap intervals.",
        draw(compared, means(compared, seed), subject.classes),
    )
