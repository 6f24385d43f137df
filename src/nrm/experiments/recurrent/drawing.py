"""The figure: relevance over time, a row for each task and a column for each method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nrm.experiments.recurrent.relevance import Method
from nrm.experiments.recurrent.series import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
_GREY = "0.35"


def draw(result: dict[str, Any]) -> Figure:
    """Relevance over time, one row for a task and one column for a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.4, 5.4), dpi=110, layout="constrained")
    panels: Any = figure.subplots(len(Task), len(Method), sharex=True)
    for row, task in enumerate(Task):
        found = result["tasks"][str(task)]
        for column, method in enumerate(Method):
            ax = panels[row][column]
            _panel(ax, method, found["methods"][str(method)], found["label_step"])
            if row == 0:
                ax.set_title(_HEADS[method], fontsize=10, color=_COLOURS[method])
            else:
                ax.set_xlabel("time step", fontsize=9)
        panels[row][0].set_ylabel(f"{_ROWS[task]}\n\nrelevance", fontsize=10)
        panels[row][1].set_ylabel("|relevance / logit|", fontsize=9)
    label_step = result["tasks"][str(Task.EVENT)]["label_step"]
    _note(panels[0][2], "the step that\nsets the label", label_step + 1)
    last = result["steps"] + 0.5
    _note(panels[1][2], "line: median\nband: middle 80 %", last, align="right")
    return figure


def _panel(ax: Axes, method: Method, found: dict[str, Any], label_step: int) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, SymmetricalLogLocator

    curve = found["curve_of_sizes" if method is Method.UNNORMALIZED else "curve"]
    steps = list(range(1, len(curve["median"]) + 1))
    colour = _COLOURS[method]
    ax.axvline(label_step + 1, color=_GREY, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
    ax.fill_between(steps, curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
    ax.plot(steps, curve["median"], color=colour, marker="o", markersize=3.5, linewidth=1.6)
    if method is Method.UNNORMALIZED:
        ax.set_yscale("log")
        ax.axhline(1, color=_GREY, linewidth=0.6)
        ax.yaxis.set_major_locator(LogLocator(numticks=7))
        ax.yaxis.set_minor_locator(FixedLocator([]))
    else:
        ax.axhline(0, color=_GREY, linewidth=0.6)
    if method is Method.PLAIN:
        ax.set_yscale("symlog", linthresh=1)
        locator = SymmetricalLogLocator(base=10, linthresh=1)
        locator.set_params(numticks=7)
        ax.yaxis.set_major_locator(locator)
    elif method is not Method.UNNORMALIZED:
        ax.set_ylim(min(-0.25, 1.05 * min(curve["low"])), max(1.2, 1.05 * max(curve["high"])))
    ax.set_xlim(0.5, len(steps) + 0.5)
    ax.xaxis.set_major_locator(FixedLocator(steps if len(steps) <= 12 else steps[1::2]))
    ax.tick_params(labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


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
        color=_GREY,
    )
