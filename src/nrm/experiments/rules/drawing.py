"""The figures: all walks of all networks, and the paper's rule from gamma to gamma."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from nrm.evaluation import Evaluation
from nrm.experiments.rules.grid import BIASES, GAMMAS, gamma, zero

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OWN, _BOUND, _GREY = "#2166ac", "#b2182b", "0.35"
_BIASES = {"drop": ("#b2182b", "biases dropped"), "input": ("#2166ac", "biases as inputs")}


def draw_walks(found: Mapping[str, tuple[Evaluation, Sequence[str]]]) -> Figure:
    """A dot for each method, a panel for each network.

    Arguments:
        found: by title, what was found and which methods are ceilings.
    """
    from matplotlib.figure import Figure

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
        ax.set_title(title, fontsize=10, loc="left")
    panels[-1, 0].set_xlabel("Pearson correlation with joint contribution", fontsize=9)
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
    ax.axvline(0, color=_GREY, linewidth=0.6)
    ax.set_xlim(min(-0.02, ax.get_xlim()[0]), 1.01)
    ax.grid(axis="both", color="0.92", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(axis="x", labelsize=8, labelbottom=True)
    ax.tick_params(axis="y", length=0)
    _open(ax)


def draw_gammas(found: Mapping[str, Evaluation]) -> Figure:
    """Correlation against gamma, a panel for each network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 * len(found), 3.4), dpi=130, layout="constrained")
    panels: Any = figure.subplots(1, len(found), squeeze=False, sharey=True)
    for ax, (title, evaluation) in zip(panels[0], found.items(), strict=True):
        for bias in BIASES:
            colour, label = _BIASES[bias]
            walks = {0.0: zero(bias), **{value: gamma(value, bias) for value in GAMMAS}}
            known = {
                value: evaluation.mean(each.key)
                for value, each in walks.items()
                if each.key in evaluation.methods
            }
            drawn = {v: m for v, m in known.items() if m.mean is not None}
            ax.plot(
                list(drawn), [m.mean for m in drawn.values()], "o-", color=colour, label=label, ms=4
            )
            ends = [[m.low for m in drawn.values()], [m.high for m in drawn.values()]]
            ax.fill_between(list(drawn), *ends, color=colour, alpha=0.15, linewidth=0)
        network, layers = title.split(": ")
        ax.set_title("\n".join([network, *wrap(layers, 36)]), fontsize=8, loc="left")
        ax.set_xscale("symlog", linthresh=0.02)
        ax.set_xticks([0, 0.02, 0.1, 1], ["0", "0.02", "0.1", "1"])
        ax.minorticks_off()
        ax.set_xlabel("gamma", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(color="0.92", linewidth=0.7)
        _open(ax)
    panels[0, 0].set_ylabel("Pearson correlation", fontsize=9)
    panels[0, 0].legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def _open(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
