"""Diagrams of relevance: columns and flows, pairs of channels, places over time, graphs with walks.

They are called by way of `nrm.plot`, whose colours they have: red for what is explained, blue
against it. Each draws on matplotlib axes that it is given, and needs no display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from torch import Tensor

from nrm.errors import InputError, printable

Array = npt.NDArray[np.float64]
Values = Tensor | npt.NDArray[Any] | Sequence[float]

COLOURS = "RdBu_r"
RED, BLUE = "#b2182b", "#2166ac"
_GREY = "0.35"
_ROUNDS = 300


class Channelled(Protocol):
    """What columns are drawn of: a `nrm.Measure`."""

    def channels(self, layer: str, *sets: Any, given: Any = None) -> Tensor:
        """The relevance of every channel of a layer: `[batch, channels]`."""

    def joint(self, a: str, b: str, *more: Any, given: Any = None) -> Tensor:
        """That of all pairs of channels: `[batch, channels, channels]`."""


def columns(
    R: Channelled,
    layers: Sequence[str],
    ax: Axes,
    *sets: Any,
    given: Any = None,
    top: int = 8,
    sample: int = 0,
) -> None:
    """Draw columns of the most relevant channels, and the flows between adjacent ones.

    A bar is the relevance of a channel, all on one scale, the pale one that of all others; a flow
    is as wide as the joint relevance of two channels, its scale that of the largest at one end.

    Arguments:
        layers: from the inputs to the output.
        sets, given: as for `R.joint`: they lie above all of the layers.
        top: channels of a layer.
        sample: of the batch.

    Example:
        >>> plot.columns(R, ["features.3", "features.5"], ax, nrm.channels("features.8", 12))
    """
    if not layers or top < 1:
        raise InputError("columns are of at least one layer, and have at least one channel")
    values = [_row(R.channels(layer, *sets, given=given), sample) for layer in layers]
    shown = [np.argsort(-np.abs(row), kind="stable")[:top] for row in values]
    rest = [float(row.sum() - row[chosen].sum()) for row, chosen in zip(values, shown, strict=True)]
    bars = [float(x) for row, chosen in zip(values, shown, strict=True) for x in row[chosen]] + rest
    up, down = max(0.0, *bars), max(0.0, *(-x for x in bars))
    unit = 0.42 / (up + down or 1.0)
    zero = down * unit
    for place, (lower, upper) in enumerate(pairwise(layers)):
        pairs = np.asarray(R.joint(lower, upper, *sets, given=given)[sample].detach().cpu())
        between = pairs[np.ix_(shown[place], shown[place + 1])].astype(np.float64)
        _ribbons(ax, between, place + 0.46, place + 0.87)
    for place, (layer, row, chosen) in enumerate(zip(layers, values, shown, strict=True)):
        for level, channel in enumerate(chosen):
            _bar(ax, place + zero, level, row[channel] * unit, 1.0)
            ax.text(place - 0.03, level, str(channel), ha="right", va="center", fontsize=7)
        others = len(row) - len(chosen)
        if others:
            _bar(ax, place + zero, len(chosen), rest[place] * unit, 0.35)
            ax.text(place - 0.03, len(chosen), f"+{others}", ha="right", va="center",
                    fontsize=6, color=_GREY)  # fmt: skip
        head = f"{printable(layer)}\ntotal {row.sum():.3f}"
        ax.text(place, -0.9, head, fontsize=7, va="bottom", parse_math=False)
    ax.set_xlim(-0.25, len(layers) - 0.4)
    ax.set_ylim(max(map(len, shown)) + 0.8, -2.2)
    ax.set_axis_off()


def joint(
    table: Values, ax: Axes, *, names: tuple[str, str] = ("", ""), limit: float | None = None
) -> ScalarMappable:
    """Draw the joint relevance of all pairs as a matrix.

    Arguments:
        table: `[a, b]`, or `[1, a, b]` as `R.joint` gives it.
        names: of the rows and the columns.
        limit: the colours go from `-limit` to `limit`; by default the largest size.

    Returns:
        the colour scale, for a colour bar.
    """
    values = _array(table)
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if values.ndim != 2:
        raise InputError(f"joint relevance is [a, b], of one sample, not {values.shape}")
    size = limit or float(np.abs(values).max()) or 1.0
    scale = Normalize(-size, size)
    colours = ScalarMappable(scale, matplotlib.colormaps[COLOURS])
    ax.imshow(values, cmap=colours.get_cmap(), norm=scale, interpolation="nearest", aspect="auto")
    ax.set_ylabel(printable(names[0]), fontsize=8, parse_math=False)
    ax.set_xlabel(printable(names[1]), fontsize=8, parse_math=False)
    ax.tick_params(labelsize=7)
    return colours


def over_time(
    relevance: Values | Mapping[str, Values], ax: Axes, *, mark: int | None = None
) -> None:
    """Draw the relevance of every step of a series: bars, or a line for each of several.

    Arguments:
        relevance: `[steps]`, or `[1, steps]`; or several by name.
        mark: a step to mark, such as the one that decides.
    """
    if mark is not None:
        ax.axvline(mark, color="0.85", linewidth=6, zorder=0)
    ax.axhline(0, color=_GREY, linewidth=0.6)
    if isinstance(relevance, Mapping):
        for name, given in relevance.items():
            values = _line(given)
            ax.plot(range(len(values)), values, marker=".", linewidth=1, label=printable(name))
        ax.legend(fontsize=7, frameon=False)
    else:
        values = _line(relevance)
        colours = [RED if value > 0 else BLUE for value in values]
        ax.bar(range(len(values)), values, color=colours, width=0.8)
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel("relevance", fontsize=8)
    ax.tick_params(labelsize=7)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def graph(
    relevance: Values,
    edges: Sequence[tuple[int, int]],
    ax: Axes,
    *,
    marks: Sequence[str] = (),
    walks: Sequence[tuple[Sequence[int], float]] = (),
) -> Array:
    """Draw the nodes of a graph in the colour of their relevance, and walks over them.

    Arguments:
        relevance: `[nodes]`.
        edges: pairs of nodes.
        marks: what stands in the nodes; by default their numbers.
        walks: nodes from layer to layer, and the relevance of each walk: a curve as wide as that
            is large. One that stays at a node is drawn as a ring.

    Returns:
        `[nodes, 2]`: where they are drawn.

    Example:
        >>> best = [(walk.nodes, walk.relevance) for walk in node_walks(R, layers).top(5)]
        >>> plot.graph(R.marginal("x").sum(-1), edges, ax, walks=best)
    """
    values = _line(relevance)
    places = laid_out(len(values), edges)
    colours = matplotlib.colormaps[COLOURS]
    limit = float(np.abs(values).max()) or 1.0
    for a, b in edges:
        ax.plot(*places[[a, b]].T, color="0.78", linewidth=1.2, zorder=1)
    largest = max((abs(float(size)) for _, size in walks), default=1.0) or 1.0
    for order, (nodes, size) in enumerate(walks):
        width = 0.6 + 3.4 * abs(float(size)) / largest
        colour = RED if size > 0 else BLUE
        drift = 0.035 * (order - (len(walks) - 1) / 2)  # those over one bond lie side by side
        points = places[list(nodes)] + drift
        ax.plot(*points.T, color=colour, linewidth=width, alpha=0.6, zorder=2,
                solid_capstyle="round", solid_joinstyle="round")  # fmt: skip
        if len(set(nodes)) == 1:
            ax.plot(*places[nodes[0]], "o", markersize=17 + width, color=colour, alpha=0.6,
                    fillstyle="none", markeredgewidth=width, zorder=2)  # fmt: skip
    for node, (x, y) in enumerate(places):
        shade = colours(0.5 + 0.5 * values[node] / limit)
        ax.plot(x, y, "o", markersize=14, color=shade, markeredgecolor="black",
                markeredgewidth=0.6, zorder=3)  # fmt: skip
        dark = sum(shade[:3]) < 1.3
        text = printable(marks[node]) if len(marks) else str(node)
        ax.text(x, y, text, ha="center", va="center", fontsize=6.5, zorder=4, parse_math=False,
                color="white" if dark else "black")  # fmt: skip
    ax.set_aspect("equal")
    ax.margins(0.1)
    ax.set_axis_off()
    return places


def laid_out(count: int, edges: Sequence[tuple[int, int]]) -> Array:
    """`[nodes, 2]`: places whose distances are those in the graph, as well as can be.

    Stress majorisation from a spiral, so that a graph looks the same every time.

    Raises:
        InputError: an edge ends at no node.
    """
    if any(not 0 <= node < count for edge in edges for node in edge):
        raise InputError(f"edges are between nodes 0 to {count - 1}")
    far = np.full((count, count), np.inf)
    np.fill_diagonal(far, 0)
    for a, b in edges:
        far[a, b] = far[b, a] = min(far[a, b], 1.0)
    for middle in range(count):
        far = np.minimum(far, far[:, middle : middle + 1] + far[middle : middle + 1])
    reached = far[np.isfinite(far)]
    far[~np.isfinite(far)] = 1 + (reached.max() if reached.size else 0)
    np.fill_diagonal(far, 1)
    weight = far**-2.0
    np.fill_diagonal(weight, 0)
    turn = 2.4 * np.arange(count)
    found: Array = (
        np.stack([np.cos(turn), np.sin(turn)], 1) * (1 + turn / (2.4 * max(count, 1)))[:, None]
    )
    for _ in range(_ROUNDS if count > 1 else 0):
        apart = found[:, None] - found[None]
        size = np.maximum(np.linalg.norm(apart, axis=-1), 1e-9)
        pulled = found[None] + (far / size)[..., None] * apart
        found = (weight[..., None] * pulled).sum(1) / weight.sum(1, keepdims=True)
    return found


def _bar(ax: Axes, place: float, level: int, length: float, alpha: float) -> None:
    ax.barh(level, length, left=place, height=0.68, color=RED if length > 0 else BLUE, alpha=alpha)


def _ribbons(ax: Axes, between: Array, left: float, right: float) -> None:
    """Flows `[lower, upper]` side by side at both ends, each as wide as it is large."""
    size = np.abs(between)
    most = max(float(size.sum(0).max(initial=0)), float(size.sum(1).max(initial=0)), 1e-30)
    size = size * 0.8 / most
    # The lower edges of each flow at both its ends.
    below = np.cumsum(size, 1) - size - size.sum(1, keepdims=True) / 2
    above = np.cumsum(size, 0) - size - size.sum(0, keepdims=True) / 2
    middle = (left + right) / 2
    for i, j in zip(*np.nonzero(between), strict=True):
        y, v, wide = i + below[i, j], j + above[i, j], size[i, j]
        points = [(left, y), (middle, y), (middle, v), (right, v), (right, v + wide),
                  (middle, v + wide), (middle, y + wide), (left, y + wide), (left, y)]  # fmt: skip
        codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
        colour = RED if between[i, j] > 0 else BLUE
        ax.add_patch(PathPatch(Path(points, codes), facecolor=colour, alpha=0.4, linewidth=0))


def _row(values: Tensor, sample: int) -> Array:
    return _array(values[sample])


def _line(values: Values) -> Array:
    found = _array(values)
    found = found[0] if found.ndim == 2 and len(found) == 1 else found
    if found.ndim != 1 or not found.size:
        raise InputError(f"relevance is one number for each place, not of shape {found.shape}")
    return found


def _array(values: Values) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise InputError("the relevance holds NaN or infinite values")
    return found
