"""`mutag`: subgraphs and walks in molecules, by a graph network (GNN-LRP as queries).

A pretrained GIN of three blocks says whether a molecule is mutagenic. For every molecule: the
relevance of single atoms and of rings, the most relevant walks of atoms, and how well the laws
hold; and, one by one, the same walks as the GNN-LRP scripts find them.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import combinations
from operator import or_
from pathlib import Path
from typing import Any, Literal

import matplotlib
import networkx
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.interpolate import CubicHermiteSpline
from torch import Tensor

from nrm import Explainer, Measure
from nrm.composites import Composite, path
from nrm.display import counted
from nrm.errors import InputError
from nrm.evaluation.store import Store, digest
from nrm.graph_networks import node_layers, node_walks, nodes, subgraph
from nrm.rules import PlainGamma
from nrm.tensors import one_thread
from nrm_reproduce.data import ATOMS, Molecule, load_molecules
from nrm_reproduce.networks import GIN, load_gin
from nrm_reproduce.report import STYLE, Experiment, Picture, Report, Request, Table, versions

Array = npt.NDArray[np.float64]
Points = dict[int, Array]

NAME = "mutag"
TABLE = "subgraphs.csv"
GAMMA = 3.0
DRAWN = (0, 1, 137, 139)
"""The molecules whose walks are drawn."""
TOP = 20
"""Walks from either end."""
LAWS = {
    "total": "atoms and biases add up to one",
    "walks": "walks of atoms add up to the atoms",
    "parts": "walks that stay in a ring, end at its biases or leave it add up to one",
    "subgraphs": "a subgraph's query equals its walks",
}

_TOLERANCE = 1e-4  # the logits are stored in single precision
_ABREAST = 2
_ENDS = {"largest": "#b2182b", "smallest": "#2166ac"}
_BOND = "0.78"
_SPREAD = 0.16  # how far walks over the same bond lie apart, in bonds


# -- the network's rules, and what it sees --------------------------------------------------------


def gammas(blocks: int) -> list[float]:
    """The authors' schedule: falling in equal steps from 3 in the first block to 0 in the last."""
    return torch.linspace(GAMMA, 0, blocks).tolist() if blocks > 1 else [0.0]


def composite(blocks: int) -> Composite:
    """LRP-gamma as in GNN-LRP, with biases in the denominators."""
    by_block = [
        (path(f"blocks.{block}*"), PlainGamma(gamma)) for block, gamma in enumerate(gammas(blocks))
    ]
    return Composite([*by_block], PlainGamma(0.0), name="GNN-LRP", bias="input")


def make_explainer(model: GIN) -> Explainer:
    """The network under the rules of GNN-LRP."""
    return Explainer(model, composite(len(model.blocks)), batch_axis=None)


@dataclass(frozen=True)
class Parts:
    """All walks, by whether they stay in a subgraph: together they have relevance one.

    Attributes:
        inside: they reach the input without having left it.
        ended: they end at a bias before they leave it.
        leaving: they visit another node.
    """

    inside: float
    ended: float
    leaving: float

    @property
    def total(self) -> float:
        return self.inside + self.ended + self.leaving


def parts(R: Measure, layers: Sequence[str], chosen: Sequence[int]) -> Parts:
    """The walks that stay, end or leave; each by a query of its own."""
    sets = subgraph(layers, chosen)
    others = sorted(set(range(R.marginal(layers[0]).shape[0])) - set(chosen))
    leaving = 0.0
    if others:
        leaving = float(R(reduce(or_, [nodes(layer, *others) for layer in layers])))
    ended = 0.0
    for block, above in enumerate(range(1, len(layers))):
        biases = [v.name for v in R.graph.leaves if v.name.startswith(f"blocks.{block}.")]
        if biases:
            union = reduce(or_, [nodes(bias, *chosen) for bias in biases])
            ended += float(R(*sets[above:], union))
    return Parts(float(R(*sets)), ended, leaving)


def explained(explainer: Explainer, molecule: Molecule, number: int) -> dict[str, Any]:
    """One molecule, for the class that the network predicts: all that is kept, as JSON takes it.

    Returns:
        `graph`, its `checks`: how well the laws hold; `subgraphs`, a row for every atom and ring;
        `by_atom`, the relevance that ends at each atom; and the strongest `walks` from both ends.
    """
    R = explainer(molecule.adjacency, molecule.features)
    assert R.target is not None
    layers = node_layers(R)
    walks = node_walks(R, *layers)
    by_atom = R.marginal(layers[0]).sum(1)
    off_parts = off_inside = 0.0
    rows = []
    atoms = [("atom", (atom,)) for atom in range(molecule.size)]
    for kind, chosen in [*atoms, *(("ring", ring) for ring in molecule.rings)]:
        relevance = float(R(*subgraph(layers, chosen)))
        off_inside = max(off_inside, abs(walks.inside(chosen).total - relevance))
        if kind == "ring":
            off_parts = max(off_parts, abs(1 - parts(R, layers, chosen).total))
        rows.append({"graph": number, "kind": kind, "nodes": list(chosen), "relevance": relevance})
    biases = float(sum(share.sum() for share in R.biases().values()))
    graph = {
        "graph": number,
        "label": molecule.label,
        "target": int(R.target[0]),
        "logit": float(R.scale[0]),
        "atoms": molecule.size,
        "rings": len(molecule.rings),
        "walks_listed": len(walks),
        "biases": biases,
        "total_variation": float(R.diagnostics().total_variation[0]),
        # How far from one, or from each other, are:
        "total": abs(1 - float(by_atom.sum()) - biases),
        "walks": abs(walks.total - float(by_atom.sum())),
        "parts": off_parts,
        "subgraphs": off_inside,
    }
    ends: tuple[Literal["largest", "smallest"], ...] = ("largest", "smallest")
    strongest = {
        end: [{"nodes": list(w.nodes), "relevance": w.relevance} for w in walks.top(TOP, end)]
        for end in ends
    }
    return {"graph": graph, "subgraphs": rows, "by_atom": by_atom.tolist(), "walks": strongest}


# -- walks one by one, as the GNN-LRP scripts go about it: nothing here knows of nrm's engine ------


def walks_inside(adjacency: Tensor, steps: int, chosen: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every walk of some steps that never leaves the chosen nodes, from the input up."""
    inside = {node: [n for n in chosen if bool(adjacency[node, n])] for node in chosen}

    def extended(walk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(walk) > steps:
            yield walk
            return
        for node in inside[walk[-1]]:
            yield from extended((*walk, node))

    for node in chosen:
        yield from extended((node,))


def walk_relevance(
    model: GIN, adjacency: Tensor, features: Tensor, target: int, walk: Sequence[int]
) -> Tensor:
    """The relevance of one walk `(n_0, ..., n_L)`, in units of the logit.

    Gradients flow through the walk's nodes alone, and through each linear layer as LRP-gamma has
    it: the value of a neuron, the slopes of its modified weights.
    """
    x = features.detach().clone().requires_grad_()
    with torch.enable_grad():
        h = x
        mean = adjacency.to(x.dtype).T / 2
        for block, gamma, node in zip(model.blocks, gammas(len(walk) - 1), walk[1:], strict=True):
            h = mean @ h
            for layer in block.layers:  # type: ignore[union-attr]
                h = _gamma_linear(h, layer.weight, layer.bias, gamma)
                if h.shape[-1] > 10:
                    h = h.clamp(min=0)
            kept = torch.zeros(len(h), 1, dtype=h.dtype)
            kept[node] = 1
            h = h * kept + (h * (1 - kept)).detach()
        logit = (h.sum(0) / 20**0.5)[target]
        (gradient,) = torch.autograd.grad(logit, x)
    return (gradient * features)[walk[0]].sum()


def enumerated_subgraph(
    model: GIN, adjacency: Tensor, features: Tensor, target: int, chosen: Sequence[int]
) -> Tensor:
    """The relevance of a subgraph, walk by walk, in units of the logit."""
    total = features.new_zeros(())
    for walk in walks_inside(adjacency, len(model.blocks), chosen):
        total = total + walk_relevance(model, adjacency, features, target, walk)
    return total


def _gamma_linear(h: Tensor, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
    """The linear layer's value, with the slopes of LRP-gamma."""
    value = (h @ weight.T + bias).detach()
    raised = h @ (weight + gamma * weight.clamp(min=0)).T + bias + gamma * bias.clamp(min=0)
    safe = torch.where(raised == 0, 1.0, raised.detach())
    return raised * torch.where(raised == 0, 0.0, value / safe)


# -- the experiment -------------------------------------------------------------------------------


def run(request: Request) -> Report:
    """Explain all molecules, or the first few: their atoms, rings and walks.

    Raises:
        InputError: the network does not give the logits stored beside it.
    """
    model, stored = load_gin(Path(request.data))
    molecules = load_molecules(Path(request.data))
    count = min(request.samples or len(molecules), len(molecules))
    weights = digest(model)[:12]
    store = Store(request.kept / f"{NAME}-{weights}", {"rules": repr(composite(len(model.blocks)))})
    found = []
    with one_thread(), counted(request.progress, "molecules", count) as advance:
        logits = _logits(model, stored, molecules)
        explainer = make_explainer(model)
        for number, molecule in enumerate(molecules[:count]):
            key = digest([number, molecule.features, molecule.adjacency])
            found.append(store.once(key, partial(explained, explainer, molecule, number)))
            advance(1)
    graphs = [one["graph"] for one in found]
    subgraphs = [row for one in found for row in one["subgraphs"]]
    drawn = [number for number in DRAWN if number < count]
    return Report(
        NAME,
        "What a graph network sees in molecules",
        (),
        [
            Picture(
                "walks.png",
                "Relevance of atoms, and strongest walks",
                f"The {TOP} largest (red) and {TOP} smallest (blue) of all walks of a molecule.",
                draw([molecules[number] for number in drawn], [found[number] for number in drawn]),
            )
        ],
        {
            "network": f"GIN of {len(model.blocks)} blocks, pretrained on MUTAG",
            "weights": weights,
            "rules": repr(composite(len(model.blocks))),
            "accuracy": f"{logits['accuracy']:.1%} of {len(molecules)}",
            "logits": f"at most {logits['largest_difference']:.1g} from those stored, of up to "
            f"{logits['largest']:.3g}",
            "molecules": count,
            "walks of atoms": sum(graph["walks_listed"] for graph in graphs),
            "explained": "the predicted class",
            "versions": versions(),
        },
        details={
            "logits": logits,
            "checks": {name: max(graph[name] for graph in graphs) for name in LAWS},
            "graphs": graphs,
            "subgraphs": subgraphs,
            "walks": [
                {"graph": number, "target": graphs[number]["target"], **found[number]["walks"]}
                for number in drawn
            ],
        },
        tables=[_relevances(subgraphs), _laws(graphs)],
        files={TABLE: _table(subgraphs)},
    )


def _logits(model: GIN, stored: Tensor, molecules: Sequence[Molecule]) -> dict[str, float]:
    """How near the network's logits are to those stored, and how many classes are right."""
    logits = torch.stack([model(m.adjacency, m.features) for m in molecules])
    difference, largest = float((logits - stored).abs().max()), float(stored.abs().max())
    if difference > _TOLERANCE * largest:
        raise InputError(f"the network's logits differ from those stored by {difference:.2g}")
    labels = torch.tensor([m.label for m in molecules])
    right = float((logits.argmax(1) == labels).double().mean())
    return {"largest_difference": difference, "largest": largest, "accuracy": right}


def _relevances(rows: Sequence[Mapping[str, Any]]) -> Table:
    lines = []
    for kind in ("atom", "ring"):
        found = [row["relevance"] for row in rows if row["kind"] == kind]
        if found:
            ends = min(found), statistics.median(found), max(found)
            lines.append((f"{kind}s", len(found), *ends))
    return Table(
        "Relevance of subgraphs", ("subgraph", "how many", "smallest", "median", "largest"), lines
    )


def _laws(graphs: Sequence[Mapping[str, Any]]) -> Table:
    lines = [(text, max(float(graph[name]) for graph in graphs)) for name, text in LAWS.items()]
    note = "Each side by queries of its own: the largest deviation over all molecules and rings."
    return Table("Laws", ("law", "off by at most"), lines, group=0, note=note)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The relevance of every subgraph, with all digits, as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["graph", "subgraph", "nodes", "relevance"])
    for row in rows:
        chosen = " ".join(map(str, row["nodes"]))
        writer.writerow([row["graph"], row["kind"], chosen, repr(row["relevance"])])
    return stream.getvalue()


# -- the figure -----------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def draw(molecules: Sequence[Molecule], found: Sequence[Mapping[str, Any]]) -> Figure:
    """Two panels for each molecule: its atoms, and its largest and smallest walks.

    Arguments:
        found: what `explained` says of them.
    """
    rows = math.ceil(len(found) / _ABREAST)
    figure = Figure(figsize=(13.2, 3.0 * rows + 0.6), dpi=110, layout="constrained")
    panels: Any = figure.subplots(rows, 2 * _ABREAST, squeeze=False)
    for ax in panels.flat:
        ax.set_aspect("equal")
        ax.set_axis_off()
    for number, (molecule, one) in enumerate(zip(molecules, found, strict=True)):
        row, column = divmod(number, _ABREAST)
        left, right = panels[row][2 * column : 2 * column + 2]
        places = layout(molecule)
        limit = max(map(abs, one["by_atom"])) or 1.0
        scale = Normalize(-limit, limit)
        _atoms(left, molecule, places, one["by_atom"], scale)
        _bonds(right, molecule, places)
        graph = one["graph"]
        left.set_title(
            f"{molecule.formula}, class {graph['target']} (logit {graph['logit']:.1f})", fontsize=9
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
        for end, colour in _ENDS.items():
            _walks(right, one["walks"][end], places, colour)
        texts = (f"{one['walks'][end][0]['relevance']:.2g}" for end in _ENDS)
        right.set_title(f"strongest walks: {' and '.join(texts)}", fontsize=9)
    _legend(figure)
    return figure


def layout(molecule: Molecule) -> Points:
    """Places of atoms, in units of a bond, the long side horizontal."""
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
    ax: Axes, molecule: Molecule, places: Points, relevance: Sequence[float], scale: Normalize
) -> None:
    """The molecule, coloured by relevance."""
    _bonds(ax, molecule, places, letters=False)
    xy = np.array(list(places.values()))
    colours = matplotlib.colormaps["RdBu_r"](scale(relevance))
    ax.scatter(xy[:, 0], xy[:, 1], s=150, color=colours, edgecolors="0.5", linewidths=0.6, zorder=2)
    for (x, y), kind, value in zip(xy, molecule.types, relevance, strict=True):
        dark = abs(value) > 0.6 * float(scale.vmax or 1.0)
        _letter(ax, ATOMS[kind], x, y, "white" if dark else "0.15", 3)


def _bonds(ax: Axes, molecule: Molecule, places: Points, letters: bool = True) -> None:
    """The molecule as chemists draw it: letters, where wanted, of all but carbon."""
    for a, b in molecule.bonds:
        x, y = zip(places[a], places[b], strict=True)
        ax.plot(x, y, color=_BOND, linewidth=1.6, zorder=1, solid_capstyle="round")
    for atom, (x, y) in places.items():
        name = ATOMS[molecule.types[atom]]
        if letters and name != "C":  # with room that bonds and walks leave it
            ax.scatter([x], [y], s=58, color="white", alpha=0.8, linewidths=0, zorder=5)
            _letter(ax, name, x, y, "0.15", 6)
    xs, ys = zip(*places.values(), strict=True)
    ax.set_xlim(min(xs) - 0.7, max(xs) + 0.7)
    ax.set_ylim(min(ys) - 0.7, max(ys) + 0.7)


def _letter(ax: Axes, name: str, x: float, y: float, colour: str, above: int) -> None:
    ax.text(x, y, name, ha="center", va="center", fontsize=7.5, color=colour, zorder=above)


def _walks(ax: Axes, walks: Sequence[Mapping[str, Any]], places: Points, colour: str) -> None:
    """Every walk as a curve, with a dot at the input.

    Each has a lane of its own beside the bonds, so that walks over the same bond can be told
    apart; a stay is a knot.
    """
    largest = max(abs(walk["relevance"]) for walk in walks)
    for number, walk in enumerate(walks):
        lane = _SPREAD * ((number + 0.5) / len(walks) - 0.5) * 2
        curve = _curve([places[node] for node in walk["nodes"]], lane)
        strength = abs(walk["relevance"]) / largest if largest else 0.0
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
    times = np.arange(len(knots))
    spline = CubicHermiteSpline(times, knots, np.gradient(knots, axis=0))
    return np.asarray(spline(np.linspace(0, times[-1], fineness * times[-1] + 1)))


def _unit(vector: Array) -> Array:
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector


def _legend(figure: Figure) -> None:
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
        fontsize=9,
        title="a dot is where a walk begins, at the input; a knot is a step from an atom to itself",
        title_fontsize=9,
    )


EXPERIMENT = Experiment(NAME, run)
