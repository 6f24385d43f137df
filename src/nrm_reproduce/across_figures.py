"""Figures of the experiment `networks`: correlations by pairs of layers; faithful against calm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nrm.evaluation.metrics import Mean
from nrm_reproduce.report import GREY, STYLE

_BIASES = {"drop": "#b2182b", "input": "#2166ac"}
_OTHER = "#1b7837"


@dataclass(frozen=True)
class Point:
    """Walks on a network.

    Attributes:
        pearson, variation, time: of their heatmaps the last two; `None` where not defined.
        default, best: whether they are the library's, and those that were chosen.
    """

    walks: str
    pearson: float | None
    variation: float | None
    time: float | None
    default: bool
    best: bool


@matplotlib.rc_context(STYLE)
def draw_dots(
    found: Mapping[str, Sequence[tuple[str, Mapping[str, Mean]]]], colour: Mapping[str, str]
) -> Figure:
    """A row for each pair of layers, a dot for each method, a panel for each network."""
    counts = [len(rows) for rows in found.values()]
    figure = Figure(
        figsize=(9.5, 0.46 * sum(counts) + 0.55 * len(counts) + 0.9),
        dpi=130,
        layout="constrained",
    )
    panels: Any = figure.subplots(
        len(counts), 1, sharex=True, squeeze=False, height_ratios=[n + 0.6 for n in counts]
    )
    drawn: dict[str, Any] = {}
    for ax, (network, rows) in zip(panels[:, 0], found.items(), strict=True):
        for place, (_, means) in enumerate(rows):
            for step, (method, mean) in enumerate(means.items()):
                if mean.mean is None or mean.low is None or mean.high is None:
                    continue
                drawn[method] = ax.errorbar(
                    mean.mean,
                    place + 0.1 * (step - (len(means) - 1) / 2),
                    xerr=[[mean.mean - mean.low], [mean.high - mean.mean]],
                    fmt="o",
                    color=colour[method],
                    markersize=4,
                    elinewidth=1,
                )
        ax.set_yticks(range(len(rows)), [title for title, _ in rows], fontsize=6.5)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_title(network, loc="left")
        ax.axvline(0, color=GREY, linewidth=0.6)
        ax.grid(color="0.92", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
    panels[-1, 0].set_xlabel("Pearson correlation with joint contribution")
    figure.legend([*drawn.values()], [*drawn], loc="outside lower center", ncols=6)
    return figure


@matplotlib.rc_context(STYLE)
def draw_trade(found: Mapping[str, Sequence[Point]]) -> Figure:
    """Correlation against total variation, a mark for each walks, a panel for each network."""
    across = min(3, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(4.6 * across, 3.7 * down), dpi=130, layout="constrained")
    panels: Any = figure.subplots(down, across, squeeze=False)
    for ax in panels.flat[len(found) :]:
        ax.set_axis_off()
    for ax, (network, points) in zip(panels.flat, found.items(), strict=False):
        _marks(ax, points)
        ax.set_title(network, loc="left")
        ax.set_xscale("log")
        ax.margins(0.14)
        ax.xaxis.set_major_formatter("{x:.3g}")
        low, high = ax.get_xlim()
        ax.xaxis.set_minor_formatter("{x:.3g}" if high < 10 * low else "")
        ax.tick_params(axis="x", which="minor", labelsize=6)
        ax.set_xlabel("total variation of the heatmap")
        ax.grid(color="0.92", linewidth=0.7)
        ax.set_axisbelow(True)
    for ax in panels[:, 0]:
        ax.set_ylabel("Pearson correlation")
    return figure


def _marks(ax: Axes, points: Sequence[Point]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point.pearson is None or point.variation is None:
            continue
        name, _, bias = point.walks.partition(", ")
        place = (point.variation, point.pearson)
        colour = _BIASES.get(bias, _OTHER)
        if bias in _BIASES:
            lines.setdefault(bias, []).append(place)
        size = 10 + 7 * math.log2(1 + (point.time or 0.0))
        ax.scatter(*place, s=size, color=colour, linewidths=0, zorder=3)
        if point.default or point.best:
            marker = "o" if point.default else "s"
            ax.scatter(
                *place,
                s=size + 90,
                marker=marker,
                facecolor="none",
                edgecolor="black",
                zorder=4,
            )
        gamma = name.partition("(")[2].rstrip(")")
        ax.annotate(gamma or name, place, (4, 3), textcoords="offset points", fontsize=6)
    for bias, places in lines.items():
        said = "biases dropped" if bias == "drop" else "biases as inputs"
        ax.plot(*zip(*places, strict=True), color=_BIASES[bias], linewidth=0.8, label=said)
    if lines:
        ax.legend(fontsize=6.5)
