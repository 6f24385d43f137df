"""Pictures of relevance, on matplotlib figures that need no display.

Red is positive relevance, for what is explained, blue negative, against it, and white none. A
colour scale is symmetric about zero and ends at a high percentile of |R| (`SCALE_PERCENTILE`), so
that a few pixels do not decide how all others look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

Array = npt.NDArray[Any]

COLOURS = "RdBu_r"
SCALE_PERCENTILE = 99.5
OUTLINE = 0.35
"""How dark the picture's outlines are under its relevance, from 0 to 1."""
FEW_PIXELS = 64
"""Pictures with a shorter side have a line for outline, thinner than their pixels."""

ENDS = ("against", "for")
"""What the blue and the red end of the scale mean."""

_PANEL = 1.9  # inches, the side of a picture in an overview
_GREY = "0.35"


@dataclass(frozen=True)
class Panel:
    """One heatmap of an overview: `[C, H, W]` or `[H, W]`, and what stands above it."""

    title: str
    relevance: Tensor | Array


def by_pixel(relevance: Tensor | Array) -> Array:
    """Relevance as `[H, W]`: `[C, H, W]` is summed over its colours."""
    if isinstance(relevance, Tensor):
        relevance = relevance.detach().cpu().numpy()
    values = np.asarray(relevance, dtype=np.float64)
    if values.ndim not in (2, 3):
        raise ValueError(f"relevance is [C, H, W] or [H, W], not of shape {values.shape}")
    return values.sum(0) if values.ndim == 3 else values


def scale(relevance: Tensor | Array, percentile: float = SCALE_PERCENTILE) -> float:
    """Where the colour scale ends: a percentile of |R| over the pixels, never zero."""
    size = np.abs(by_pixel(relevance))
    return float(np.percentile(size, percentile)) or float(size.max()) or 1.0


def heatmap(
    relevance: Tensor | Array,
    ax: Axes,
    *,
    picture: Array | None = None,
    limit: float | None = None,
    title: str = "",
) -> ScalarMappable:
    """Draw relevance as colours.

    Arguments:
        picture: `[H, W, 3]` or `[H, W]` from 0 to 1, whose outlines show through in grey.
        limit: the colour scale goes from `-limit` to `limit`; by default `scale(relevance)`.

    Returns:
        the colour scale, for a colour bar.
    """
    values = by_pixel(relevance)
    limit = limit or scale(values)
    colours = ScalarMappable(Normalize(-limit, limit), matplotlib.colormaps[COLOURS])
    pixels = colours.to_rgba(values)[..., :3]
    outlined = picture is not None and picture.shape[:2] == values.shape
    few = min(values.shape) < FEW_PIXELS
    if picture is not None and outlined and not few:
        pixels = pixels * (1 - OUTLINE * _outlines(picture))[..., None]
    _show(pixels, ax, title)
    if picture is not None and outlined and few and min(values.shape) > 1:
        grey = _grey(picture)
        middle = (float(grey.min()) + float(grey.max())) / 2
        if grey.min() < middle < grey.max():
            ax.contour(grey, levels=[middle], colors=_GREY, linewidths=0.8)
    return colours


def photo(picture: Array, ax: Axes, *, title: str = "") -> None:
    """Draw a picture `[H, W, 3]` or `[H, W]` from 0 to 1."""
    _show(np.clip(picture, 0, 1), ax, title)


def save(figure: Figure, path: Path) -> None:
    """Write a figure without empty margins."""
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08)


def save_photo(picture: Array, path: Path, smallest: int = 224) -> None:
    """Write a picture as it is, tiny ones enlarged to at least `smallest` pixels a side."""
    times = max(1, -(-smallest // min(picture.shape[:2])))
    enlarged = np.clip(picture, 0, 1).repeat(times, 0).repeat(times, 1)
    image.imsave(path, enlarged, cmap="gray", vmin=0, vmax=1)


def single(
    relevance: Tensor | Array,
    *,
    picture: Array | None = None,
    title: str = "",
    ends: tuple[str, str] = ENDS,
) -> Figure:
    """One heatmap with its colour bar."""
    figure = Figure(figsize=(4.6, 4.3), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    colours = heatmap(relevance, ax, picture=picture)
    ax.set_title(title, fontsize=9)
    bar = figure.colorbar(colours, ax=ax, shrink=0.85, pad=0.02, extend="both")
    bar.set_label(f"relevance of a pixel: red {ends[1]}, blue {ends[0]}", fontsize=8, color=_GREY)
    bar.ax.ticklabel_format(scilimits=(-2, 2))
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
    bar.ax.tick_params(labelsize=7)
    _thin(bar)
    return figure


def overview(
    picture: Array,
    total: Panel,
    columns: Sequence[Sequence[Panel]] = (),
    rows: Sequence[str] = (),
    facts: Sequence[str] = (),
    ends: tuple[str, str] = ENDS,
) -> Figure:
    """A picture, its heatmap and what is known of them; below, a column of heatmaps per flow.

    Arguments:
        total: the heatmap of all relevance.
        columns: for every flow its panels from the top down.
        rows: what stands left of each row of panels.
        facts: lines of text; the first is the headline.
        ends: what blue and red mean.
    """
    width = max(len(columns), 4)
    height = 1 + len(rows)
    figure = Figure(figsize=(_PANEL * width + 0.5, (_PANEL + 0.3) * height + 0.15), dpi=150)
    grid = figure.add_gridspec(
        height,
        width,
        left=0.42 / figure.get_figwidth(),
        right=1 - 0.08 / figure.get_figwidth(),
        bottom=0.08 / figure.get_figheight(),
        top=1 - 0.35 / figure.get_figheight(),
        wspace=0.07,
        hspace=0.2,
    )
    photo(picture, figure.add_subplot(grid[0, 0]), title="input")
    ax = figure.add_subplot(grid[0, 1])
    colours = heatmap(total.relevance, ax, picture=picture, title=total.title)
    _describe(figure, figure.add_subplot(grid[0, 2:4]), facts, colours, ends)
    for column, panels in enumerate(columns):
        for row, panel in enumerate(panels, start=1):
            ax = figure.add_subplot(grid[row, column])
            heatmap(panel.relevance, ax, picture=picture, title=panel.title)
            if column == 0:
                ax.set_ylabel(rows[row - 1], fontsize=9)
    return figure


def _describe(
    figure: Figure,
    ax: Axes,
    facts: Sequence[str],
    colours: ScalarMappable,
    ends: tuple[str, str],
) -> None:
    """Facts, and what the colours mean, in a place of their own."""
    ax.set_axis_off()
    if facts:
        ax.text(0.04, 0.99, facts[0], fontsize=13, weight="bold", va="top")
        ax.text(0.04, 0.83, "\n".join(facts[1:]), fontsize=8, va="top", linespacing=1.5)
    long = max(map(len, ends)) > len(ENDS[0])
    bar = figure.colorbar(
        ScalarMappable(Normalize(-1, 1), colours.get_cmap()),
        cax=ax.inset_axes((0.04, 0.17, 0.9 if long else 0.6, 0.055)),
        orientation="horizontal",
        ticks=[-1, 0, 1],
    )
    names = bar.ax.set_xticklabels([ends[0], "no relevance", ends[1]], fontsize=8)
    names[0].set_horizontalalignment("left")
    names[-1].set_horizontalalignment("right")
    bar.ax.tick_params(length=0)
    _thin(bar)
    note = f"each picture on its own scale: its {SCALE_PERCENTILE:g}th percentile of |R|"
    ax.text(0.04, -0.02, note, fontsize=7, color=_GREY, va="bottom")


def _thin(bar: Any) -> None:
    bar.outline.set_linewidth(0.4)
    bar.outline.set_edgecolor(_GREY)


def _show(pixels: Array, ax: Axes, title: str) -> None:
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_linewidth(0.4)
        side.set_color(_GREY)
    if title:
        ax.set_title(title, fontsize=8, pad=3)


def _outlines(picture: Array) -> Array:
    """How strongly brightness changes at each pixel, from 0 to 1."""
    change = np.hypot(*np.gradient(_grey(picture)))
    outlines: Array = np.clip(change / (np.percentile(change, 98) or 1.0), 0, 1)
    return outlines


def _grey(picture: Array) -> Array:
    grey: Array = np.asarray(picture.mean(-1) if picture.ndim == 3 else picture, np.float64)
    return grey
