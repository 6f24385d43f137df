"""The figure: molecules coloured by relevance, and their strongest walks from both ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nrm.experiments.mutag.molecules import ATOMS, Molecule
from nrm.experiments.mutag.relevance import TOP, Explained
from nrm.graph_networks import NodeWalk
from nrm.search import Order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
Points = dict[int, Array]

_ABREAST = 2
_ENDS: dict[Order, str] = {"largest": "#b2182b", "smallest": "#2166ac"}
_GREY, _BOND = "0.35", "0.78"
_SPREAD = 0.16  # how far walks over the same bond lie apart, in bonds


def draw(explained: Sequence[Explained]) -> Figure:
    """Two panels for each molecule: its atoms, and its largest and smallest walks."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows = math.ceil(len(explained) / _ABREAST)
    figure = Figure(figsize=(13.2, 3.0 * rows + 0.6), dpi=110, layout="constrained")
    panels: Any = figure.subplots(rows, 2 * _ABREAST, squeeze=False)
    for ax in panels.flat:
        ax.set_aspect("equal")
        ax.set_axis_off()
    for number, found in enumerate(explained):
        row, column = divmod(number, _ABREAST)
        left, right = panels[row][2 * column : 2 * column + 2]
        places = _layout(found.molecule)
        limit = float(found.by_atom.abs().max()) or 1.0
        scale = Normalize(-limit, limit)
        _atoms(left, found.molecule, places, found.by_atom.tolist(), scale)
        _atoms(right, found.molecule, places, None, scale)
        left.set_title(
            f"{found.molecule.formula}, class {found.target} (logit {found.logit:.1f})", fontsize=9
        )
        bar = figure.colorbar(
            ScalarMappable(scale, "RdBu_r"),
            ax=[left, right],
            location="bottom",
            shrink=0.35,
            anchor=(0.1, 1.0),
            aspect=26,
            pad=0.01,
        )
        bar.set_label("relevance of the atom", fontsize=7.5)
        bar.ax.tick_params(labelsize=7)
        texts = []
        for by, colour in _ENDS.items():
            walks = found.walks.top(TOP, by)
            _walks(right, walks, places, colour)
            texts.append(f"{walks[0].relevance:.2g}")
        right.set_title(f"strongest walks: {texts[0]} and {texts[1]}", fontsize=9)
    _legend(figure)
    return figure


def _layout(molecule: Molecule) -> Points:
    """Places of atoms, in units of a bond, the long side horizontal."""
    import networkx

    graph = networkx.Graph(molecule.bonds)
    graph.add_nodes_from(range(molecule.size))
    starts = [None, *(networkx.spring_layout(graph, seed=seed) for seed in range(4))]
    tried = [networkx.kamada_kawai_layout(graph, pos=start) for start in starts]
    placed = [np.array([found[atom] for atom in range(molecule.size)]) for found in tried]
    xy = min(placed, key=lambda xy: _crossings(xy, molecule.bonds))
    xy = xy - xy.mean(0)
    _, _, axes = np.linalg.svd(xy, full_matrices=False)
    xy = xy @ axes.T
    bonds = [np.linalg.norm(xy[a] - xy[b]) for a, b in molecule.bonds]
    xy /= np.median(bonds) if bonds else 1.0
    return dict(enumerate(xy))


def _crossings(xy: Array, bonds: Sequence[tuple[int, int]]) -> int:
    """How many pairs of bonds cross."""

    def side(a: int, b: int, c: int) -> bool:
        (ax, ay), (bx, by), (cx, cy) = xy[a], xy[b], xy[c]
        return bool((bx - ax) * (cy - ay) > (by - ay) * (cx - ax))

    return sum(
        side(a, b, c) != side(a, b, d) and side(c, d, a) != side(c, d, b)
        for (a, b), (c, d) in combinations(bonds, 2)
        if len({a, b, c, d}) == 4
    )


def _atoms(
    ax: Axes, molecule: Molecule, places: Points, relevance: list[float] | None, scale: Any
) -> None:
    """The molecule, coloured by relevance where there is any to show."""
    import matplotlib

    colours = matplotlib.colormaps["RdBu_r"]
    for a, b in molecule.bonds:
        x, y = zip(places[a], places[b], strict=True)
        ax.plot(x, y, color=_BOND, linewidth=1.6, zorder=1, solid_capstyle="round")
    for atom, (x, y) in places.items():
        name = ATOMS[molecule.types[atom]]
        if relevance is None:
            if name != "C":
                _free_letter(ax, name, x, y)
            continue
        colour = colours(scale(relevance[atom]))
        ax.scatter([x], [y], s=150, color=[colour], edgecolors="0.5", linewidths=0.6, zorder=2)
        dark = abs(relevance[atom]) > 0.6 * scale.vmax
        _letter(ax, name, x, y, "white" if dark else "0.15", 3)
    xs, ys = zip(*places.values(), strict=True)
    ax.set_xlim(min(xs) - 0.7, max(xs) + 0.7)
    ax.set_ylim(min(ys) - 0.7, max(ys) + 0.7)


def _letter(ax: Axes, name: str, x: float, y: float, colour: str, above: int) -> None:
    ax.text(x, y, name, ha="center", va="center", fontsize=7.5, color=colour, zorder=above)


def _free_letter(ax: Axes, name: str, x: float, y: float) -> None:
    """A letter that bonds and walks leave room for."""
    ax.scatter([x], [y], s=58, color="white", alpha=0.8, linewidths=0, zorder=5)
    _letter(ax, name, x, y, "0.15", 6)


def _walks(ax: Axes, walks: Sequence[NodeWalk], places: Points, colour: str) -> None:
    """Every walk as a curve, with a dot at the input.

    Each has a lane of its own beside the bonds, so that walks over the same bond can be told
    apart; a stay is a knot.
    """
    largest = max(abs(walk.relevance) for walk in walks)
    for number, walk in enumerate(walks):
        lane = _SPREAD * ((number + 0.5) / len(walks) - 0.5) * 2
        curve = _curve([places[node] for node in walk.nodes], lane)
        strength = abs(walk.relevance) / largest if largest else 0.0
        style: dict[str, Any] = {"color": colour, "alpha": 0.3 + 0.5 * strength, "zorder": 4}
        ax.plot(*curve.T, linewidth=0.5 + 0.7 * strength, solid_capstyle="round", **style)
        x, y = curve[0]
        ax.scatter(x, y, s=11, linewidths=0, **style)


def _curve(stops: Sequence[Array], lane: float) -> Array:
    """A smooth line past some places; a place twice in a row becomes a knot."""
    knots: list[Array] = []
    for here, there in zip(stops, [*stops[1:], stops[-1]], strict=True):
        along = there - here
        if not along.any():
            along = here - knots[-1] if knots else np.array([1.0, 0.0])
        across = np.array([-along[1], along[0]]) / (np.linalg.norm(along) or 1.0)
        knots.append(here + lane * across + 0.25 * lane * _unit(along))
        if there is not stops[-1] and np.array_equal(here, there):
            angle = np.linspace(0, 2 * math.pi, 5)[1:-1]
            side = 0.12 + abs(lane)
            knots += [
                here + side * np.array([math.sin(a), 1 - math.cos(a)]) * (1 if lane > 0 else -1)
                for a in angle
            ]
    return _smooth(np.array(knots))


def _smooth(knots: Array, fineness: int = 16) -> Array:
    """A Catmull-Rom spline through all knots."""
    padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    t = np.linspace(0, 1, fineness, endpoint=False)[:, None]
    pieces = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        pieces.append(
            0.5
            * (
                2 * b
                + (c - a) * t
                + (2 * a - 5 * b + 4 * c - d) * t**2
                + (3 * b - a - 3 * c + d) * t**3
            )
        )
    return np.concatenate([*pieces, knots[-1:]])


def _unit(vector: Array) -> Array:
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    dot = {"marker": "o", "markersize": 5}
    lines = [
        Line2D([], [], color=_ENDS["largest"], label=f"the {TOP} largest walks", **dot),  # type: ignore[arg-type]
        Line2D([], [], color=_ENDS["smallest"], label=f"the {TOP} smallest walks", **dot),  # type: ignore[arg-type]
        Line2D([], [], color=_BOND, linewidth=1.6, label="bond"),
    ]
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
        title="a dot is where a walk begins, at the input; a knot is a step from an atom to itself",
        title_fontsize=9,
    )
