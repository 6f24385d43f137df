"""`additive`: additive and joint relevance beside interventions (Def. 3, Fig. A.3).

For every picture, the clusters of two layers and all pairs of them: their joint relevance (eq. 9),
their additive relevance (Def. 3, Thm. 3), and what the network loses without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from torch import Tensor

from nrm import Explainer, clusters
from nrm.composites import GammaFlat
from nrm.display import counted
from nrm.errors import QueryError
from nrm.evaluation import (
    Evaluation,
    Families,
    Interventions,
    Mean,
    bootstrap,
    bootstrap_difference,
    joint_contributions,
    pearson,
)
from nrm.evaluation.faithfulness import Row as Correlation
from nrm.evaluation.store import Store, digest
from nrm_reproduce.cnn import Pair, count_pairs, layer_pairs
from nrm_reproduce.comparison import Array, Cloud, draw_correlations, draw_scatter, some
from nrm_reproduce.data import Photo
from nrm_reproduce.networks import Kind, Pictured, pictured
from nrm_reproduce.report import Experiment, Picture, Report, Request, Row, Table, versions

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


def method(score: Score, effect: Effect) -> str:
    """What tables call the correlation of the two."""
    return f"{SCORES[score]}, with {EFFECTS[effect]}"


def ceiling(effect: Effect) -> str:
    """What tables call the largest correlation of any additive score with an effect."""
    return f"any score that adds up over the layers, with {EFFECTS[effect]}"


def compare(explainer: Explainer, photo: Photo, layers: Pair, k: int, seed: int) -> dict[str, Any]:
    """All pairs of clusters of two layers of one picture, for the largest logit.

    Returns:
        as JSON takes it: `picture`, `target`, `logit`; `labels`, for each layer
        `[height, width]`, the cluster at every position; and by name `scores` and
        `contributions` `[k, k]`, clusters of the first layer by those of the second,
        contributions in units of the logit.
    """
    R = explainer(photo.x)
    assert R.target is not None
    parts = {layer: clusters(R, layer, k, seed) for layer in layers}
    for layer, part in parts.items():
        if part.labels.dim() != 3:
            raise QueryError(f"{layer!r} has no height and width, as a picture has.")
    families = Families(R, layers, lambda R, layer: parts[layer])
    interventions = Interventions(explainer, photo.x, target=R.target)
    first, second = (parts[layer].labels[0] for layer in layers)
    every = scores(families) | {Score.OVERLAP: overlap(first, second, k, k)}
    lost = effects(families, interventions)
    return {
        "picture": photo.name,
        "target": int(R.target[0]),
        "logit": float(interventions.output),
        "labels": [first.tolist(), second.tolist()],
        "scores": {score: values.double().tolist() for score, values in every.items()},
        "contributions": {effect: values.double().tolist() for effect, values in lost.items()},
    }


def scores(families: Families) -> dict[Score, Tensor]:
    """`[sets of the first layer, of the second]`, of one sample; all but the overlap."""
    joint = families.joint()
    first, second = families.marginals()
    return {
        Score.JOINT: joint,
        Score.ADDITIVE: (first[:, None] + second) / 2,  # Theorem 3: `R.additive` of two layers
        Score.EITHER: first[:, None] + second - joint,  # the addition law
        Score.PRODUCT: first[:, None] * second,
    }


def effects(families: Families, interventions: Interventions) -> dict[Effect, Tensor]:
    """`[sets of the first layer, of the second]`: what the output loses without two of them.

    `joint` is `f(x) - f(x \\ S_a) - f(x \\ S_b) + f(x \\ (S_a | S_b))` (eq. 57), `total` is
    `f(x) - f(x \\ (S_a | S_b))`.
    """
    joint = joint_contributions(interventions, *families.sets)
    return {Effect.JOINT: joint, Effect.TOTAL: interventions.united(*families.sets)}


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


def additive_ceiling(values: Tensor) -> float | None:
    """The largest correlation that any sum of a number for each row and one for each column has.

    No score that is additive over the two layers can do better, whatever it gives each set.
    """
    values = values.double()
    return pearson(values.mean(1, keepdim=True) + values.mean(0), values)


def correlations(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Of every score with every effect over all pairs of clusters of a picture, and the ceilings.

    Arguments:
        found: what `compare` gave.
    """
    by_method: dict[str, float | None] = {}
    for effect in Effect:
        lost = torch.tensor(found["contributions"][effect], dtype=torch.float64)
        for score in Score:
            said = torch.tensor(found["scores"][score], dtype=torch.float64)
            by_method[method(score, effect)] = pearson(said, lost)
        by_method[ceiling(effect)] = additive_ceiling(lost)
    return by_method


# -- the experiment -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """One pair of layers on all pictures.

    Attributes:
        each: what `compare` gave of every picture.
        evaluation: the correlations, picture by picture.
    """

    layers: Pair
    each: Sequence[Mapping[str, Any]]
    evaluation: Evaluation

    @classmethod
    def of(cls, layers: Pair, each: Sequence[Mapping[str, Any]], seed: int) -> Self:
        """With the correlations of all pictures."""
        rows = [
            Correlation(one["picture"], name, one["target"], one["logit"], {"pearson": value})
            for one in each
            for name, value in correlations(one).items()
        ]
        return cls(layers, each, Evaluation(layers, tuple(rows), seed))

    def mean(self, name: str) -> Mean:
        """Of a correlation over all pictures, with its bootstrap interval."""
        return bootstrap(self.evaluation.values(name), self.evaluation.seed, RESAMPLES)

    def difference(self, a: str, b: str) -> Mean:
        """By how much one correlation is above another, picture by picture."""
        values = self.evaluation.values
        return bootstrap_difference(values(a), values(b), self.evaluation.seed, RESAMPLES)

    @property
    def typical(self) -> int:
        """The picture on which joint relevance and contribution correlate as in the median."""
        known = self.evaluation.values(method(Score.JOINT, Effect.JOINT))
        ordered = sorted((value, n) for n, value in enumerate(known) if value is not None)
        return ordered[len(ordered) // 2][1] if ordered else 0


def run(request: Request) -> Report:
    """Choose pictures, compare pairs of clusters of two layers, and draw."""
    named = layer_pairs(request.layers)
    network = pictured(request, request.samples or SAMPLES)
    explainer = Explainer(network.model, COMPOSITE)
    graph = explainer.graph(network.photos[0].x)
    layers = named or [LAYERS[network.kind]]
    for pair in layers:
        count_pairs(graph, pair, CLUSTERS)  # refuses before anything takes long
    with torch.no_grad():
        return report(network, [_found(network, explainer, p, request) for p in layers], request)


def _found(network: Pictured, explainer: Explainer, layers: Pair, request: Request) -> Found:
    """Every picture as it was kept, or compared now."""
    seed, photos = request.seed, network.photos
    weights = digest(network.model)[:12]  # what was found with others is of no use
    place = request.kept / f"{NAME}-{weights}-{CLUSTERS}-{seed}" / digest(layers)[:12]
    store = Store(place, {"layers": layers, "composite": repr(COMPOSITE)})
    request.say(f"{' x '.join(layers)}: {len(photos)} pictures …")
    each = []
    with counted(request.progress, "pictures", len(photos)) as advance:
        for photo in photos:
            find = partial(compare, explainer, photo, layers, CLUSTERS, seed)
            each.append(store.once(digest([photo.name, photo.x]), find))
            advance(1)
    return Found.of(layers, each, seed)


def report(network: Pictured, found: Sequence[Found], request: Request) -> Report:
    """Tables and figures of every pair of layers, each on all pictures."""
    rows = [
        Row(NAME, one.layers, name, mean.mean, mean.low, mean.high, None, mean.samples)
        for one in found
        for name in (method(score, effect) for effect in Effect for score in Score)
        for mean in [one.mean(name)]
    ]
    return Report(
        NAME,
        f"Additive and joint relevance in {network.kind}, beside interventions",
        rows,
        draw_pictures(network, found, rows, request.seed),
        {
            "network": network.said,
            "weights": digest(network.model)[:12],
            "rules": repr(COMPOSITE),
            "pictures": len(network.photos),
            "explained": "the predicted class",
            "clusters of each layer": CLUSTERS,
            "seed": request.seed,
            "versions": versions(),
        },
        _READING,
        {"pairs": [_details(one) for one in found]},
        heading="Correlation with what removing two clusters does",
        tables=[_limits(found)],
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


def _details(found: Found) -> dict[str, Any]:
    """All that was found on every picture."""
    pictures = [{**one, "correlations": correlations(one)} for one in found.each]
    return {"layers": found.layers, "pictures": pictures}


def _limits(found: Sequence[Found]) -> Table:
    lines = []
    for one in found:
        for effect in Effect:
            joint, additive, either = (
                method(score, effect) for score in (Score.JOINT, Score.ADDITIVE, Score.EITHER)
            )
            for what, mean in {
                "any score that adds up over the layers, at most": one.mean(ceiling(effect)),
                "joint relevance minus additive relevance": one.difference(joint, additive),
                "either minus additive relevance": one.difference(either, additive),
            }.items():
                lines.append((", ".join(one.layers), EFFECTS[effect], what, *astuple(mean)))
    return Table(
        "What additive relevance lacks",
        ("layers", "with", "correlation of", "mean", "from", "to", "pictures"),
        lines,
        group=2,
        note="Differences are picture by picture. The largest correlation of scores that add up "
        "is that of the best such score, fitted to the contributions themselves.",
    )


# -- the figures ----------------------------------------------------------------------------------


def draw_pictures(
    network: Pictured, found: Sequence[Found], rows: Sequence[Row], seed: int
) -> list[Picture]:
    """One picture of every pair of layers; correlations and dots of all."""
    colour = {
        method(score, effect): shade
        for effect, shade in ((Effect.JOINT, "#b2182b"), (Effect.TOTAL, "#4d4d4d"))
        for score in Score
    }
    clouds = {"\n".join(one.layers): _clouds(one, seed) for one in found}
    return [
        *(
            Picture(
                "additive.png" if number == 1 else f"additive-{number}.png",
                f"Pairs of clusters of {' and '.join(one.layers)}",
                "The picture on which the correlation of joint relevance with joint contribution "
                "is the median. Below: all its pairs of clusters, for relevance the shares of the "
                "whole, for contributions those of the logit; every matrix has a scale of its own.",
                draw(network.photos[one.typical], one, network.classes),
            )
            for number, one in enumerate(found, 1)
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


def _clouds(found: Found, seed: int) -> list[Cloud]:
    clouds = []
    for score, effect in DRAWN:
        x = np.concatenate([np.ravel(one["scores"][score]) for one in found.each])
        y = np.concatenate([np.ravel(_share(one, effect)) for one in found.each])
        over_all = pearson(torch.from_numpy(x), torch.from_numpy(y))
        clouds.append(Cloud(method(score, effect), over_all, *some(x, y, seed)))
    return clouds


def _share(found: Mapping[str, Any], effect: Effect) -> Array:
    """`[k, k]`: contributions, divided by the logit."""
    return np.array(found["contributions"][effect]) / (found["logit"] or 1.0)


def draw(photo: Photo, found: Found, names: Sequence[str] | None) -> Figure:
    """One picture with its clusters; below, all pairs of them.

    Arguments:
        names: of the classes.
    """
    one, layers = found.each[found.typical], found.layers
    layout = ConstrainedLayoutEngine(wspace=0.08)
    figure = Figure(figsize=(13.6, 7.2), dpi=110, layout=layout)
    rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.06), hspace=0.03)
    panels = rows[0].subplots(1, 4, width_ratios=(1, 1, 1, 0.9))
    panels[0].imshow(np.clip(photo.shown, 0, 1), cmap="gray", vmin=0, vmax=1)
    panels[0].set_title("the picture")
    for ax, layer, labels in zip(panels[1:3], layers, one["labels"], strict=True):
        _overlay(ax, photo.shown, np.array(labels))
        ax.set_title(f"clusters of {layer}")
    for ax in panels[:3]:
        ax.set_xticks([])
        ax.set_yticks([])
    what = str(one["target"]) if names is None else names[one["target"]]
    _said(
        panels[3],
        f"class {what}" if what.isdecimal() else what,
        f"explained: its logit, {one['logit']:.1f}\n"
        f"rows of a matrix: clusters of {layers[0]}\ncolumns: clusters of {layers[1]}",
    )
    matrices = rows[1].subplots(1, 4)
    for place, score, effect in (
        (0, Score.JOINT, Effect.JOINT),
        (2, Score.ADDITIVE, Effect.TOTAL),
    ):
        _matrix(matrices[place], np.array(one["scores"][score]), layers, SCORES[score])
        share = f"{EFFECTS[effect]} / logit"
        _matrix(matrices[place + 1], _share(one, effect), layers, share)
    return figure


def _said(ax: Axes, title: str, text: str) -> None:
    """What is explained, and which colour is which cluster."""
    ax.set_axis_off()
    ax.text(0, 0.97, title, fontsize=14, weight="bold", va="top")
    ax.text(0, 0.82, text, fontsize=9, va="top", linespacing=1.6)
    ax.legend(
        handles=[Patch(color=_colour(n), label=f"cluster {n + 1}") for n in range(CLUSTERS)],
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


def _matrix(ax: Axes, values: Array, layers: Pair, title: str) -> None:
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
    for axis, layer in ((ax.yaxis, layers[0]), (ax.xaxis, layers[1])):
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
