"""Pictures of relevance, on matplotlib figures that need no display.

Red is positive relevance, for what is explained, blue negative, against it, and white none. A
colour scale is symmetric about zero and ends at a high percentile of |R| (`SCALE_PERCENTILE`), so
that a few pixels do not decide how all others look.

Pictures and texts are drawn here; columns with flows, joint matrices, relevance over time and
graphs with walks in `nrm.diagrams`, called as `nrm.plot.columns` and so on.

Relevance is `[H, W]`, or `[C, H, W]`, summed over its colours; a picture is `[H, W]`, `[H, W, C]`
or `[C, H, W]`, as tensor, array or Pillow's. Both may have a batch axis of one sample. Texts are
drawn as they are: a `$` in the name of a class begins no formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nrm.coloured import Line, colour, letters_on, limit_of, shown
from nrm.errors import InputError

try:
    import matplotlib
    from matplotlib import image
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"nrm.plot needs {error.name}, which is not installed: pip install 'nrm[cli]'",
        name=error.name,
    ) from error

from nrm.diagrams import columns as columns
from nrm.diagrams import graph as graph
from nrm.diagrams import joint as joint
from nrm.diagrams import over_time as over_time

Array = npt.NDArray[Any]
Image = Tensor | Array | Any
"""A picture as a tensor, an array, or what becomes an array (Pillow's pictures)."""

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
_LONGEST_LINE = 200  # of a text in a picture; a longer one would widen the picture by itself
_NUMBERS = ("1", "L", "RGB", "RGBA", "F", "I", "I;16", "I;16B", "I;16L")  # as arrays
_MOST_ENLARGED = 2**22  # pixels


class Edged(Protocol):
    """Edges between named nodes: a `nrm.Circuit`."""

    @property
    def kept(self) -> float:
        """Which share of the relevance they keep."""

    @property
    def senders(self) -> tuple[str, ...]:
        """Names in the order of computation."""

    @property
    def edges(self) -> list[tuple[str, str]]:
        """Sender and receiver of each, the most relevant first."""

    def score(self, sender: str, receiver: str) -> float:
        """The relevance of one."""

    def __len__(self) -> int:
        """How many edges there are."""


@dataclass(frozen=True)
class Panel:
    """One heatmap of an overview: `[C, H, W]` or `[H, W]`, and what stands above it."""

    title: str
    relevance: Tensor | Array


def by_pixel(relevance: Tensor | Array) -> Array:
    """Relevance as `[H, W]`: `[C, H, W]` is summed over its colours.

    Raises:
        InputError: it has another shape.
    """
    values = np.asarray(_as_array(relevance), dtype=np.float64)
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim not in (2, 3) or not values.size:
        raise InputError(
            f"relevance is [C, H, W] or [H, W], of one sample, not of shape {values.shape}"
        )
    if not np.isfinite(values).all():
        raise InputError("the relevance holds NaN or infinite values")
    return values.sum(0) if values.ndim == 3 else values


def as_picture(picture: Image) -> Array:
    """A picture as `[H, W]` or `[H, W, 3]`, from 0 to 1.

    Integers count from 0 to 255. Of what goes beyond 0 and 1 (a model's normalised input) the
    smallest value becomes 0 and the largest 1. A fourth channel is laid over white.

    Raises:
        InputError: it has another shape, or holds no numbers.
    """
    values = _as_array(picture)
    if values.dtype.kind not in "fiub":
        raise InputError(f"a picture holds numbers, not {values.dtype}")
    shape, first = values.shape, isinstance(picture, Tensor)
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim == 3:
        places = [place for place in ((0, 2) if first else (2, 0)) if values.shape[place] in (3, 4)]
        places += [place for place in (0, 2) if values.shape[place] == 1]
        if places:
            values = np.moveaxis(values, places[0], 2)
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3, 4))):
        raise InputError(
            f"a picture is [H, W, 3], [3, H, W] or [H, W], of one sample, not of shape {shape}"
        )
    if not values.size or not np.isfinite(values).all():
        raise InputError("the picture is empty, or holds NaN or infinite values")
    if values.dtype.kind in "iu":
        values = values / 255.0
    values = values.astype(np.float64)
    low, high = min(0.0, float(values.min())), float(values.max())
    if low < 0 or high > 1:
        low = float(values.min())
        values = (values - low) / (high - low or 1.0)
    if values.ndim == 2 or values.shape[2] == 3:
        return values
    if values.shape[2] == 1:
        return values[..., 0]
    colours: Array = values[..., :3] * values[..., 3:] + 1 - values[..., 3:]
    return colours


def _as_array(given: Any) -> Array:
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        values: Array = (given.double() if given.is_floating_point() else given).numpy()
        return values
    mode = getattr(given, "mode", None)
    if isinstance(mode, str) and mode not in _NUMBERS:  # a picture of Pillow's: a palette, CMYK
        given = given.convert("RGBA" if mode in ("P", "PA", "LA") else "RGB")
    return np.asarray(given)


def scale(relevance: Tensor | Array, percentile: float = SCALE_PERCENTILE) -> float:
    """Where the colour scale ends: a percentile of |R| over the pixels, never zero."""
    size = np.abs(by_pixel(relevance))
    return float(np.percentile(size, percentile)) or float(size.max()) or 1.0


def heatmap(
    relevance: Tensor | Array,
    ax: Axes,
    *,
    picture: Image | None = None,
    limit: float | None = None,
    title: str = "",
) -> ScalarMappable:
    """Draw relevance as colours.

    Arguments:
        picture: what the relevance is of, of as many pixels; its outlines show through in grey.
        limit: the colour scale goes from `-limit` to `limit`; by default `scale(relevance)`.

    Returns:
        the colour scale, for a colour bar.

    Raises:
        InputError: a shape that is none of a picture, or a picture of another size.
    """
    values = by_pixel(relevance)
    grey = None if picture is None else _grey(as_picture(picture))
    if grey is not None and grey.shape != values.shape:
        raise InputError(
            f"the picture has {grey.shape[0]} x {grey.shape[1]} pixels, the relevance "
            f"{values.shape[0]} x {values.shape[1]}: give the picture as the model sees it."
        )
    limit = limit or scale(values)
    colours = ScalarMappable(Normalize(-limit, limit), matplotlib.colormaps[COLOURS])
    pixels = colours.to_rgba(values)[..., :3]
    few = min(values.shape) < FEW_PIXELS
    if grey is not None and not few:
        pixels = pixels * (1 - OUTLINE * _outlines(grey))[..., None]
    _show(pixels, ax, title)
    if grey is not None and few and min(values.shape) > 1:
        middle = (float(grey.min()) + float(grey.max())) / 2
        if grey.min() < middle < grey.max():
            ax.contour(grey, levels=[middle], colors=_GREY, linewidths=0.8)
    return colours


def photo(picture: Image, ax: Axes, *, title: str = "") -> None:
    """Draw a picture."""
    _show(as_picture(picture), ax, title)


def save(figure: Figure, path: Path) -> None:
    """Write a figure without empty margins."""
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08)


def save_photo(picture: Image, path: Path, smallest: int = 224) -> None:
    """Write a picture as it is, tiny ones enlarged to at least `smallest` pixels a side.

    One that is tiny in one direction alone is enlarged no further than memory is sensible.
    """
    values = as_picture(picture)
    high, wide = values.shape[:2]
    times = min(-(-smallest // min(high, wide)), math.isqrt(_MOST_ENLARGED // (high * wide)))
    enlarged = values.repeat(max(1, times), 0).repeat(max(1, times), 1)
    image.imsave(path, enlarged, cmap="gray", vmin=0, vmax=1)


def single(
    relevance: Tensor | Array,
    *,
    picture: Image | None = None,
    title: str = "",
    ends: tuple[str, str] = ENDS,
) -> Figure:
    """One heatmap with its colour bar."""
    figure = Figure(figsize=(4.6, 4.3), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    colours = heatmap(relevance, ax, picture=picture)
    ax.set_title(plain(title), fontsize=9, parse_math=False)
    bar = figure.colorbar(colours, ax=ax, shrink=0.85, pad=0.02, extend="both")
    label = plain(f"relevance of a pixel: red {ends[1]}, blue {ends[0]}")
    bar.set_label(label, fontsize=8, color=_GREY, parse_math=False)
    bar.ax.ticklabel_format(scilimits=(-2, 2))
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
    bar.ax.tick_params(labelsize=7)
    _thin(bar)
    return figure


def overview(
    picture: Image,
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
                ax.set_ylabel(plain(rows[row - 1]), fontsize=9, parse_math=False)
    return figure


def text(lines: Sequence[Line], *, title: str = "", columns: int = 76) -> Figure:
    """Words coloured by their relevance (`nrm.coloured`): `Generation.lines()`, or lines of yours.

    Orange is positive, blue negative.

    Arguments:
        columns: letters in a row, after which a line goes on below.
    """
    limit = limit_of(lines)
    before = max((len(plain(line.title)) for line in lines), default=0)
    before = before + 2 if before else 0
    placed: list[tuple[float, int, str, float | None, bool]] = []
    row = 0
    for line in lines:
        placed.append((0, row, plain(line.title), None, False))
        at = 0
        for place, (word, value) in enumerate(zip(line.words, line.values, strict=True)):
            for begin in range(0, len(shown(word)), columns):
                part = shown(word)[begin : begin + columns]
                if at + len(part) > columns:
                    at, row = 0, row + 1
                placed.append((before + at, row, part, value, place == line.mark))
                at += len(part)
        row += 1
    wide, high = 0.0775 * (before + columns) + 0.2, 0.23 * max(row, 1) + (0.75 if title else 0.5)
    figure = Figure(figsize=(wide, high), dpi=150)
    ax = figure.add_axes((0.1 / wide, 0.4 / high, 1 - 0.2 / wide, 0.23 * max(row, 1) / high))
    ax.set_xlim(0, before + columns)
    ax.set_ylim(max(row, 1), 0)
    ax.set_axis_off()
    for x, y, part, size, marked in placed:
        background = (255, 255, 255) if size is None else colour(size, limit)
        frame = {"edgecolor": "black", "linewidth": 1.0} if marked else {"linewidth": 0.0}
        fill = tuple(channel / 255 for channel in background)
        box = Rectangle((x, y + 0.06), len(part), 0.88, facecolor=fill, zorder=2 + marked, **frame)
        ax.add_patch(box)
        letters = tuple(channel / 255 for channel in letters_on(background))
        drawn = ax.text(x, y + 0.5, part, zorder=4, parse_math=False, color=letters)
        drawn.set(family="monospace", fontsize=9, va="center_baseline")
    if title:
        head = figure.text(0.1 / wide, 1 - 0.2 / high, plain(title), parse_math=False)
        head.set(fontsize=9, weight="bold", va="center")
    ends = figure.add_axes((0.35 / wide, 0.22 / high, min(0.5, 2.2 / wide), 0.1 / high))
    shades = np.linspace(-1, 1, 101)
    bar = [[colour(part, 1.0) for part in shades]]
    ends.imshow(bar, aspect="auto", extent=(-limit, limit, 0, 1))
    ends.set_yticks([])
    ends.set_xticks([-limit, 0, limit], [f"{-limit:+.2g}", "0", f"{limit:+.2g}"])
    ends.tick_params(labelsize=7, length=2)
    return figure


def circuit(
    found: Edged,
    ax: Axes,
    *,
    most: int = 40,
    title: str | None = None,
) -> None:
    """Draw the edges of a circuit, from the leaves below to the output above.

    Red edges are positive, blue negative; the wider, the more relevant. Components of one layer lie
    side by side.

    Arguments:
        most: edges to draw, the most relevant ones.
        title: by default how many edges keep how much.
    """
    edges = found.edges[:most]
    if not edges:
        raise InputError("the circuit has no edges to draw")
    places = _levels(found, edges)
    largest = max(abs(found.score(*edge)) for edge in edges)
    colours = matplotlib.colormaps[COLOURS]
    for sender, receiver in reversed(edges):  # the most relevant on top
        size = found.score(sender, receiver) / largest
        low, high = places[sender], places[receiver]
        # Edges that skip layers pass beside what lies between.
        bend = 0.0 if high[1] - low[1] <= 1 else 0.12 * (1 if low[0] <= high[0] else -1)
        ax.annotate(
            "",
            xy=high,
            xytext=low,
            zorder=1 + abs(size),
            arrowprops={
                "arrowstyle": "-",
                "connectionstyle": f"arc3,rad={bend}",
                "color": colours(0.5 + 0.5 * max(abs(size), 0.3) * (1 if size > 0 else -1)),
                "linewidth": 0.6 + 4.4 * abs(size),
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    for name, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": _GREY}
        ax.text(x, y, plain(name), ha="center", va="center", fontsize=8, zorder=3, bbox=box)
    rows = [y for _, y in places.values()]
    columns = [x for x, _ in places.values()]
    ax.set_xlim(min(columns) - 0.8, max(columns) + 0.8)
    ax.set_ylim(min(rows) - 0.7, max(rows) + 0.7)
    ax.set_axis_off()
    if title is None:
        shown = "" if len(edges) == len(found) else f"{len(edges)} of "
        title = f"{shown}{len(found)} edges, which keep {found.kept:.2f} of the relevance"
    ax.set_title(plain(title), fontsize=9)


def _levels(found: Edged, edges: Sequence[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Where nodes are drawn: above all that hands them relevance, side by side in their order."""
    drawn = dict.fromkeys(name for edge in edges for name in edge)
    order = [*found.senders, "output"]
    level = dict.fromkeys(order, 0)
    most = len(dict.fromkeys(name for edge in found.edges for name in edge))
    for _ in range(most):  # the longest way from below, by edges that are not drawn too
        for sender, receiver in found.edges:
            level[receiver] = min(max(level[receiver], level[sender] + 1), most)
    level["output"] = max(level.values())
    order = [name for name in order if name in drawn]
    rows: dict[int, list[str]] = {}
    for name in order:
        rows.setdefault(level[name], []).append(name)
    numbers = {row: place for place, row in enumerate(sorted(rows))}
    return {
        name: (1.3 * (place - (len(names) - 1) / 2), float(numbers[row]))
        for row, names in rows.items()
        for place, name in enumerate(names)
    }


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
        head, others = plain(facts[0]), plain("\n".join(facts[1:]))
        ax.text(0.04, 0.99, head, fontsize=13, weight="bold", va="top", parse_math=False)
        ax.text(0.04, 0.83, others, fontsize=8, va="top", linespacing=1.5, parse_math=False)
    long = max(map(len, ends)) > len(ENDS[0])
    bar = figure.colorbar(
        ScalarMappable(Normalize(-1, 1), colours.get_cmap()),
        cax=ax.inset_axes((0.04, 0.17, 0.9 if long else 0.6, 0.055)),
        orientation="horizontal",
        ticks=[-1, 0, 1],
    )
    meanings = [plain(ends[0]), "no relevance", plain(ends[1])]
    names = bar.ax.set_xticklabels(meanings, fontsize=8, parse_math=False)
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
        ax.set_title(plain(title), fontsize=8, pad=3, parse_math=False)


def plain(text: str) -> str:
    """A text to draw: without what cannot be seen, and with lines that end."""
    lines = [
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        for line in text.split("\n")
    ]
    return "\n".join(
        line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…" for line in lines
    )


def _outlines(grey: Array) -> Array:
    """How strongly brightness changes at each pixel, from 0 to 1."""
    change = np.hypot(*np.gradient(grey))
    outlines: Array = np.clip(change / (np.percentile(change, 98) or 1.0), 0, 1)
    return outlines


def _grey(picture: Array) -> Array:
    grey: Array = picture.mean(-1) if picture.ndim == 3 else picture
    return grey
