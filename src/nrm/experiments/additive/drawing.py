"""The figure: clusters, relevance and contributions of one picture; scatter over all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nrm.experiments.additive.comparison import Compared, Effect, Score
from nrm.experiments.additive.correlation import LEVEL, Mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

_PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#995522", "#777777")
SCORES = {
    Score.JOINT: "joint relevance",
    Score.ADDITIVE: "additive relevance",
    Score.EITHER: "either",
    Score.PRODUCT: "product",
    Score.OVERLAP: "overlap",
}
EFFECTS = {Effect.JOINT: "joint contribution", Effect.TOTAL: "total contribution"}
_EFFECT_COLOURS = {Effect.JOINT: "#b2182b", Effect.TOTAL: "#4d4d4d"}
_GREY = "0.35"
MOST_NUMBERS = 8
"""Matrices of more clusters have no numbers in them, which would not be legible."""


def typical(compared: Sequence[Compared]) -> Compared:
    """The picture whose correlation of joint relevance and contribution is the median."""
    known = [(one.correlation(Score.JOINT, Effect.JOINT), one) for one in compared]
    ordered = sorted((c, i) for i, (c, _) in enumerate(known) if c is not None)
    return compared[ordered[len(ordered) // 2][1]] if ordered else compared[0]


def draw(
    compared: Sequence[Compared],
    correlations: dict[Effect, dict[Score, Mean | None]],
    names: Sequence[str] | None,
) -> Figure:
    """One picture in the upper rows, all of them in the last.

    Arguments:
        compared: one pair of layers on all pictures.
        correlations: their means, for the bars.
        names: of the classes.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = typical(compared)
    layout = ConstrainedLayoutEngine(wspace=0.08)
    figure = Figure(figsize=(13.6, 10.6), dpi=110, layout=layout)
    rows: Any = figure.subfigures(3, 1, height_ratios=(1, 1.06, 1), hspace=0.03)
    _clusters(rows[0], shown, names)
    _matrices(rows[1], shown)
    _all_pictures(rows[2], compared, shown, correlations)
    return figure


def _clusters(figure: Any, shown: Compared, names: Sequence[str] | None) -> None:
    from matplotlib.patches import Patch

    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.9))
    panels[0].imshow(np.clip(shown.photo.shown, 0, 1), cmap="gray", vmin=0, vmax=1)
    panels[0].set_title("the picture", fontsize=10)
    for ax, layer, labels in zip(panels[1:3], shown.layers, shown.labels, strict=True):
        _overlay(ax, shown.photo.shown, labels.numpy())
        ax.set_title(f"clusters of {layer}", fontsize=10)
    for ax in panels[:3]:
        ax.set_xticks([])
        ax.set_yticks([])
    what = str(shown.target) if names is None else names[shown.target]
    what = f"class {what}" if what.isdecimal() else what
    panels[3].set_axis_off()
    panels[3].text(0, 0.97, what, fontsize=14, weight="bold", va="top")
    panels[3].text(
        0,
        0.82,
        f"explained: its logit, {shown.logit:.1f}\n"
        f"rows of a matrix: clusters of {shown.layers[0]}\n"
        f"columns: clusters of {shown.layers[1]}",
        fontsize=9,
        va="top",
        linespacing=1.6,
    )
    count = len(shown.scores[Score.JOINT])
    panels[3].legend(
        handles=[
            Patch(color=_colour(number), label=f"cluster {number + 1}") for number in range(count)
        ],
        loc="lower left",
        bbox_to_anchor=(-0.04, 0.0),
        ncols=2,
        frameon=False,
        fontsize=9,
        title="colours, in each layer, the largest first",
        title_fontsize=9,
        alignment="left",
    )


def _overlay(ax: Axes, picture: Array, labels: Array) -> None:
    """The picture in grey under the colours of its clusters, with lines between them."""
    from matplotlib.colors import to_rgb

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
    logit = shown.logit or 1.0
    _matrix(panels[0], shown.scores[Score.JOINT].numpy(), shown, SCORES[Score.JOINT])
    _matrix(panels[1], shown.effects[Effect.JOINT].numpy() / logit, shown, _share(Effect.JOINT))
    _matrix(panels[2], shown.scores[Score.ADDITIVE].numpy(), shown, SCORES[Score.ADDITIVE])
    _matrix(panels[3], shown.effects[Effect.TOTAL].numpy() / logit, shown, _share(Effect.TOTAL))


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
        axis.set_label_text(f"cluster of {layer}", fontsize=9)
        for number, label in enumerate(axis.get_ticklabels()):
            label.set_color(_colour(number))
            label.set_fontweight("bold")
    ax.tick_params(labelsize=10, length=0)
    ax.set_title(title, fontsize=10)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_linewidth(0.4)  # type: ignore[operator]


def _all_pictures(
    figure: Any,
    compared: Sequence[Compared],
    shown: Compared,
    correlations: dict[Effect, dict[Score, Mean | None]],
) -> None:
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.25))
    chosen = (
        (Score.JOINT, Effect.JOINT),
        (Score.ADDITIVE, Effect.JOINT),
        (Score.ADDITIVE, Effect.TOTAL),
    )
    for ax, (score, effect) in zip(panels, chosen, strict=False):
        _scatter(ax, compared, shown, score, effect)
        known = correlations[effect][score]
        if known is not None:
            ax.set_title(f"mean correlation {known.mean:.2f}", fontsize=10)
    panels[0].legend(fontsize=8, frameon=False, loc="lower right", handletextpad=0.2)
    _bars(panels[3], correlations)


def _scatter(
    ax: Axes, compared: Sequence[Compared], shown: Compared, score: Score, effect: Effect
) -> None:
    """All pairs of clusters of all pictures; those of the picture above stand out."""
    others = [one for one in compared if one is not shown]
    for group, label, style in (
        (others, "other pictures", {"s": 7, "color": "0.6", "alpha": 0.5}),
        ([shown], "the picture above", {"s": 20, "color": "#e66101", "alpha": 0.9}),
    ):
        if group:
            ax.scatter(
                np.concatenate([one.scores[score].flatten().numpy() for one in group]),
                np.concatenate(
                    [one.effects[effect].flatten().numpy() / (one.logit or 1) for one in group]
                ),
                label=label,
                linewidths=0,
                **style,  # type: ignore[arg-type]
            )
    ax.axhline(0, color=_GREY, linewidth=0.5, zorder=0)
    ax.axvline(0, color=_GREY, linewidth=0.5, zorder=0)
    ax.set_xlabel(SCORES[score], fontsize=9)
    ax.set_ylabel(_share(effect), fontsize=9)
    ax.tick_params(labelsize=8)
    _open(ax)


def _bars(ax: Axes, correlations: dict[Effect, dict[Score, Mean | None]]) -> None:
    """Mean correlations with their intervals."""
    for number, (effect, by_score) in enumerate(correlations.items()):
        known = [(place, mean) for place, mean in enumerate(by_score.values()) if mean is not None]
        if not known:
            continue
        heights = [mean.mean for _, mean in known]
        ends = [
            [mean.mean - mean.low for _, mean in known],
            [mean.high - mean.mean for _, mean in known],
        ]
        ax.bar(
            [place + 0.38 * (number - 0.5) for place, _ in known],
            heights,
            width=0.34,
            yerr=ends,
            color=_EFFECT_COLOURS[effect],
            error_kw={"elinewidth": 1, "ecolor": "black"},
            capsize=2.5,
            label=f"with the {EFFECTS[effect]}",
        )
    names = [SCORES[score].replace(" relevance", "") for score in Score]
    ax.set_xticks(range(len(names)), names, fontsize=9)
    ax.axhline(0, color=_GREY, linewidth=0.6)
    ax.set_ylim(min(-0.25, ax.get_ylim()[0]), 1.32)
    ax.set_yticks(np.arange(0, 1.01, 0.25))
    ax.tick_params(axis="y", labelsize=8)
    ax.set_ylabel(f"mean correlation, {LEVEL} % interval", fontsize=9)
    ax.legend(fontsize=8, frameon=False, loc="upper left", ncols=1)
    _open(ax)


def _share(effect: Effect) -> str:
    return f"{EFFECTS[effect]} / logit"


def _colour(number: int) -> str:
    return _PALETTE[number % len(_PALETTE)]


def _open(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
