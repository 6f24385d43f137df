"""`cnn-channels` and `cnn-clusters`: joint relevance in a CNN (Table 2, Figs. 5-7).

Relevance of pairs of channels of two layers, or of clusters of their positions, beside
interventions; and the same pairs of layers, checked, for the experiment `additive`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from matplotlib.figure import Figure

from nrm import Measure, NeuronSet, clusters, plot
from nrm.composites import GammaFlat
from nrm.errors import QueryError
from nrm.evaluation import Evaluation
from nrm.evaluation.faithfulness import RANKED
from nrm.evaluation.scores import SCORES, By
from nrm.graph import Graph, Variable
from nrm_reproduce import comparison
from nrm_reproduce.comparison import (
    BASELINES,
    OTHERS,
    READING,
    Comparison,
    Shown,
    Walks,
    colours,
    draw_correlations,
    draw_curves,
    draw_scatter,
)
from nrm_reproduce.data import Photo
from nrm_reproduce.networks import Kind, Pictured, pictured
from nrm_reproduce.report import Experiment, Picture, Report, Request, Row, versions

Pair = tuple[str, str]
"""Two layers, the lower one first."""

PAPERS = Walks("joint", "NRM (gamma 0.25)", GammaFlat(0.25), "drop")
"""The paper's. The baselines are those of its explainer."""
WALKS = (PAPERS, *OTHERS)
METHODS = {walks.key: walks.method for walks in WALKS} | BASELINES
"""In the order of tables and figures."""
PAIRS = 5
"""How many are drawn."""


# -- what is compared -----------------------------------------------------------------------------


@dataclass(frozen=True)
class KMeans:
    """Divides a layer into clusters of its positions, the largest first."""

    k: int
    seed: int

    def __call__(self, R: Measure, layer: str) -> list[NeuronSet]:
        return clusters(R, layer, self.k, self.seed).sets


@dataclass(frozen=True)
class Plan:
    """What layers are divided into, and which layers.

    Attributes:
        part: what a set is called.
        layers: of each network, unless others are named: after their activation functions, where
            nothing is what removal leaves.
        samples: on how many pictures by default.
        k: clusters in each layer, for each network; nothing for channels.
        paper: the correlations of Table 2 by method, for the first layers of `beside`.
        notes: how the rows are to be read, beside what holds for all plans.
    """

    name: str
    part: str
    layers: Mapping[Kind, tuple[Pair, ...]]
    samples: int
    k: Mapping[Kind, int] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    beside: tuple[Kind, ...] = ()
    notes: tuple[str, ...] = ()

    def by(self, kind: Kind, seed: int) -> By:
        """What layers of a network are divided into."""
        return KMeans(self.k[kind], seed) if self.k else "channel"

    def papers(self, kind: Kind, layers: Pair) -> Mapping[str, float]:
        """The paper's figures, to stand beside those of two layers."""
        known = kind in self.beside and layers == self.layers[kind][0]
        return self.paper if known else {}


CHANNELS = Plan(
    "cnn-channels",
    "channel",
    {
        "SqueezeNet": (("features.12.squeeze_activation", "features.12.expand3x3_activation"),),
        "VGG16": (("features.27", "features.29"),),
        "DigitNet": (("relu1", "relu2"), ("relu2", "relu3")),
    },
    samples=20,
    paper={"joint": 0.528, "lrp": 0.0005, "occlusion": 0.043, "activation": 0.0005},
    beside=("SqueezeNet", "VGG16"),
    notes=(
        "Channels are taken after their activation function, unless other layers are named. Before "
        "it their relevance and contribution are the same, since zero stays zero; only the "
        "activations that one baseline adds up are others. All pairs are compared, also those of "
        "channels without any activation, whose relevance is zero, and whose contribution nearly "
        "so: without the other channel they may wake.",
    ),
)

CLUSTERS = Plan(
    "cnn-clusters",
    "cluster",
    {
        "SqueezeNet": (("features.10", "features.12"),),
        "VGG16": (("features.22", "features.29"),),
        "DigitNet": (("relu1", "relu2"), ("relu2", "relu3")),
    },
    samples=30,
    k={"SqueezeNet": 10, "VGG16": 10, "DigitNet": 5},
    notes=(
        "Clusters are those of k-means over the activations at the positions of a layer, found "
        "for each picture by itself: all channels at the positions of a cluster are removed.",
    ),
)


# -- layers, refused before anything takes long ---------------------------------------------------


def layer_pairs(named: Sequence[Sequence[str]]) -> list[Pair]:
    """Layers as they are given, each pair once.

    Raises:
        QueryError: there are more or fewer than two.
    """
    for names in named:
        if len(names) != 2 or names[0] == names[1]:
            raise QueryError(f"--layers {','.join(names)}: name two different layers to compare.")
    return list(dict.fromkeys((names[0], names[1]) for names in named))


def count_pairs(graph: Graph, layers: Pair, k: int | None) -> int:
    """How many pairs of channels two layers have, or of `k` clusters each.

    Raises:
        UnknownLayerError, QueryError: they cannot be compared.
    """
    given = f"--layers {','.join(layers)}"
    first, second = (graph.variable(layer) for layer in layers)
    if second in graph.upstream(first):
        raise QueryError(f"{given}: {layers[1]} comes first. Name the lower layer first.")
    if first not in graph.upstream(second):
        raise QueryError(
            f"{given}: neither leads to the other, so no relevance flows through both."
        )
    return math.prod(_parts(variable, k, given) for variable in (first, second))


def _parts(variable: Variable, k: int | None, given: str) -> int:
    """How many sets a layer is divided into."""
    shape = [size for size in variable.shape if size is not None]
    if len(shape) < 3:
        raise QueryError(
            f"{given}: {variable.name} has neurons of shape {tuple(shape)} and so no channels at "
            "positions. Choose layers between the input and where it is flattened."
        )
    positions = math.prod(shape[1:])
    if k is None:
        return shape[0]
    if positions < k:
        raise QueryError(
            f"{given}: {variable.name} has {positions} positions, too few for {k} clusters."
        )
    return k


# -- the experiment -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """What was found of two layers: on all pictures, and on one that is drawn.

    Attributes:
        one: all methods on the pairs.
        count: how many pairs there are.
        rows: of the table.
        photo, shown: the picture on which the correlation of the paper's walks is the median.
    """

    one: Comparison
    count: int
    evaluation: Evaluation
    rows: list[Row]
    photo: Photo
    shown: Shown

    @property
    def title(self) -> str:
        """The layers, to stand over a figure."""
        return "\n".join(self.one.layers)


def run(plan: Plan, request: Request) -> Report:
    """Choose pictures, compare, and draw."""
    named = layer_pairs(request.layers)
    network = pictured(request, request.samples or plan.samples)
    return report(plan, network, named or plan.layers[network.kind], request)


def report(plan: Plan, network: Pictured, layers: Sequence[Pair], request: Request) -> Report:
    """All methods on all pictures, for every pair of layers, and figures."""
    with torch.no_grad():
        each = [compared(plan, network, pair, request.seed) for pair in layers]
        found = [_found(plan, network, *one, request) for one in each]
        return Report(
            plan.name,
            f"Joint relevance of {plan.part}s in {network.kind}, beside interventions",
            [row for one in found for row in one.rows],
            _pictures(plan, network, found, request.seed),
            _facts(plan, network, found, request.seed),
            _notes(plan, network, found),
            {"layers": [_details(one, network.classes) for one in found]},
        )


def compared(plan: Plan, network: Pictured, layers: Pair, seed: int) -> tuple[Comparison, int]:
    """All methods on the pairs of sets of two layers, and how many pairs there are.

    Raises:
        UnknownLayerError, QueryError: the layers cannot be compared.
    """
    graph = PAPERS.explainer(network.model).graph(network.photos[0].x)
    count = count_pairs(graph, layers, plan.k.get(network.kind))
    one = Comparison(
        plan.name,
        network.model,
        layers,
        WALKS,
        plan.by(network.kind, seed),
        others={name: SCORES[name] for name in BASELINES},
        ks=comparison.steps(count),
        one_class=True,
        ranked=RANKED,
    )
    return one, count


def typical(found: Evaluation) -> str:
    """The picture on which the correlation of the paper's walks is the median."""
    names = [row.sample for row in found.rows if row.method == PAPERS.key]
    known = [
        (value, name)
        for value, name in zip(found.values(PAPERS.key), names, strict=True)
        if value is not None
    ]
    return sorted(known)[len(known) // 2][1] if known else names[0]


def top(shown: Shown, count: int) -> list[tuple[int, int]]:
    """The most relevant pairs by the paper's walks, the first being the most relevant."""
    flat = shown.score(PAPERS.key).flatten() / shown.R.scale
    columns = shown.contribution.shape[1]
    found = flat.topk(min(count, len(flat))).indices.tolist()
    return [divmod(place, columns) for place in found]


def _found(plan: Plan, network: Pictured, one: Comparison, count: int, request: Request) -> Found:
    photos = network.photos
    request.say(f"{' x '.join(one.layers)}: {len(photos)} pictures …")
    evaluation = one.report([(photo.name, photo.x) for photo in photos], request)
    chosen = typical(evaluation)
    request.say(f"figures of {chosen} …")
    photo = next(photo for photo in photos if photo.name == chosen)
    first, second = one.layers
    paper = plan.papers(network.kind, (first, second))
    rows = comparison.rows(plan.name, evaluation, METHODS, paper)
    return Found(one, count, evaluation, rows, photo, one.shown(photo.x))


_READING = (
    "The Pearson correlation of a score with the joint contribution of two sets of neurons, one "
    "of each layer, to the logit of the predicted class: over all pairs of a picture, then the "
    "mean over pictures. Neurons are removed by setting them to zero.",
    "The NRM with gamma = 0.25 and without biases is the paper's; the other two walks are not. "
    + READING.format(parts="sets"),
)

_PAPER = {
    "SqueezeNet": "The paper's figures are those of Table 2 for channels of VGG16: another "
    "network, beside which those of SqueezeNet stand for comparison only.",
    "VGG16": "The paper's figures are those of Table 2 for channels of VGG16, on pictures of its "
    "authors' choice.",
}


def _notes(plan: Plan, network: Pictured, found: Sequence[Found]) -> tuple[str, ...]:
    papers = any(row.paper is not None for one in found for row in one.rows)
    return (*_READING, *((_PAPER[network.kind],) if papers else ()), *plan.notes)


def _facts(
    plan: Plan, network: Pictured, found: Sequence[Found], seed: int
) -> dict[str, str | int | float]:
    k = plan.k.get(network.kind)
    return {
        "network": network.said,
        "weights": found[0].one.weights,
        "data": f"{len(network.photos)} {network.pictures}",
        "explained": "the predicted class",
        **({} if k is None else {"clusters of each layer": k}),
        **{f"pairs of {' and '.join(one.one.layers)}": one.count for one in found},
        "seed": seed,
        "versions": versions(),
    }


def _details(found: Found, classes: Sequence[str] | None) -> dict[str, object]:
    details = comparison.details(found.evaluation, METHODS)
    for sample in details["samples"]:
        sample["class"] = None if classes is None else classes[sample["target"]]
    return {"layers": found.one.layers, **details}


# -- figures --------------------------------------------------------------------------------------


def _pictures(plan: Plan, network: Pictured, found: Sequence[Found], seed: int) -> list[Picture]:
    colour = colours(list(METHODS.values()))
    rows = [row for one in found for row in one.rows]
    curves = {one.title: comparison.curves(one.evaluation, METHODS, one.one.ks) for one in found}
    clouds = {f"{one.title}\n{one.photo.name}": one.shown.clouds(METHODS, seed) for one in found}
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
        *(_pairs(plan, network, one, number, len(found)) for number, one in enumerate(found, 1)),
        Picture(
            "scatter.png",
            "Score and joint contribution, pair by pair",
            "On one picture each, on which the correlation of the paper's walks is the median. "
            "NRM, LRP and occlusion are in units of the logit.",
            draw_scatter(clouds, colour),
        ),
    ]


def _pairs(plan: Plan, network: Pictured, found: Found, number: int, count: int) -> Picture:
    return Picture(
        "pairs.png" if count == 1 else f"pairs-{number}.png",
        f"The most relevant pairs of {plan.part}s of one picture: {' and '.join(found.one.layers)}",
        f"{found.photo.name}, on which the correlation of the paper's walks is the median. "
        f"For each pair the relevance of pixels jointly with each {plan.part} and with both, "
        "by the paper's walks; above each its relevance, and for both also their joint "
        f"contribution, in logits. The numbers of {plan.part}s begin with 0.",
        draw_pairs(found, plan, network.classes),
    )


def draw_pairs(found: Found, plan: Plan, names: Sequence[str] | None) -> Figure:
    """The photo with its heatmap; below, for each pair, the heatmap of each set and of both.

    Arguments:
        names: of the classes.
    """
    R, layers, number = found.shown.R, found.one.layers, found.shown.number
    columns = [_column(found.shown, plan, *pair) for pair in top(found.shown, PAIRS)]
    assert number is not None
    what = f"class {number}" if names is None else names[number].split(",")[0]
    return plot.overview(
        found.photo.shown,
        plot.Panel("all of the relevance", R.heatmap()[0]),
        columns,
        (*map(_short, layers), "both"),
        (
            what,
            f"explained: its logit, {float(R.scale):.1f}",
            f"columns: the most relevant pairs of {plan.part}s of",
            *layers,
            "titles: relevance; contribution, both in logits",
        ),
    )


def _short(layer: str) -> str:
    """The end of an address that has a name, to stand beside a row of heatmaps."""
    name = layer.rpartition(".")[2]
    return layer if name.isdigit() else name


def _column(shown: Shown, plan: Plan, i: int, j: int) -> list[plot.Panel]:
    """What flows through each set of a pair, and through both."""
    R, (first, second) = shown.R, shown.families.sets
    scale = float(R.scale)
    relevance = shown.score(PAPERS.key)[i, j]
    titles = (
        f"{plan.part} {i}: {float(R(first[i])) * scale:.2f}",
        f"{plan.part} {j}: {float(R(second[j])) * scale:.2f}",
        f"{float(relevance):.2f}; {float(shown.contribution[i, j]):.2f}",
    )
    heatmaps = R.heatmaps([first[i], second[j], [first[i], second[j]]])[:, 0]
    return [plot.Panel(title, one) for title, one in zip(titles, heatmaps, strict=True)]


CNN_CHANNELS, CNN_CLUSTERS = (
    Experiment(plan.name, partial(run, plan), frozenset({"layers", "weights"}))
    for plan in (CHANNELS, CLUSTERS)
)
