"""Many pictures with their relevance side by side, and cut to where it lies.

Reference samples of a channel, the pairs of channels that matter for a class, the typical samples
of a cluster. Colours, pictures and relevance are those of `nrm.plot`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nrm import plot  # says what to install where matplotlib is missing, which comes after it
from nrm.errors import InputError
from nrm.plot import Image

import matplotlib  # isort: skip
from matplotlib.axes import Axes  # isort: skip
from matplotlib.figure import Figure  # isort: skip
from matplotlib.patches import Rectangle  # isort: skip

Window = tuple[slice, slice]
"""Rows and columns of a picture."""

SHARE = 0.5
"""Which share of |R| a cut holds, by default."""
LEAST = 8
"""A cut is no smaller than the shorter side of the picture divided by this."""

_TILE = 1.35  # inches
_LABEL = 0.3
_TITLE = 0.13  # a line above a tile
_HEAD = 0.22
_LINE = 0.15
_MARGIN = 0.08
_GAP = 0.05  # between the last row and the notes


@dataclass(frozen=True)
class Tile:
    """A picture, or relevance.

    Attributes:
        picture: `[H, W]`, `[C, H, W]`, ... (`nrm.plot`); with relevance, what lies under it.
        relevance: `[H, W]` or `[C, H, W]`; `None` to draw the picture.
        title: what stands above it.
        limit: where the colour scale ends; by default as `nrm.plot.scale` says.
        frame: a part of the picture to draw a line around.
    """

    picture: Image | None
    relevance: Tensor | plot.Array | None = None
    title: str = ""
    limit: float | None = None
    frame: Window | None = None


@dataclass(frozen=True)
class Row:
    """Tiles side by side; `None` leaves a place empty."""

    label: str
    tiles: Sequence[Tile | None]


def where(relevance: Tensor | plot.Array, share: float = SHARE) -> Window:
    """The smallest square that holds a share of the relevance's size |R|.

    Of those the one that holds most. It is no smaller than an eighth of the shorter side, and in a
    picture that is longer than wide it may become as wide as the picture, and longer. Without any
    relevance it is the whole picture.

    Arguments:
        relevance: `[H, W]` or `[C, H, W]`, which is summed over its colours.
        share: above 0, up to 1.

    Raises:
        InputError: the share is none, or the shape is none of a picture.
    """
    if not 0 < share <= 1:
        raise InputError(f"a share of the relevance is above 0 and up to 1, not {share!r}")
    size = np.abs(plot.by_pixel(relevance))
    high, wide = size.shape
    total = float(size.sum())
    if not total:
        return slice(0, high), slice(0, wide)
    sums = np.pad(size.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def held(side: int) -> npt.NDArray[np.float64]:
        """What the square holds, at every place of its corner."""
        down, across = min(side, high), min(side, wide)
        upper, lower = sums[: high + 1 - down], sums[down:]
        found: npt.NDArray[np.float64] = (
            lower[:, across:] - lower[:, : wide + 1 - across]
            - upper[:, across:] + upper[:, : wide + 1 - across]
        )  # fmt: skip
        return found

    least = max(1, min(high, wide) // LEAST)
    sides = range(least, max(high, wide) + 1)
    enough = share * total * (1 - 1e-9)  # sums are rounded
    side = sides[bisect_left(sides, True, key=lambda n: bool(held(n).max() >= enough))]
    places = held(side)
    top, left = np.unravel_index(int(places.argmax()), places.shape)
    return slice(int(top), int(top) + min(side, high)), slice(
        int(left), int(left) + min(side, wide)
    )


def references(
    titles: Sequence[str],
    pictures: Sequence[Image],
    heatmaps: Sequence[Tensor | plot.Array],
    share: float | None = SHARE,
) -> list[Row]:
    """Samples as rows: pictures and relevance, and both cut to where the relevance lies.

    Arguments:
        titles: of each sample.
        share: of |R| in the cut; `None`: nothing is cut.
    """
    seen = [plot.as_picture(picture) for picture in pictures]
    values = [plot.by_pixel(relevance) for relevance in heatmaps]
    windows = [None if share is None else where(one, share) for one in values]
    limits = [plot.scale(one) for one in values]
    each = list(zip(titles, seen, values, limits, windows, strict=True))
    rows = [
        Row("sample", [Tile(p, title=title, frame=w) for title, p, _, _, w in each]),
        Row("relevance", [Tile(p, v, limit=end, frame=w) for _, p, v, end, w in each]),
    ]
    if share is not None:
        cuts = [(p[w], v[w], end) for _, p, v, end, w in each if w is not None]
        rows += [
            Row("cut", [Tile(p) for p, _, _ in cuts]),
            Row("its relevance", [Tile(p, v, limit=end) for p, v, end in cuts]),
        ]
    return rows


def grid(rows: Sequence[Row], title: str = "", notes: Sequence[str] = ()) -> Figure:
    """Rows of tiles below each other.

    Arguments:
        title: a line above.
        notes: lines below.

    Raises:
        InputError: there is nothing to draw.
    """
    wide, high = size_of(rows, title, notes)
    figure = Figure(figsize=(wide, high), dpi=150)
    draw(rows, figure, wide, high, title, notes)
    return figure


def size_of(rows: Sequence[Row], title: str = "", notes: Sequence[str] = ()) -> tuple[float, float]:
    """How wide and high a grid is, in inches."""
    columns = max((len(row.tiles) for row in rows), default=0)
    if not columns:
        raise InputError("there are no samples to draw")
    high = _HEAD * bool(title) + _LINE * len(notes) + 2 * _MARGIN + _GAP
    return _LABEL + columns * _TILE + _MARGIN, high + sum(_height(row) for row in rows)


def draw(
    rows: Sequence[Row],
    place: Any,
    wide: float,
    high: float,
    title: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Rows of tiles on a figure, or a part of one, of some size in inches."""
    down = _MARGIN
    if title:
        head = place.text(_MARGIN / wide, 1 - down / high, plot.plain(title), parse_math=False)
        head.set(fontsize=9, weight="bold", va="top")
        down += _HEAD
    for row in rows:
        above = _above(row)
        for column, tile in enumerate(row.tiles):
            corner = (_LABEL + column * _TILE) / wide, 1 - (down + above + _TILE) / high
            if tile is not None:
                side = 0.95 * _TILE
                _draw(tile, place.add_axes((*corner, side / wide, side / high)))
        middle = 1 - (down + above + _TILE / 2) / high
        label = place.text(0.12 / wide, middle, plot.plain(row.label), parse_math=False)
        label.set(fontsize=7, rotation=90, va="center", ha="center")
        down += _height(row)
    down += _GAP
    for line in notes:
        note = place.text(_MARGIN / wide, 1 - down / high, plot.plain(line), parse_math=False)
        note.set(fontsize=6.5, va="top", color="0.35")
        down += _LINE


def _above(row: Row) -> float:
    lines = max(
        (tile.title.count("\n") + 1 for tile in row.tiles if tile and tile.title), default=0
    )
    return _TITLE * lines / 2


def _height(row: Row) -> float:
    return _TILE + _above(row)


def _draw(tile: Tile, ax: Axes) -> None:
    if tile.relevance is None:
        assert tile.picture is not None
        plot.photo(tile.picture, ax)
    else:
        plot.heatmap(tile.relevance, ax, picture=tile.picture, limit=tile.limit)
    if tile.title:
        ax.set_title(plot.plain(tile.title), fontsize=6.5, pad=2, parse_math=False)
    if tile.frame is not None:
        rows, columns = tile.frame
        corner = columns.start - 0.5, rows.start - 0.5
        size = columns.stop - columns.start, rows.stop - rows.start
        for width, colour in ((1.8, "white"), (0.8, "black")):
            ax.add_patch(Rectangle(corner, *size, fill=False, linewidth=width, edgecolor=colour))


def clustered(
    rows: Sequence[Row],
    places: npt.NDArray[np.float64],
    clusters: npt.NDArray[np.int64],
    eigenvalues: npt.NDArray[np.float64],
    title: str = "",
    notes: Sequence[str] = (),
) -> Figure:
    """A map of samples in the colours of their clusters, and typical ones below.

    Arguments:
        rows: the typical samples.
        places: `[n, 2]`.
        clusters: `[n]`, of each sample; below zero for those in none, which are grey.
        eigenvalues: of the graph's Laplacian, drawn beside the map where there are some.
    """
    wide, low = size_of(rows, "", notes)
    wide = max(wide, 6.5)
    above = 3.0
    figure = Figure(figsize=(wide, above + low), dpi=150)
    head = figure.text(_MARGIN / wide, 1 - _MARGIN / (above + low), plot.plain(title))
    head.set(fontsize=9, weight="bold", va="top", parse_math=False)
    parts: Any = figure.subfigures(2, 1, height_ratios=(above, low), hspace=0)
    upper, lower = parts
    _scatter(upper, places, clusters, alone=not len(eigenvalues))
    if len(eigenvalues):
        _spectrum(upper, eigenvalues, len({number for number in clusters.tolist() if number >= 0}))
    draw(rows, lower, wide, low, "", notes)
    return figure


def _scatter(
    upper: Any,
    places: npt.NDArray[np.float64],
    clusters: npt.NDArray[np.int64],
    alone: bool,
) -> None:
    ax = upper.add_axes((0.03, 0.05, 0.94 if alone else 0.6, 0.82))
    colours = matplotlib.colormaps["tab10"]
    for number in sorted(set(clusters.tolist())):
        x, y = places[clusters == number].T
        label = "in none" if number < 0 else f"cluster {number}"
        colour = "0.75" if number < 0 else colours(number % 10)
        ax.scatter(x, y, s=7, color=colour, label=f"{label}: {len(x)}", linewidth=0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.legend(fontsize=6.5, loc="best")


def _spectrum(upper: Any, eigenvalues: npt.NDArray[np.float64], chosen: int) -> None:
    """Eigenvalues, those of the clusters full: the gap behind them says how many there are."""
    ax = upper.add_axes((0.72, 0.2, 0.26, 0.6))
    numbers = np.arange(1, len(eigenvalues) + 1)
    inside = numbers <= chosen
    ax.plot(numbers[inside], eigenvalues[inside], "o", color="black", markersize=3.5)
    ax.plot(numbers[~inside], eigenvalues[~inside], "o", color="black", markersize=3.5,
            markerfacecolor="white")  # fmt: skip
    ax.set_title("eigenvalues of the graph", fontsize=7)
    ax.tick_params(labelsize=6.5)
    ax.set_ylim(bottom=-0.02 * float(eigenvalues.max() or 1.0))
