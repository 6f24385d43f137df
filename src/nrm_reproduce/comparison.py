"""Relevance of combinations of neuron sets beside interventions, by several walks and scores.

What the experiments on perceptrons and convolutional networks have in common: the walks, the
comparison of all of them with the same joint contributions, its rows, curves and figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, replace
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from nrm import Explainer, Measure, NeuronSet
from nrm.composites import Composite
from nrm.display import counted
from nrm.evaluation import (
    Evaluation,
    Families,
    Interventions,
    evaluate,
    joint_contributions,
    pearson,
)
from nrm.evaluation.faithfulness import Row as Found
from nrm.evaluation.scores import SCORES, By, Score
from nrm.evaluation.store import digest
from nrm.rules import Occlusion, Rule, Zero
from nrm_reproduce.networks import of_class
from nrm_reproduce.report import GREY, STYLE, Request, Row

Array = npt.NDArray[Any]
Sample = tuple[str, Tensor]
"""A name, and the model's input with its batch axis."""
Explained = Literal["logit", "logits", "probabilities"]
"""The output relevance R~ (eq. 13): that of the target alone, all logits, or their softmax."""

BASELINES = {
    "lrp": "LRP",
    "lrp product": "LRP, product",
    "occlusion": "occlusion",
    "occlusion sum": "occlusion, each alone",
    "activation": "activation",
}
"""What `evaluate` calls them, and tables do: the paper's three, and two in their place."""
READING = (
    "LRP adds up the relevances of the single {parts}, its product multiplies them; occlusion is "
    "what the output loses without all of them, each alone what it loses without each, added up; "
    "activation adds up their activations."
)
"""What the baselines are."""
DOTS = 20_000
"""At most so many points of a scatter plot are drawn."""

_PALETTE = ("#b2182b", "#2166ac", "#1b7837", "#e08214", "#762a83", "#4d4d4d", "#999999", "#35978f")


# -- walks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walks:
    """Which rules apply, what becomes of biases, and where walks begin.

    Attributes:
        key: what `evaluate` calls them.
        method: what tables call them.
    """

    key: str
    method: str
    rules: Rule | Composite
    bias: Literal["drop", "input"]
    explained: Explained = "logit"

    def explainer(self, model: nn.Module) -> Explainer:
        """An explainer of a model by these walks."""
        return Explainer(model, self.rules, bias=self.bias)


OTHERS = (
    Walks("zero", "NRM (LRP-0, biases as inputs)", Zero(), "input"),
    Walks(
        "occlusion walks",
        "NRM (occlusion, biases take the rest)",
        Occlusion(rest_to_bias=True),
        "input",
    ),
)
"""Beyond the paper."""


@dataclass(frozen=True, eq=False)
class JointRelevance:
    """A score for `evaluate`: joint relevance by other walks than those of its explainer.

    So that all walks are compared with contributions that are computed only once.

    Arguments:
        explainer: of the model, by these walks; `None`: one is made. No field: what it captures
            is no part of the setting that a store compares.
    """

    walks: Walks
    model: nn.Module
    layers: tuple[str, ...]
    by: By = "neuron"
    explainer: InitVar[Explainer | None] = None

    def __post_init__(self, explainer: Explainer | None) -> None:
        object.__setattr__(self, "_explainer", explainer or self.walks.explainer(self.model))

    def __call__(self, families: Families, interventions: Interventions) -> Tensor:
        """`[n1, n2, ...]`: `f(x) R(S_1, S_2, ...)`."""
        R = self._measure(families.R)
        by = self.by if isinstance(self.by, str) else same_sets(self.layers, families)
        return (Families(R, self.layers, by, families.memory).joint() * R.scale).contiguous()

    def _measure(self, R: Measure) -> Measure:
        """The measure by these walks for the inputs of another."""
        explainer: Explainer = self._explainer  # type: ignore[attr-defined]
        inputs = R.forward_pass.inputs
        if self.walks.explained == "logit":
            return explainer(*inputs, target=R.target)
        logits = R.activations(R.graph.output.name)
        chosen = logits if self.walks.explained == "logits" else logits.softmax(-1)
        return explainer(*inputs, output_relevance=chosen)


def same_sets(layers: Sequence[str], families: Families) -> By:
    """The sets of other walks' families: clusters are not found again."""
    known = dict(zip(layers, families.sets, strict=True))

    def by(R: Measure, layer: str) -> Iterable[NeuronSet]:
        return known[layer]

    return by


# -- the comparison -------------------------------------------------------------------------------


class Comparison:
    """Combinations of one neuron set of each of some layers of a network.

    Arguments:
        name: of the folder in which its samples are kept.
        walks: those that are compared. The first are those of the explainer, whose relevance of
            single sets the baselines add up.
        by: what the layers are divided into.
        others: scores beside the walks, on the samples that are reported on.
        ks: of the SC_k (eq. 58), on the same samples.
        one_class: whether to keep, of the network, only the class that it predicts for a sample:
            the same, and faster to intervene on.
        ranked: up to how many combinations ranks are correlated.

    Attributes:
        weights: a digest of the network; what was found with others is of no use.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        layers: Sequence[str],
        walks: Sequence[Walks],
        by: By = "neuron",
        *,
        others: Mapping[str, Score] | None = None,
        ks: Sequence[int] = (),
        one_class: bool = False,
        ranked: int = 0,
    ) -> None:
        self.name, self.model, self.layers, self.by = name, model, tuple(layers), by
        self.walks, self.others, self.ks = tuple(walks), dict(others or {}), tuple(ks)
        self.one_class, self.ranked = one_class, ranked
        self.weights = digest(model)[:12]
        self._last: tuple[int | None, Explainer, dict[str, Score]] | None = None

    def choose(self, samples: Sequence[Sample], request: Request) -> tuple[Walks, Evaluation]:
        """The walks that agree best with interventions on some samples, and how well all do."""
        found = self._evaluate(samples, request, "choosing", {}, ())
        known = [(found.mean(walks.key).mean, walks) for walks in self.walks]
        defined = [(mean, walks) for mean, walks in known if mean is not None]
        return max(defined, key=lambda pair: pair[0], default=(0.0, self.walks[0]))[1], found

    def report(self, samples: Sequence[Sample], request: Request) -> Evaluation:
        """All walks and the other scores on some samples."""
        return self._evaluate(samples, request, "reporting", self.others, self.ks)

    def shown(self, x: Tensor) -> Shown:
        """One sample with all its combinations, to be drawn."""
        number = self.explained(x)
        explainer, scores = self.of_class(number)
        R = explainer(x, target=None if number is None else 0)
        assert R.target is not None
        families = Families(R, self.layers, self.by)
        interventions = Interventions(explainer, x, target=int(R.target[0]))
        contribution = joint_contributions(interventions, *families.sets)
        every = scores | self.others
        return Shown(number, R, families, interventions, contribution, every)

    def explained(self, x: Tensor) -> int | None:
        """The predicted class, if only one is kept."""
        return int(self.model(x)[0].argmax()) if self.one_class else None

    def of_class(self, number: int | None) -> tuple[Explainer, dict[str, Score]]:
        """The explainer and all walks, for a class; captured once while it stays the same."""
        if self._last is None or self._last[0] != number:
            self._last = None  # it holds modified weights: those of VGG16 take gigabytes
            model = self.model if number is None else of_class(self.model, number)
            first, *rest = self.walks
            scores = {first.key: SCORES["joint"]} | {
                walks.key: JointRelevance(walks, model, self.layers, self.by) for walks in rest
            }
            self._last = number, first.explainer(model), scores
        return self._last[1:]

    def _evaluate(
        self,
        samples: Sequence[Sample],
        request: Request,
        what: str,
        others: Mapping[str, Score],
        ks: Sequence[int],
    ) -> Evaluation:
        place = request.kept / f"{self.name}-{self.weights}-{request.seed}"
        place /= f"{digest(self.layers)[:12]}-{what}"
        rows: list[Found] = []
        with counted(request.progress, what, len(samples)) as advance:
            for number, group in self._groups(samples):
                explainer, scores = self.of_class(number)
                found = evaluate(
                    explainer,
                    group,
                    self.layers,
                    by=self.by,
                    methods={**scores, **others},
                    ks=ks,
                    target="predicted" if number is None else 0,
                    ranked=self.ranked,
                    progress=advance,
                    store=place / ("whole" if number is None else f"class-{number}"),
                    seed=request.seed,
                )
                rows += [r if number is None else replace(r, target=number) for r in found.rows]
        return Evaluation(self.layers, tuple(rows), request.seed)

    def _groups(self, samples: Sequence[Sample]) -> Iterator[tuple[int | None, Sequence[Sample]]]:
        """Samples with the class that they are explained by."""
        if not self.one_class:
            yield None, samples
        else:
            for name, x in samples:
                yield self.explained(x), [(name, x)]


@dataclass(frozen=True, eq=False)
class Shown:
    """One sample with all its combinations.

    Attributes:
        number: of the explained class, where the network has this class only.
        R: the measure by the first walks.
        contribution: `[sets of the first layer, of the second, ...]`, in logits.
        scores: by method.
    """

    number: int | None
    R: Measure
    families: Families
    interventions: Interventions
    contribution: Tensor
    scores: Mapping[str, Score]

    def score(self, key: str) -> Tensor:
        """What a method gives every combination: of the shape of the contribution."""
        return self.scores[key](self.families, self.interventions)

    def clouds(self, methods: Mapping[str, str], seed: int) -> list[Cloud]:
        """Scatter plots of every method."""
        found = []
        for key, method in methods.items():
            values = self.score(key)
            flat = (values.flatten().numpy(), self.contribution.flatten().numpy())
            found.append(Cloud(method, pearson(values, self.contribution), *some(*flat, seed)))
        return found


def steps(most: int) -> tuple[int, ...]:
    """1, 2, 3, 5, 7, 10, 15, 20, … and the last."""
    found = {
        tenths * 10**power // 10
        for power in range(len(str(most)))
        for tenths in (10, 15, 20, 30, 50, 70)
    }
    return (*sorted(k for k in found if k < most), most)


# -- rows and curves ------------------------------------------------------------------------------


def rows(
    experiment: str, found: Evaluation, methods: Mapping[str, str], paper: Mapping[str, float]
) -> list[Row]:
    """The table's.

    Arguments:
        methods: what tables call them, in order.
        paper: the paper's correlations, by method.
    """
    means = {key: found.mean(key) for key in methods}
    return [
        Row(
            experiment,
            found.layers,
            methods[key],
            mean.mean,
            mean.low,
            mean.high,
            paper.get(key),
            mean.samples,
        )
        for key, mean in means.items()
    ]


def details(found: Evaluation, methods: Mapping[str, str]) -> dict[str, Any]:
    """All that was found, for a report's JSON."""
    return {
        "means": means(found, methods),
        "samples": [{**asdict(row), "method": methods[row.method]} for row in found.rows],
    }


def means(found: Evaluation, methods: Mapping[str, str]) -> list[dict[str, Any]]:
    """Of all methods, by what tables call them."""
    return [{**line, "method": methods[line["method"]]} for line in found.table()]


@dataclass(frozen=True, eq=False)
class Curve:
    """The mean of SC_k over samples.

    Attributes:
        ks: how many combinations are taken, ascending.
        mean, low, high: at each of them, with a bootstrap interval.
    """

    method: str
    ks: Sequence[int]
    mean: Array
    low: Array
    high: Array


@dataclass(frozen=True, eq=False)
class Cloud:
    """A method's score and the joint contribution of combinations of one sample.

    Attributes:
        pearson: over all combinations.
        score, contribution: flat, of those that are drawn.
    """

    method: str
    pearson: float | None
    score: Array
    contribution: Array


def curves(found: Evaluation, methods: Mapping[str, str], ks: Sequence[int]) -> list[Curve]:
    """SC_k of every method."""
    lines = []
    for key, method in methods.items():
        means = [found.mean(key, f"SC_{k}") for k in ks]
        ends = np.array([[m.mean, m.low, m.high] for m in means], dtype=np.float64).T
        lines.append(Curve(method, ks, *ends))
    return lines


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


# -- figures --------------------------------------------------------------------------------------


def colours(methods: Sequence[str]) -> dict[str, str]:
    """One for each method, the same in all figures."""
    return {method: _PALETTE[n % len(_PALETTE)] for n, method in enumerate(methods)}


@matplotlib.rc_context(STYLE)
def draw_correlations(rows: Sequence[Row], colour: Mapping[str, str]) -> Figure:
    """A bar for each row with its interval, and a mark where the paper's figure is."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.layers, []).append(row)
    height = 0.36 * len(rows) + 0.75 * len(groups) + 0.3
    figure = Figure(figsize=(8.2, height), dpi=130, layout="constrained")
    panels: Any = figure.subplots(
        len(groups), 1, sharex=True, squeeze=False, height_ratios=[len(g) for g in groups.values()]
    )
    for ax, (layers, group) in zip(panels[:, 0], groups.items(), strict=True):
        _bars(ax, group, colour)
        ax.set_title(f"combinations of {', '.join(layers)}", loc="left")
    panels[-1, 0].set_xlabel("Pearson correlation, mean over samples")
    drawn: dict[str, Any] = {}
    for ax in panels[:, 0]:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, handle)
    if drawn:
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower right")
    return figure


def _bars(ax: Axes, group: Sequence[Row], colour: Mapping[str, str]) -> None:
    for place, row in enumerate(group):
        if row.pearson is None:
            continue
        ax.barh(place, row.pearson, height=0.62, color=colour[row.method])
        if row.ci_low is not None and row.ci_high is not None:
            ends = [[row.pearson - row.ci_low], [row.ci_high - row.pearson]]
            ax.errorbar(
                row.pearson, place, xerr=ends, color="black", capsize=2.5, elinewidth=1, fmt="none"
            )
    marks = [(row.paper, place) for place, row in enumerate(group) if row.paper is not None]
    if marks:
        ax.scatter(
            [figure for figure, _ in marks],
            [place for _, place in marks],
            marker="D",
            s=30,
            facecolor="white",
            edgecolor="black",
            zorder=3,
            clip_on=False,
            label="the paper's figure",
        )
    ax.set_yticks(range(len(group)), [row.method for row in group], fontsize=9)
    ax.invert_yaxis()
    ax.axvline(0, color=GREY, linewidth=0.6)
    ax.set_xlim(min(0.0, ax.get_xlim()[0]), 1.02)
    ax.tick_params(axis="y", length=0)


@matplotlib.rc_context(STYLE)
def draw_curves(curves: Mapping[str, Sequence[Curve]], colour: Mapping[str, str]) -> Figure:
    """SC_k against k, a panel for each choice of layers."""
    across = min(len(curves), 3)
    down = -(-len(curves) // across)
    size = (5.4 * across, 4.1 * down + 0.9)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels: Any = figure.subplots(down, across, squeeze=False)
    for ax in panels.flat[len(curves) :]:
        ax.set_axis_off()
    drawn: dict[str, Any] = {}
    for ax, (layers, lines) in zip(panels.flat, curves.items(), strict=False):
        for line in lines:
            shade = colour[line.method]
            (drawn[line.method],) = ax.plot(
                line.ks, line.mean, color=shade, linewidth=1.5, label=line.method
            )
            ax.fill_between(line.ks, line.low, line.high, color=shade, alpha=0.15, linewidth=0)
        ax.set_xscale("log")
        ax.axhline(0, color=GREY, linewidth=0.6)
        ax.set_title(layers, loc="left")
        ax.set_xlabel("k, combinations in order of relevance")
    for ax in panels[:, 0]:
        ax.set_ylabel("SC$_k$: summed joint contributions, in logits")
    figure.legend(
        drawn.values(),
        drawn.keys(),
        loc="outside lower center",
        ncols=min(across + 1, 3),
    )
    return figure


@matplotlib.rc_context(STYLE)
def draw_scatter(
    clouds: Mapping[str, Sequence[Cloud]],
    colour: Mapping[str, str],
    what: str = "joint contribution, logits",
) -> Figure:
    """Relevance against contribution, a row for each choice of layers.

    Arguments:
        what: the contribution is.
    """
    columns = max(len(row) for row in clouds.values())
    size = (2.55 * columns, 2.75 * len(clouds) + 0.3)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels: Any = figure.subplots(len(clouds), columns, squeeze=False, sharey="row")
    for axes, (layers, row) in zip(panels, clouds.items(), strict=True):
        for ax, cloud in zip(axes, row, strict=False):
            _scatter(ax, cloud, colour[cloud.method])
        for ax in axes[len(row) :]:
            ax.set_axis_off()
        axes[0].set_ylabel(f"{layers}\n{what}", fontsize=8)
    return figure


def _scatter(ax: Axes, cloud: Cloud, shade: str) -> None:
    ax.scatter(
        cloud.score,
        cloud.contribution,
        s=3 if len(cloud.score) > 1000 else 9,
        color=shade,
        alpha=0.35,
        linewidths=0,
        rasterized=True,
    )
    ax.axhline(0, color=GREY, linewidth=0.4, zorder=0)
    ax.axvline(0, color=GREY, linewidth=0.4, zorder=0)
    known = "undefined" if cloud.pearson is None else f"{cloud.pearson:.2f}"
    title = cloud.method.replace(", ", ",\n")
    ax.set_title(f"{title}\nPearson {known}", fontsize=8)
    ax.set_xlabel("score", fontsize=8)
    ax.locator_params(axis="x", nbins=5)
    ax.ticklabel_format(scilimits=(-2, 2))
    ax.xaxis.get_offset_text().set_fontsize(6)
    ax.yaxis.get_offset_text().set_fontsize(6)
    ax.tick_params(labelsize=6)
