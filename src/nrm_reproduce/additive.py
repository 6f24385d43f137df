"""`additive`: additive and joint relevance beside interventions (Def. 3, Fig. A.3).

For every picture, the clusters of two layers and all pairs of them: their joint relevance (eq. 9),
their additive relevance (Def. 3, Thm. 3), and what the network loses without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from torch import Tensor

from nrm import Clusters, Explainer, Measure, clusters
from nrm.composites import GammaFlat
from nrm.errors import QueryError
from nrm.evaluation import Interventions, Mean, bootstrap, pearson
from nrm.evaluation.fingerprint import digest
from nrm.evaluation.store import Store
from nrm.progress import counted
from nrm_reproduce.cnn import Pair, count_pairs, layer_pairs
from nrm_reproduce.comparison import Array, Cloud, draw_correlations, draw_scatter, some
from nrm_reproduce.data import Photo
from nrm_reproduce.networks import Kind, Pictured, pictured
from nrm_reproduce.report import (
    Experiment,
    Picture,
    Report,
    Request,
    Row,
    Table,
    versions,
)

NAME = "additive"
COMPOSITE = GammaFlat(0.25)
SAMPLES = 24
CLUSTERS = 5
"""In each layer."""
LAYERS: Mapping[Kind, Pair] = {
    "SqueezeNet": ("features.10", "features.12"),
    "VGG16": ("features.22", "features.29"),
    "DigitNet": ("relu2", "relu3"),
}
"""After their activation functions, where nothing is what removal leaves."""
RESAMPLES = 10_000
"""Of the bootstrap."""
MOST_NUMBERS = 8
"""Matrices of more clusters have no numbers in them, which would not be legible."""

_PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#995522", "#777777")


# -- pairs of clusters, and what the network loses without them -----------------------------------


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


SCORES = {
    Score.JOINT: "joint relevance",
    Score.ADDITIVE: "additive relevance",
    Score.EITHER: "either",
    Score.PRODUCT: "product",
    Score.OVERLAP: "overlap",
}
EFFECTS = {Effect.JOINT: "joint contribution", Effect.TOTAL: "total contribution"}
"""What tables and figures call them."""
DRAWN = (
    (Score.JOINT, Effect.JOINT),
    (Score.ADDITIVE, Effect.JOINT),
    (Score.ADDITIVE, Effect.TOTAL),
)
"""Which are drawn against each other."""


@dataclass(frozen=True, eq=False)
class Compared:
    """One picture and one pair of layers.

    Attributes:
        kept: all that was found, as JSON takes it and a report holds it: `target`, `logit`;
            `labels`, for each layer `[height, width]`, the cluster at every position; `scores`
            and `contributions` `[k, k]` by name, clusters of the first layer by those of the
            second, contributions in units of the logit.
    """

    photo: Photo
    layers: Pair
    kept: Mapping[str, Any]

    @property
    def labels(self) -> list[Array]:
        """The cluster at every position, for each layer."""
        return [np.array(labels) for labels in self.kept["labels"]]

    def score(self, score: Score) -> Tensor:
        """`[k, k]`: what is said of every pair of clusters."""
        return torch.tensor(self.kept["scores"][score], dtype=torch.float64)

    def effect(self, effect: Effect) -> Tensor:
        """`[k, k]`: what an intervention says of it, in units of the logit."""
        return torch.tensor(self.kept["contributions"][effect], dtype=torch.float64)

    def share(self, effect: Effect) -> Array:
        """The same, divided by the logit."""
        return self.effect(effect).numpy() / (self.kept["logit"] or 1.0)

    def correlation(self, score: Score, effect: Effect) -> float | None:
        """Over all pairs of clusters."""
        return pearson(self.score(score), self.effect(effect))


def compare(R: Measure, interventions: Interventions, a: Clusters, b: Clusters) -> dict[str, Any]:
    """All pairs of clusters of two layers, for the measure of one picture, and without them."""
    for family in (a, b):
        if family.labels.dim() != 3:
            raise QueryError(f"{family.layer!r} has no height and width, as a picture has.")
    assert R.target is not None
    return {
        "target": int(R.target[0]),
        "logit": float(interventions.output),
        "labels": [family.labels[0].tolist() for family in (a, b)],
        "scores": {score: v.double().tolist() for score, v in scores(R, a, b).items()},
        "contributions": {
            effect: v.double().tolist() for effect, v in effects(interventions, a, b).items()
        },
    }


def effects(interventions: Interventions, a: Clusters, b: Clusters) -> dict[Effect, Tensor]:
    """`[clusters of a, clusters of b]`: what the output loses without two of them.

    `joint` is `f(x) - f(x \\ S_a) - f(x \\ S_b) + f(x \\ (S_a | S_b))` (eq. 57), `total` is
    `f(x) - f(x \\ (S_a | S_b))`.
    """
    joint = interventions.joint(a.sets, b.sets)
    first, second = (
        interventions.output - interventions.without([[one] for one in family.sets])
        for family in (a, b)
    )
    return {Effect.JOINT: joint, Effect.TOTAL: first[:, None] + second - joint}


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


def _resized(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    wide = torch.nn.functional.interpolate(labels[None, None].double(), size, mode="nearest")
    return wide[0, 0].long()


# -- all pictures and pairs of layers -------------------------------------------------------------


class Study:
    """Some pairs of layers of one network.

    Arguments:
        k: clusters in each layer.
        kept: a folder for what an interrupted run leaves.

    Raises:
        UnknownLayerError, QueryError: layers that cannot be compared.
    """

    def __init__(
        self, network: Pictured, pairs: Sequence[Pair], k: int, kept: Path, seed: int
    ) -> None:
        self.explainer = Explainer(network.model, COMPOSITE)
        self.pairs, self.k, self.seed = tuple(pairs), k, seed
        self.weights = digest(network.model)[:12]
        graph = self.explainer.graph(network.photos[0].x)
        for pair in pairs:
            count_pairs(graph, pair, k)  # refuses before anything takes long
        # By the weights: what was found with others is of no use.
        place = kept / f"{NAME}-{self.weights}-{k}-{seed}"
        settings = {"clusters": k, "composite": repr(COMPOSITE), "weights": self.weights}
        self._stores = {
            pair: Store(place / digest(pair)[:12], {"layers": pair, "seed": seed, **settings})
            for pair in pairs
        }

    def compared(self, photo: Photo) -> list[Compared]:
        """Every pair of layers on one picture, as it was kept or found; for the largest logit."""

        @cache
        def asked() -> tuple[Measure, Interventions]:
            R = self.explainer(photo.x)
            return R, Interventions(self.explainer, photo.x, target=R.target)

        @cache
        def parts(layer: str) -> Clusters:
            return clusters(asked()[0], layer, self.k, self.seed)

        def found(pair: Pair) -> dict[str, Any]:
            return {"picture": photo.name, **compare(*asked(), *map(parts, pair))}

        keys = {pair: digest([photo.name, photo.x, pair]) for pair in self.pairs}
        return [
            Compared(photo, pair, self._stores[pair].once(key, partial(found, pair)))
            for pair, key in keys.items()
        ]


Means = dict[Effect, dict[Score, Mean]]


def means(compared: Sequence[Compared], seed: int) -> Means:
    """The mean correlation of every score with every effect, over all pictures."""
    return {
        effect: {
            score: _mean([one.correlation(score, effect) for one in compared], seed)
            for score in Score
        }
        for effect in Effect
    }


def limits(compared: Sequence[Compared], seed: int) -> dict[Effect, dict[str, Mean]]:
    """How large a correlation of additive scores can be, and what they lack, over all pictures."""
    found: dict[Effect, dict[str, Mean]] = {}
    for effect in Effect:
        joint, additive, either = (
            [one.correlation(score, effect) for one in compared]
            for score in (Score.JOINT, Score.ADDITIVE, Score.EITHER)
        )
        ceilings = [additive_ceiling(one.effect(effect)) for one in compared]
        found[effect] = {
            "additive_ceiling": _mean(ceilings, seed),
            "joint_minus_additive": _mean(_differences(joint, additive), seed),
            "either_minus_additive": _mean(_differences(either, additive), seed),
        }
    return found


def additive_ceiling(values: Tensor) -> float | None:
    """The largest correlation that any sum of a number for each row and one for each column has.

    No score that is additive over the two layers can do better, whatever it gives each set.
    """
    values = values.double()
    return pearson(values.mean(1, keepdim=True) + values.mean(0), values)


def _mean(values: Sequence[float | None], seed: int) -> Mean:
    return bootstrap(values, seed, RESAMPLES)


def _differences(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


# -- the experiment -------------------------------------------------------------------------------


def run(request: Request) -> Report:
    """Choose pictures, compare pairs of clusters of two layers, and draw."""
    named = layer_pairs(request.layers)
    network = pictured(request, request.samples or SAMPLES)
    layers = named or [LAYERS[network.kind]]
    study = Study(network, layers, CLUSTERS, request.kept, request.seed)
    photos = network.photos
    request.say(f"{len(photos)} pictures …")
    each: list[list[Compared]] = []
    with torch.no_grad(), counted(request.progress, "pictures", len(photos)) as advance:
        for photo in photos:
            each.append(study.compared(photo))
            advance(1)
    return report(study, network, list(zip(*each, strict=True)))


def report(study: Study, network: Pictured, found: Sequence[Sequence[Compared]]) -> Report:
    """Tables and figures of every pair of layers, each on all pictures."""
    rows = [row for compared in found for row in _rows(compared, study.seed)]
    return Report(
        NAME,
        f"Additive and joint relevance in {network.kind}, beside interventions",
        rows,
        _pictures(found, rows, network.classes, study.seed),
        {
            "network": network.said,
            "weights": study.weights,
            "rules": repr(COMPOSITE),
            "pictures": len(network.photos),
            "explained": "the predicted class",
            "clusters of each layer": study.k,
            "seed": study.seed,
            "versions": versions(),
        },
        _READING,
        {"pairs": [_details(compared) for compared in found]},
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
    found = []
    for effect, by_score in means(compared, seed).items():
        for score, mean in by_score.items():
            ends = mean.mean, mean.low, mean.high, None, mean.samples
            found.append(Row(NAME, compared[0].layers, _method(score, effect), *ends))
    return found


def _method(score: Score, effect: Effect) -> str:
    return f"{SCORES[score]}, with {EFFECTS[effect]}"


def _details(compared: Sequence[Compared]) -> dict[str, Any]:
    """One pair of layers: all that was found on every picture."""
    return {
        "layers": list(compared[0].layers),
        "pictures": [
            {
                **one.kept,
                "correlations": {
                    effect: {score: one.correlation(score, effect) for score in Score}
                    for effect in Effect
                },
            }
            for one in compared
        ],
    }


_LIMITS = {
    "additive_ceiling": "any score that adds up over the layers, at most",
    "joint_minus_additive": "joint relevance minus additive relevance",
    "either_minus_additive": "either minus additive relevance",
}


def _limits(found: Sequence[Sequence[Compared]], seed: int) -> Table:
    lines = [
        (", ".join(compared[0].layers), EFFECTS[effect], _LIMITS[name], *astuple(mean))
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


def _pictures(
    found: Sequence[Sequence[Compared]], rows: Sequence[Row], names: Sequence[str] | None, seed: int
) -> list[Picture]:
    colour = {
        _method(score, effect): shade
        for effect, shade in ((Effect.JOINT, "#b2182b"), (Effect.TOTAL, "#4d4d4d"))
        for score in Score
    }
    clouds = {"\n".join(compared[0].layers): _clouds(compared, seed) for compared in found}
    return [
        *(
            Picture(
                "additive.png" if number == 1 else f"additive-{number}.png",
                f"Pairs of clusters of {' and '.join(compared[0].layers)}",
                "The picture on which the correlation of joint relevance with joint contribution "
                "is the median. Below: all its pairs of clusters, for relevance the shares of the "
                "whole, for contributions those of the logit; every matrix has a scale of its own.",
                draw(typical(compared), names),
            )
            for number, compared in enumerate(found, 1)
        ),
        Picture(
            "correlations.png",
            "Mean correlations",
            "Means over pictures with 95 % bootstrap intervals.",
            draw_correlations(rows, colour),
        ),
        Picture(
            "scatter.png",
            "Relevance and contribution, pair by pair",
            "The pairs of clusters of all pictures; contributions are divided by the logit.",
            draw_scatter(clouds, colour, "contribution / logit"),
        ),
    ]


def _clouds(compared: Sequence[Compared], seed: int) -> list[Cloud]:
    found = []
    for score, effect in DRAWN:
        x = np.concatenate([one.score(score).flatten().numpy() for one in compared])
        y = np.concatenate([one.share(effect).flatten() for one in compared])
        over_all = pearson(torch.from_numpy(x), torch.from_numpy(y))
        found.append(Cloud(_method(score, effect), over_all, *some(x, y, seed)))
    return found


# -- the figure -----------------------------------------------------------------------------------


def typical(compared: Sequence[Compared]) -> Compared:
    """The picture whose correlation of joint relevance and contribution is the median."""
    known = [(one.correlation(Score.JOINT, Effect.JOINT), one) for one in compared]
    ordered = sorted((c, i) for i, (c, _) in enumerate(known) if c is not None)
    return compared[ordered[len(ordered) // 2][1]] if ordered else compared[0]


def draw(shown: Compared, names: Sequence[str] | None) -> Figure:
    """One picture with its clusters; below, all pairs of them.

    Arguments:
        names: of the classes.
    """
    layout = ConstrainedLayoutEngine(wspace=0.08)
    figure = Figure(figsize=(13.6, 7.2), dpi=110, layout=layout)
    rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.06), hspace=0.03)
    _clusters(rows[0], shown, names)
    _matrices(rows[1], shown)
    return figure


def _clusters(figure: Any, shown: Compared, names: Sequence[str] | None) -> None:
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.9))
    panels[0].imshow(np.clip(shown.photo.shown, 0, 1), cmap="gray", vmin=0, vmax=1)
    panels[0].set_title("the picture")
    for ax, layer, labels in zip(panels[1:3], shown.layers, shown.labels, strict=True):
        _overlay(ax, shown.photo.shown, labels)
        ax.set_title(f"clusters of {layer}")
    for ax in panels[:3]:
        ax.set_xticks([])
        ax.set_yticks([])
    target = shown.kept["target"]
    what = str(target) if names is None else names[target]
    what = f"class {what}" if what.isdecimal() else what
    panels[3].set_axis_off()
    panels[3].text(0, 0.97, what, fontsize=14, weight="bold", va="top")
    panels[3].text(
        0,
        0.82,
        f"explained: its logit, {shown.kept['logit']:.1f}\n"
        f"rows of a matrix: clusters of {shown.layers[0]}\n"
        f"columns: clusters of {shown.layers[1]}",
        fontsize=9,
        va="top",
        linespacing=1.6,
    )
    count = len(shown.score(Score.JOINT))
    panels[3].legend(
        handles=[
            Patch(color=_colour(number), label=f"cluster {number + 1}") for number in range(count)
        ],
        loc="lower left",
        bbox_to_anchor=(-0.04, 0.0),
        ncols=2,
        fontsize=9,
        frameon=False,
        title="colours, in each layer, the largest first",
        title_fontsize=9,
        alignment="left",
    )


def _overlay(ax: Axes, picture: Array, labels: Array) -> None:
    """The picture in grey under the colours of its clusters, with lines between them."""
    picture = np.asarray(picture, np.float64)
    grey = picture.mean(-1) if picture.ndim == 3 else picture
    height, width = grey.shape
    rows = np.arange(height) * labels.shape[0] // height
    columns = np.arange(width) * labels.shape[1] // width
    wide = labels[np.ix_(rows, columns)]
    colours = np.array([to_rgb(_colour(number)) for number in range(labels.max() + 1)])
    ax.imshow(0.5 * np.clip(grey, 0, 1)[..., None] + 0.5 * colours[wide])
    for number in range(labels.max() + 1):
        inside = wide == number
        if inside.any() and not inside.all():
            ax.contour(inside, levels=[0.5], colors="white", linewidths=0.9)


def _matrices(figure: Any, shown: Compared) -> None:
    panels = figure.subplots(1, 4)
    for place, score, effect in (
        (0, Score.JOINT, Effect.JOINT),
        (2, Score.ADDITIVE, Effect.TOTAL),
    ):
        _matrix(panels[place], shown.score(score).numpy(), shown, SCORES[score])
        _matrix(panels[place + 1], shown.share(effect), shown, f"{EFFECTS[effect]} / logit")


def _matrix(ax: Axes, values: Array, shown: Compared, title: str) -> None:
    limit = float(np.abs(values).max()) or 1.0
    image = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    if len(values) <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            dark = abs(value) > 0.6 * limit
            ax.text(
                column,
                row,
                f"{value:.2f}".replace("-0.00", "0.00"),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "0.15",
            )
    ticks = range(len(values))
    for axis, layer in ((ax.yaxis, shown.layers[0]), (ax.xaxis, shown.layers[1])):
        axis.set_ticks(ticks, [str(number + 1) for number in ticks])
        axis.set_label_text(f"cluster of {layer}")
        for number, label in enumerate(axis.get_ticklabels()):
            label.set_color(_colour(number))
            label.set_fontweight("bold")
    ax.tick_params(labelsize=10, length=0)
    ax.set_title(title)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_linewidth(0.4)  # type: ignore[operator]


def _colour(number: int) -> str:
    return _PALETTE[number % len(_PALETTE)]


EXPERIMENT = Experiment(NAME, run, frozenset({"layers", "weights"}))
