"""`rules`: which walks agree best with interventions: rules, biases and outputs (beyond the paper).

All walks on every network, chosen on some samples and reported on others, and what no walks exceed.

How much of joint contributions can any measure on walks express? Two layers bound nothing: a
measure may have any joint relevances of their neurons. Over three, it is a product, as relevance
is passed on by one neuron alone (eq. 12):

    R(p, i, j) = R(p | i) R(i, j)

so that for each neuron i of the middle layer the relevances `[p, j]` are of rank one. Biases that
are inputs take any rest, so that nothing else binds the two factors. Of all such products the one
nearest to the contributions is what the largest singular vectors of each `[p, j]` give, and its
cosine with them the largest there is. Joint relevances and contributions of many neurons have
means of nearly zero, so that it is the largest correlation as well, but for what their means make.
Such a ceiling is a score that has seen the contributions: a bound, and no way to explain anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any, Literal

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nrm import rules
from nrm.composites import Composite
from nrm.errors import InputError
from nrm.evaluation import Evaluation, Families, Interventions, joint_contributions
from nrm.evaluation.scores import Score
from nrm_reproduce import comparison
from nrm_reproduce.cnn import CHANNELS, CLUSTERS, Plan
from nrm_reproduce.comparison import Comparison, Explained, JointRelevance, Sample, Walks
from nrm_reproduce.data import load_flat
from nrm_reproduce.mlp import perceptron, samples
from nrm_reproduce.networks import INPUT, LAYERS, MLP, pictured
from nrm_reproduce.report import (
    GREY,
    STYLE,
    Experiment,
    Picture,
    Report,
    Request,
    Row,
    Table,
    versions,
)

NAME = "rules"
GAMMAS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
PAIRS, TRIPLES, CHANNEL_PAIRS, CLUSTER_PAIRS = 50, 12, 12, 24
"""How many samples are reported on by default."""

ANY, ACTIVE = "ceiling: any measure", "ceiling: silent neurons take none"
LOWER = "ceiling: pixels as by occlusion, biases take the rest"
UPPER = "ceiling: neurons as by occlusion, biases take the rest"

_OWN, _BOUND = "#2166ac", "#b2182b"
_BIAS_COLOURS = {"drop": "#b2182b", "input": "#2166ac"}


# -- the walks ------------------------------------------------------------------------------------

Bias = Literal["drop", "input"]
_BIASES: dict[Bias, str] = {"drop": "biases dropped", "input": "biases as inputs"}
_OUTPUTS: dict[Explained, str] = {"logits": "all logits", "probabilities": "softmax"}


def _walks(name: str, rule: rules.Rule | Composite, bias: Bias) -> Walks:
    method = f"{name}, {_BIASES[bias]}"
    return Walks(method, method, rule, bias)


def gamma(value: float, bias: Bias) -> Walks:
    """The paper's rule (eq. 14)."""
    return _walks(f"gamma {value:g}", rules.PlainGamma(value), bias)


def zero(bias: Bias) -> Walks:
    """LRP-0."""
    return _walks("LRP-0", rules.Zero(), bias)


REST = Walks(
    "occlusion, biases take the rest",
    "occlusion, biases take the rest",
    rules.Occlusion(rest_to_bias=True),
    "input",
)

BIASES: tuple[Bias, ...] = ("drop", "input")

RULES: tuple[Walks, ...] = (
    *(zero(bias) for bias in BIASES),
    *(gamma(value, bias) for value in GAMMAS for bias in BIASES),
    *(_walks("sign-aware gamma 0.1", rules.Gamma(0.1), bias) for bias in BIASES),
    *(_walks("z+", rules.ZPlus(), bias) for bias in BIASES),
    *(_walks("alpha 2 beta 1", rules.AlphaBeta(2.0, 1.0), bias) for bias in BIASES),
    *(_walks("occlusion", rules.Occlusion(), bias) for bias in BIASES),
    REST,
)
"""All rules, with and without biases."""

FEW: tuple[Walks, ...] = (
    *(zero(bias) for bias in BIASES),
    *(gamma(value, "drop") for value in (0.02, 0.05, 0.1, 0.25)),
    gamma(0.1, "input"),
    _walks("z+", rules.ZPlus(), "drop"),
    _walks("alpha 2 beta 1", rules.AlphaBeta(2.0, 1.0), "drop"),
    REST,
)
"""Those for where a comparison takes long."""


def outputs(walks: Walks) -> tuple[Walks, ...]:
    """The same walks from other outputs than the explained logit alone."""
    return tuple(
        Walks(f"{walks.key}, {text}", f"{walks.method}, {text}", walks.rules, walks.bias, explained)
        for explained, text in _OUTPUTS.items()
    )


# -- ceilings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceiling:
    """The measure nearest to the contributions.

    Arguments:
        active: neurons of the last layer without an activation have no relevance, as under any
            rule for the layer above whose contributions are multiples of activations.
    """

    active: bool = False

    def __call__(self, families: Families, interventions: Interventions) -> Tensor:
        """`[n1, n2]` or `[n1, n2, n3]`: its joint relevances, times `f(x)`."""
        contribution = joint_contributions(interventions, *families.sets)
        if self.active:
            contribution = contribution * (families.activations()[-1] > 0)
        return contribution if contribution.dim() == 2 else nearest_product(contribution)


@dataclass(frozen=True, eq=False)
class HalfGiven:
    """The measure nearest to the contributions that has one factor of given walks.

    Arguments:
        relevance: of pairs of neurons of two of the three layers, by the given walks.
        lower: whether these are the two lower ones, so that `R(p | i)` is given; or `R(i, j)`.
    """

    relevance: JointRelevance
    lower: bool

    def __call__(self, families: Families, interventions: Interventions) -> Tensor:
        """`[n1, n2, n3]`: its joint relevances, times `f(x)`."""
        contribution = joint_contributions(interventions, *families.sets)
        pairs = self.relevance(families, interventions)
        if self.lower:
            return with_lower(contribution, pairs)
        return with_lower(contribution.permute(2, 1, 0), pairs.T).permute(2, 1, 0).contiguous()


def nearest_product(values: Tensor) -> Tensor:
    """`[p, i, j]`, for each i of rank one, as near to the given as any."""
    slices = values.permute(1, 0, 2)
    if values.shape[0] < values.shape[2]:
        return nearest_product(values.permute(2, 1, 0)).permute(2, 1, 0).contiguous()
    products = torch.bmm(slices.transpose(1, 2), slices)  # [i, j, j], the smaller of the two
    largest = torch.linalg.eigh(products.double()).eigenvectors[..., -1:].to(values)
    found = torch.bmm(torch.bmm(slices, largest), largest.transpose(1, 2))
    return found.permute(1, 0, 2).contiguous()


def with_lower(values: Tensor, pairs: Tensor) -> Tensor:
    """`[p, i, j]`, multiples of `pairs` `[p, i]`, as near to the given as any."""
    sizes = pairs.square().sum(0)
    met = torch.einsum("pij,pi->ij", values, pairs)
    factors = torch.where(sizes[:, None] > 0, met / sizes[:, None], 0.0)
    return pairs[:, :, None] * factors


# -- the networks ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trial:
    """One comparison: all walks on combinations of neuron sets of some layers of a network.

    Attributes:
        title: of tables and figures.
        one: the walks, and the ceilings as scores beside them.
        choosing: samples on which the best walks are found.
        reporting: others, which are reported on.
    """

    title: str
    one: Comparison
    choosing: Sequence[Sample]
    reporting: Sequence[Sample]


def trials(request: Request) -> Iterator[Trial]:
    """One after the other, each when its turn comes: training and reading take their time."""
    yield from _perceptron(request)
    yield convolutional(request, CHANNELS, CHANNEL_PAIRS)
    yield convolutional(request, CLUSTERS, CLUSTER_PAIRS)


def _perceptron(request: Request) -> Iterator[Trial]:
    """Single neurons of the multilayer perceptron, by twos and by threes."""
    data = load_flat(request.data)
    network = perceptron(data, request)
    model = network.model
    name = f"{'-'.join(map(str, network.widths.values()))}-10 on {data.name}"
    every = (*RULES, *outputs(zero("input")), *outputs(gamma(0.1, "drop")))
    ceilings: Mapping[str, Score] = {ACTIVE: Ceiling(active=True)}
    yield Trial(
        f"{name}: {', '.join(LAYERS)}",
        Comparison("neuron-pairs", model, LAYERS, every, others=ceilings),
        samples(data.held_out, "held out", 20),
        samples(data.test, "test", request.samples or PAIRS),
    )
    layers = (INPUT, *LAYERS)
    yield Trial(
        f"{name}: {', '.join(layers)}",
        Comparison("neuron-triples", model, layers, FEW, others=_ceilings(model)),
        samples(data.held_out, "held out", 4),
        samples(data.test, "test", request.samples or TRIPLES),
    )


def _ceilings(model: MLP) -> dict[str, Score]:
    """What bounds relevance of three layers."""
    lower, upper = (INPUT, LAYERS[0]), LAYERS
    return {
        ANY: Ceiling(),
        ACTIVE: Ceiling(active=True),
        LOWER: HalfGiven(JointRelevance(REST, model, lower), lower=True),
        UPPER: HalfGiven(JointRelevance(REST, model, upper), lower=False),
    }


def convolutional(request: Request, plan: Plan, count: int) -> Trial:
    """Channels or clusters of a convolutional network.

    Raises:
        InputError: there are no two pictures.
    """
    reported = request.samples or count
    network = pictured(replace(request, weights=None), reported + -(-reported // 2))
    pictures = [(photo.name, photo.x) for photo in network.photos]
    if len(pictures) < 2:
        raise InputError(
            f"--data {request.data}: one picture is not enough to choose walks on one and report "
            "on another."
        )
    layers = plan.layers[network.kind][0]
    by = plan.by(network.kind, request.seed)
    return Trial(
        f"{network.kind}, {plan.part}s: {', '.join(layers)}",
        Comparison(f"{plan.part}-pairs", network.model, layers, FEW, by, one_class=True),
        pictures[::3],
        [picture for n, picture in enumerate(pictures) if n % 3],
    )


# -- the experiment -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """What a trial found: the best walks, how well all do where they were chosen, and elsewhere."""

    trial: Trial
    best: Walks
    chosen_on: Evaluation
    reported: Evaluation

    @property
    def name(self) -> str:
        """Of the trial, in JSON."""
        return self.trial.one.name

    @property
    def methods(self) -> dict[str, str]:
        """Their names are what tables call them."""
        return {method: method for method in self.reported.methods}


def run(request: Request) -> Report:
    """Choose walks on some samples, report on others, network by network."""
    with torch.no_grad():
        found = [_found(trial, request) for trial in trials(request)]
    return Report(
        NAME,
        "Which walks agree with interventions",
        [row for one in found for row in _rows(one)],
        _pictures(found),
        {
            **{one.name: one.trial.title for one in found},
            "walks": len(RULES),
            "seed": request.seed,
            "versions": versions(),
        },
        _READING,
        {one.name: _details(one) for one in found},
        tables=[_chosen(found)],
    )


def _found(trial: Trial, request: Request) -> Found:
    request.say(f"{trial.title}: {len(trial.choosing)} samples to choose on …")
    best, chosen_on = trial.one.choose(trial.choosing, request)
    request.say(f"{trial.title}: {len(trial.reporting)} samples to report on …")
    return Found(trial, best, chosen_on, trial.one.report(trial.reporting, request))


_READING = (
    "The Pearson correlation of joint relevance with the joint contribution of neurons or neuron "
    "sets, one of each layer, to the logit of the predicted class: over all combinations of a "
    "sample, then the mean over samples, with 95 % bootstrap intervals. What is removed is set to "
    "zero.",
    "The best walks are chosen on samples that are not reported on. A ceiling is a measure that "
    "is fitted to the contributions: what no walks exceed, to three digits, and no way to explain "
    "anything.",
    f"Where a comparison takes long, {len(FEW)} of the {len(RULES)} walks are compared.",
)


def _rows(found: Found) -> list[Row]:
    return comparison.rows(f"{NAME}: {found.name}", found.reported, found.methods, {})


def _details(found: Found) -> dict[str, Any]:
    return {
        "chosen": found.best.method,
        "choosing": found.chosen_on.table(),
        **comparison.details(found.reported, found.methods),
    }


def _chosen(found: Sequence[Found]) -> Table:
    lines = []
    for one in found:
        there, elsewhere = (e.mean(one.best.key) for e in (one.chosen_on, one.reported))
        lines.append(
            [
                one.trial.title,
                one.best.method,
                there.mean,
                there.samples,
                elsewhere.mean,
                elsewhere.low,
                elsewhere.high,
                elsewhere.samples,
            ]
        )
    heads = ["network", "best walks", "there", "samples", "elsewhere", "low", "high", "samples"]
    return Table("The best walks, and how they do on other samples", heads, lines)


# -- figures --------------------------------------------------------------------------------------


def _pictures(found: Sequence[Found]) -> list[Picture]:
    return [
        Picture(
            "walks.png",
            "All walks",
            "Means over samples with 95 % bootstrap intervals. Open marks are ceilings.",
            draw_walks(
                {one.trial.title: (one.reported, tuple(one.trial.one.others)) for one in found}
            ),
        ),
        Picture(
            "gammas.png",
            "How much gamma",
            "The paper's rule, from LRP-0 (gamma = 0) on, with and without biases as inputs.",
            draw_gammas({one.trial.title: one.reported for one in found}),
        ),
    ]


@matplotlib.rc_context(STYLE)
def draw_walks(found: Mapping[str, tuple[Evaluation, Sequence[str]]]) -> Figure:
    """A dot for each method, a panel for each network.

    Arguments:
        found: by title, what was found and which methods are ceilings.
    """
    counts = [len(evaluation.methods) for evaluation, _ in found.values()]
    figure = Figure(
        figsize=(8.4, 0.215 * sum(counts) + 0.75 * len(counts) + 0.3),
        dpi=130,
        layout="constrained",
    )
    panels: Any = figure.subplots(
        len(counts), 1, sharex=True, squeeze=False, height_ratios=[n + 1 for n in counts]
    )
    for ax, (title, (evaluation, ceilings)) in zip(panels[:, 0], found.items(), strict=True):
        _dots(ax, evaluation, ceilings)
        ax.set_title(title, loc="left")
    panels[-1, 0].set_xlabel("Pearson correlation with joint contribution")
    return figure


def _dots(ax: Axes, evaluation: Evaluation, ceilings: Sequence[str]) -> None:
    for place, method in enumerate(evaluation.methods):
        mean = evaluation.mean(method)
        if mean.mean is None or mean.low is None or mean.high is None:
            continue
        bound = method in ceilings
        colour = _BOUND if bound else _OWN
        ax.errorbar(
            mean.mean,
            place,
            xerr=[[mean.mean - mean.low], [mean.high - mean.mean]],
            fmt="D" if bound else "o",
            color=colour,
            markersize=4.5,
            markerfacecolor="white" if bound else colour,
            elinewidth=1.2,
        )
    ax.set_yticks(range(len(evaluation.methods)), evaluation.methods, fontsize=8)
    ax.set_ylim(len(evaluation.methods) - 0.4, -0.6)
    ax.axvline(0, color=GREY, linewidth=0.6)
    ax.set_xlim(min(-0.02, ax.get_xlim()[0]), 1.01)
    ax.grid(axis="both", color="0.92", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(axis="x", labelbottom=True)
    ax.tick_params(axis="y", length=0)


@matplotlib.rc_context(STYLE)
def draw_gammas(found: Mapping[str, Evaluation]) -> Figure:
    """Correlation against gamma, a panel for each network."""
    figure = Figure(figsize=(3.5 * len(found), 3.4), dpi=130, layout="constrained")
    panels: Any = figure.subplots(1, len(found), squeeze=False, sharey=True)
    for ax, (title, evaluation) in zip(panels[0], found.items(), strict=True):
        for bias in BIASES:
            colour = _BIAS_COLOURS[bias]
            walks = {0.0: zero(bias), **{value: gamma(value, bias) for value in GAMMAS}}
            known = {
                value: evaluation.mean(each.key)
                for value, each in walks.items()
                if each.key in evaluation.methods
            }
            drawn = {v: m for v, m in known.items() if m.mean is not None}
            ax.plot(
                list(drawn),
                [m.mean for m in drawn.values()],
                "o-",
                color=colour,
                label=_BIASES[bias],
                ms=4,
            )
            ends = [[m.low for m in drawn.values()], [m.high for m in drawn.values()]]
            ax.fill_between(list(drawn), *ends, color=colour, alpha=0.15, linewidth=0)
        network, layers = title.split(": ")
        ax.set_title("\n".join([network, *wrap(layers, 36)]), fontsize=8, loc="left")
        ax.set_xscale("symlog", linthresh=0.02)
        ax.set_xticks([0, 0.02, 0.1, 1], ["0", "0.02", "0.1", "1"])
        ax.minorticks_off()
        ax.set_xlabel("gamma")
        ax.grid(color="0.92", linewidth=0.7)
    panels[0, 0].set_ylabel("Pearson correlation")
    panels[0, 0].legend(loc="lower left")
    return figure


EXPERIMENT = Experiment(NAME, run)
