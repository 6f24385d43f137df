"""The figures: correlations beside the paper's, SC_k (Fig. 4) and scatter plots (App. J)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from nrm.experiments.tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

_GREY = "0.35"
_PALETTE = ("#b2182b", "#2166ac", "#1b7837", "#e08214", "#762a83", "#4d4d4d", "#999999")


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


def colours(methods: Sequence[str]) -> dict[str, str]:
    """One for each method, the same in all figures."""
    return {method: _PALETTE[n % len(_PALETTE)] for n, method in enumerate(methods)}


def draw_correlations(rows: Sequence[Row], colour: Mapping[str, str]) -> Figure:
    """A bar for each row with its interval, and a mark where the paper's figure is."""
    from matplotlib.figure import Figure

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
        ax.set_title(f"combinations of {', '.join(layers)}", fontsize=10, loc="left")
    panels[-1, 0].set_xlabel("Pearson correlation, mean over samples", fontsize=9)
    drawn: dict[str, Any] = {}
    for ax in panels[:, 0]:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, handle)
    if drawn:
        figure.legend(
            drawn.values(), drawn.keys(), loc="outside lower right", fontsize=8, frameon=False
        )
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
    ax.axvline(0, color=_GREY, linewidth=0.6)
    ax.set_xlim(min(0.0, ax.get_xlim()[0]), 1.02)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    _open(ax)


def draw_curves(curves: Mapping[str, Sequence[Curve]], colour: Mapping[str, str]) -> Figure:
    """SC_k against k, a panel for each choice of layers."""
    from matplotlib.figure import Figure

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
        ax.axhline(0, color=_GREY, linewidth=0.6)
        ax.set_title(layers, fontsize=10, loc="left")
        ax.set_xlabel("k, combinations in order of relevance", fontsize=9)
        ax.tick_params(labelsize=8)
        _open(ax)
    for ax in panels[:, 0]:
        ax.set_ylabel("SC$_k$: summed joint contributions, in logits", fontsize=9)
    figure.legend(
        drawn.values(),
        drawn.keys(),
        loc="outside lower center",
        ncols=min(across + 1, 3),
        fontsize=8,
        frameon=False,
    )
    return figure


def draw_scatter(clouds: Mapping[str, Sequence[Cloud]], colour: Mapping[str, str]) -> Figure:
    """Relevance against joint contribution, a row for each choice of layers."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in clouds.values())
    size = (2.55 * columns, 2.75 * len(clouds) + 0.3)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels: Any = figure.subplots(len(clouds), columns, squeeze=False, sharey="row")
    for axes, (layers, row) in zip(panels, clouds.items(), strict=True):
        for ax, cloud in zip(axes, row, strict=False):
            _scatter(ax, cloud, colour[cloud.method])
        for ax in axes[len(row) :]:
            ax.set_axis_off()
        axes[0].set_ylabel(f"{layers}\njoint contribution, logits", fontsize=8)
    return figure


def _scatter(ax: Axes, cloud: Cloud, shade: str) -> None:
    ax.scatter(
        cloud.score,
        cloud.contribution,
        s=3,
        color=shade,
        alpha=0.35,
        linewidths=0,
        rasterized=True,
    )
    ax.axhline(0, color=_GREY, linewidth=0.4, zorder=0)
    ax.axvline(0, color=_GREY, linewidth=0.4, zorder=0)
    known = "undefined" if cloud.pearson is None else f"{cloud.pearson:.2f}"
    ax.set_title(f"{cloud.method}\nPearson {known}", fontsize=8)
    ax.set_xlabel("score", fontsize=8)
    ax.locator_params(axis="x", nbins=5)
    ax.ticklabel_format(scilimits=(-2, 2))
    ax.xaxis.get_offset_text().set_fontsize(6)
    ax.yaxis.get_offset_text().set_fontsize(6)
    ax.tick_params(labelsize=6)
    _open(ax)


def _open(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
