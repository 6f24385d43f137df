"""`rnn`: relevance over time in a linear recurrent network (section 4.5, Fig. 8).

A series of three states, one-hot, sets its label at one step. A linear cell
`h_t = W [x_t, h_{t-1}] + b` reads it, and the last hidden state says the label. Input and hidden
state are parents of the same neurons, so they are normalised jointly (eqs. 19-23). The step that
deserves the relevance is known, so one sees what a rule makes of it over many steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, SymmetricalLogLocator
from torch import Tensor, nn

from nrm import Explainer, rules
from nrm.composites import Composite, Everywhere, LRPAll
from nrm.display import counted
from nrm.evaluation.store import Store
from nrm.tensors import one_thread
from nrm_reproduce.data import Series, Task, middle
from nrm_reproduce.networks import train_rnn
from nrm_reproduce.report import GREY, STYLE, Experiment, Picture, Report, Request, Table, versions

NAME = "rnn"
STEPS = 12
NETWORKS = 8
"""For each task, unless more or fewer are asked for."""
EXPLAINED = 200
"""At most so many series are explained for each network."""
_APART = 1_000_000
"""From one seed to the next: no network belongs to two of them."""
_BAND = (0.1, 0.9)


# -- what each way of propagating relevance says of every step ------------------------------------


class Method(StrEnum):
    """How relevance is propagated.

    Attributes:
        PLAIN: the normalised measure under the paper's rule, gamma = 0.25, biases dropped.
        UNNORMALIZED: the original walk relevance (eq. 26) under the same rule.
        SIGN_AWARE: the normalised measure under the sign-aware rule, gamma = 0.25.
        LRP_ALL: the normalised measure under LRP-0, with biases as inputs.
    """

    PLAIN = "plain"
    UNNORMALIZED = "unnormalized"
    SIGN_AWARE = "sign_aware"
    LRP_ALL = "lrp_all"


COMPOSITES: dict[Method, Composite] = {
    Method.PLAIN: Everywhere(rules.PlainGamma(0.25)),
    Method.SIGN_AWARE: Everywhere(rules.Gamma(0.25)),
    Method.LRP_ALL: LRPAll(),
}
"""Those of the normalised measures; the unnormalised one is of the plain rule."""

METHODS = {
    Method.PLAIN: "NRM, gamma = 0.25 as in the paper, biases dropped",
    Method.UNNORMALIZED: "unnormalised, the same rule",
    Method.SIGN_AWARE: "NRM, sign-aware gamma = 0.25, biases dropped",
    Method.LRP_ALL: "NRM, LRP-0, biases as inputs",
}
"""What tables call them."""


@dataclass(frozen=True)
class Relevance:
    """What one method says about some series.

    Attributes:
        over_time: `[N, steps]`, the relevance of the input neurons of every step; what is
            unnormalised is given in units of the logit.
        biases: `[N]`, the share that ends at biases; nothing for what is unnormalised.
        cut_deviation: the largest deviation from one of a total over a cut, relative to
            max(1, total variation). There is a cut between any two steps.
    """

    over_time: Tensor
    biases: Tensor
    cut_deviation: float | None


def relevance_over_time(model: nn.Module, series: Series) -> dict[Method, Relevance]:
    """What every method says of each step, for the label of each series."""
    found: dict[Method, Relevance] = {}
    with one_thread():
        for method, composite in COMPOSITES.items():
            R = Explainer(model, composite)(series.x, target=series.label)
            checks = R.diagnostics()
            found[method] = Relevance(
                R.heatmap().sum(-1), checks.bias_share, checks.worst_cut_deviation
            )
            if method is Method.PLAIN:
                unnormalized = R.heatmap(normalized=False).sum(-1) / R.scale[:, None]
                nothing = torch.zeros_like(R.scale)
                found[Method.UNNORMALIZED] = Relevance(unnormalized, nothing, None)
    return found


# -- networks, each trained and explained once, and what all of them say together -----------------


def studied(task: Task, steps: int, seed: int) -> dict[str, Any]:
    """One network, trained and explained: all that is kept of it, as JSON takes it."""
    trained = train_rnn(task, steps, seed)
    series = trained.held_out[:EXPLAINED]
    return {
        "seed": seed,
        "accuracy": trained.accuracy,
        "held_out": len(trained.held_out),
        "updates": trained.updates,
        "label_step": series.label_step.tolist(),
        "found": {
            method: {
                "over_time": relevance.over_time.tolist(),
                "biases": relevance.biases.tolist(),
                "cut_deviation": relevance.cut_deviation,
            }
            for method, relevance in relevance_over_time(trained.model, series).items()
        },
    }


def summary(networks: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """All networks of a task, as `studied` gives them.

    Curves are of the series whose label is set at the middle step; all other numbers are of all
    series explained.
    """
    label_step = torch.tensor([step for network in networks for step in network["label_step"]])
    drawn = middle(steps)
    training = ("seed", "accuracy", "held_out", "updates")
    return {
        "networks": [{name: network[name] for name in training} for network in networks],
        "explained": len(label_step),
        "label_step": drawn,
        "methods": {
            str(method): _method([one["found"][method] for one in networks], label_step, drawn)
            for method in Method
        },
    }


def _method(found: Sequence[Mapping[str, Any]], label_step: Tensor, drawn: int) -> dict[str, Any]:
    """One method over all networks."""
    over_time, biases = (
        torch.tensor([row for one in found for row in one[name]], dtype=torch.float64)
        for name in ("over_time", "biases")
    )
    deviations = [one["cut_deviation"] for one in found if one["cut_deviation"] is not None]
    curves = over_time[label_step == drawn]
    return {
        "largest_at_label_step": float((over_time.argmax(1) == label_step).double().mean()),
        "at_label_step": _spread(over_time.gather(1, label_step[:, None])[:, 0]),
        "over_time": {"smallest": float(over_time.min()), "largest": float(over_time.max())},
        "total_variation": _spread(over_time.abs().sum(1)),
        "total_of_inputs": _spread(over_time.sum(1).abs()),
        "biases": _spread(biases),
        "worst_cut_deviation": max(deviations, default=None),
        "curve": _curve(curves),
        "curve_of_sizes": _curve(curves.abs()),
    }


def _spread(values: Tensor) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "median": float(values.quantile(0.5)),
        "smallest": float(values.min()),
        "largest": float(values.max()),
    }


def _curve(curves: Tensor) -> dict[str, list[float]]:
    low, high = _BAND
    return {
        "mean": curves.mean(0).tolist(),
        "median": curves.quantile(0.5, 0).tolist(),
        "low": curves.quantile(low, 0).tolist(),
        "high": curves.quantile(high, 0).tolist(),
    }


# -- the experiment -------------------------------------------------------------------------------


def run(request: Request, steps: int = STEPS) -> Report:
    """Train and explain the networks of both tasks, and draw; data are made, not read.

    Arguments:
        steps: the length of a series.
    """
    count = request.samples or NETWORKS
    store = Store(request.kept / f"{NAME}-{steps}", {"explained": EXPLAINED})
    request.say(f"{len(Task) * count} networks …")
    tasks: dict[str, Any] = {}
    with counted(request.progress, "networks", len(Task) * count) as advance:
        for task in Task:
            networks = []
            for seed in range(request.seed * _APART, request.seed * _APART + count):
                networks.append(store.once(f"{task}-{seed}", partial(studied, task, steps, seed)))
                advance(1)
            tasks[str(task)] = summary(networks, steps)
    found = {"steps": steps, "seeds": count, "gamma": 0.25, "tasks": tasks}
    return Report(
        NAME,
        "Relevance over time in a linear recurrent network",
        (),
        [
            Picture(
                "recurrent.png",
                "Relevance over time",
                "Series whose label is set at the middle step (dashed). Lines are medians over "
                "networks and series, bands the middle 80 %. First column: symmetric log scale. "
                "Second column: sizes, on a log scale.",
                draw(found),
            )
        ],
        {
            "data": "series made for the purpose",
            "steps": steps,
            **{task: _training(one["networks"]) for task, one in tasks.items()},
            "seed": request.seed,
            "versions": versions(),
        },
        _READING,
        found,
        tables=[_table(tasks)],
    )


_READING = (
    "A series of three states sets its label at one step, which a network has to remember until "
    "the end: a good explanation points at that step. Event: the series rests but for one step, "
    "any of them. Position: all states are random, and the middle step sets the label.",
    "The relevance of a step is that of its three input neurons, for the label of the series. The "
    "unnormalised relevance is divided by the logit.",
    "The paper gives a figure and no numbers. Sizes, training and how the series are made are not "
    "its own, which it leaves open.",
)


def _training(networks: list[dict[str, Any]]) -> str:
    right = sum(network["accuracy"] == 1 for network in networks)
    updates = [network["updates"] for network in networks]
    worst = min(network["accuracy"] for network in networks)
    return (
        f"{right} of {len(networks)} networks always right"
        + (f" (the worst in {worst:.2%})" if worst < 1 else "")
        + f", trained on {min(updates)} to {max(updates)} batches"
    )


def _table(tasks: Mapping[str, Any]) -> Table:
    lines = [
        (
            task,
            METHODS[Method(method)],
            numbers["at_label_step"]["median"],
            100 * numbers["largest_at_label_step"],
            numbers["over_time"]["smallest"],
            numbers["over_time"]["largest"],
            numbers["total_variation"]["median"],
            numbers["total_variation"]["largest"],
        )
        for task, found in tasks.items()
        for method, numbers in found["methods"].items()
    ]
    heads = (
        "task",
        "method",
        "label step, median",
        "largest of all steps, %",
        "smallest",
        "largest",
        "Σ|R|, median",
        "Σ|R|, largest",
    )
    return Table(
        "Relevance of the label step, and of all steps",
        heads,
        lines,
        note="Over all series of all networks: the relevance of the step that sets the label, in "
        "how many series no step has more, the relevance of single steps, and the sum of their "
        "sizes, which is 1 where nothing cancels.",
    )


# -- the figure -----------------------------------------------------------------------------------

_COLOURS = {
    Method.PLAIN: "#c0392b",
    Method.UNNORMALIZED: "#7d3c98",
    Method.SIGN_AWARE: "#1f6fb2",
    Method.LRP_ALL: "#1e8449",
}
_HEADS = {
    Method.PLAIN: r"normalised, $\gamma$ as in the paper",
    Method.UNNORMALIZED: "unnormalised, the same rule",
    Method.SIGN_AWARE: r"normalised, sign-aware $\gamma$",
    Method.LRP_ALL: "normalised, LRP-0 with biases",
}
_ROWS = {
    Task.EVENT: "one event, otherwise at rest",
    Task.POSITION: "random states at all steps",
}


@matplotlib.rc_context(STYLE)
def draw(result: dict[str, Any]) -> Figure:
    """Relevance over time, one row for a task and one column for a method."""
    figure = Figure(figsize=(12.4, 5.4), dpi=110, layout="constrained")
    panels: Any = figure.subplots(len(Task), len(Method), sharex=True)
    for row, task in enumerate(Task):
        found = result["tasks"][str(task)]
        for column, method in enumerate(Method):
            ax = panels[row][column]
            _panel(ax, method, found["methods"][str(method)], found["label_step"])
            if row == 0:
                ax.set_title(_HEADS[method], color=_COLOURS[method])
            else:
                ax.set_xlabel("time step")
        panels[row][0].set_ylabel(f"{_ROWS[task]}\n\nrelevance", fontsize=10)
        panels[row][1].set_ylabel("|relevance / logit|")
    label_step = result["tasks"][str(Task.EVENT)]["label_step"]
    _note(panels[0][2], "the step that\nsets the label", label_step + 1)
    last = result["steps"] + 0.5
    _note(panels[1][2], "line: median\nband: middle 80 %", last, align="right")
    return figure


def _panel(ax: Axes, method: Method, found: dict[str, Any], label_step: int) -> None:
    curve = found["curve_of_sizes" if method is Method.UNNORMALIZED else "curve"]
    steps = list(range(1, len(curve["median"]) + 1))
    colour = _COLOURS[method]
    ax.axvline(label_step + 1, color=GREY, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
    ax.fill_between(steps, curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
    ax.plot(steps, curve["median"], color=colour, marker="o", markersize=3.5, linewidth=1.6)
    if method is Method.UNNORMALIZED:
        ax.set_yscale("log")
        ax.axhline(1, color=GREY, linewidth=0.6)
        ax.yaxis.set_major_locator(LogLocator(numticks=7))
        ax.yaxis.set_minor_locator(FixedLocator([]))
    else:
        ax.axhline(0, color=GREY, linewidth=0.6)
    if method is Method.PLAIN:
        ax.set_yscale("symlog", linthresh=1)
        locator = SymmetricalLogLocator(base=10, linthresh=1)
        locator.set_params(numticks=7)
        ax.yaxis.set_major_locator(locator)
    elif method is not Method.UNNORMALIZED:
        ax.set_ylim(min(-0.25, 1.05 * min(curve["low"])), max(1.2, 1.05 * max(curve["high"])))
    ax.set_xlim(0.5, len(steps) + 0.5)
    ax.xaxis.set_major_locator(FixedLocator(steps if len(steps) <= 12 else steps[1::2]))


def _note(ax: Axes, text: str, step: float, align: str = "left") -> None:
    """Say once what holds for all panels, at the top of one, beside a step."""
    ax.annotate(
        text,
        (step, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(7 if align == "left" else 0, 0),
        textcoords="offset points",
        ha=align,
        va="top",
        fontsize=8,
        color=GREY,
    )


EXPERIMENT = Experiment(NAME, run)
