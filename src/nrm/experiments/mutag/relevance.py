"""What the network sees in every molecule: atoms, rings, walks of atoms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nrm.errors import InputError
from nrm.experiments.mutag.gin import GIN, composite, load_gin
from nrm.experiments.mutag.molecules import Molecule, load_molecules
from nrm.explainer import Explainer
from nrm.graph_networks import NodeWalk, NodeWalks, node_layers, node_walks, nodes, subgraph
from nrm.measure import Measure
from nrm.tensors import one_thread

DRAWN = (0, 1, 137, 139)
"""The molecules whose walks are drawn."""
TOP = 20
_TOLERANCE = 1e-4  # the logits are stored in single precision


@dataclass(frozen=True, eq=False)
class Explained:
    """One molecule, explained for the class that the network predicts.

    Attributes:
        by_atom: `[atoms]`, the relevance that ends at each atom.
        walks: all walks of atoms.
    """

    molecule: Molecule
    target: int
    logit: float
    by_atom: Tensor
    walks: NodeWalks


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


def explain(explainer: Explainer, molecule: Molecule, target: int | None = None) -> Measure:
    """The measure of one molecule, by default for the class with the larger logit."""
    return explainer(molecule.adjacency, molecule.features, target=target)


def make_explainer(model: GIN) -> Explainer:
    """The network under the rules of GNN-LRP."""
    return Explainer(model, composite(len(model.blocks)), batch_axis=None)


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


def experiment(
    folder: Path, count: int | None = None, done: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], list[Explained]]:
    """Explain all molecules (or the first few): their atoms, rings and walks.

    Arguments:
        folder: where `mutag.json` and the network lie.
        done: called after every molecule.

    Returns:
        what `mutag.json` of the results holds, and the molecules to draw.

    Raises:
        InputError: the network does not give the logits stored beside it.
    """
    model, stored = load_gin(folder)
    molecules = load_molecules(folder)
    with one_thread():
        logits = torch.stack([model(m.adjacency, m.features) for m in molecules])
        difference = float((logits - stored).abs().max())
        if difference > _TOLERANCE * float(stored.abs().max()):
            raise InputError(f"the network's logits differ from those stored by {difference:.2g}")
        labels = torch.tensor([m.label for m in molecules])
        explainer = make_explainer(model)
        table: list[dict[str, Any]] = []
        drawn: list[Explained] = []
        of_graphs: list[dict[str, Any]] = []
        for number, molecule in enumerate(molecules[:count]):
            found, rows, checks = _molecule(explainer, molecule, number)
            table += rows
            of_graphs.append(checks)
            if number in DRAWN:
                drawn.append(found)
            done()
    result = {
        "logits": {
            "largest_difference": difference,
            "largest": float(stored.abs().max()),
            "accuracy": float((logits.argmax(1) == labels).double().mean()),
        },
        "checks": {
            name: max(graph[name] for graph in of_graphs)
            for name in ("total", "walks", "parts", "subgraphs")
        },
        "graphs": of_graphs,
        "subgraphs": table,
        "walks": [_walks(one, number) for one, number in zip(drawn, DRAWN, strict=False)],
    }
    return result, drawn


def _molecule(
    explainer: Explainer, molecule: Molecule, number: int
) -> tuple[Explained, list[dict[str, Any]], dict[str, Any]]:
    """One molecule: what to draw, its rows of the table, and how well the laws hold."""
    R = explain(explainer, molecule)
    assert R.target is not None
    target, logit = int(R.target[0]), float(R.scale[0])
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
    checks = {
        "graph": number,
        "label": molecule.label,
        "target": target,
        "logit": logit,
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
    return Explained(molecule, target, logit, by_atom, walks), rows, checks


def _walks(found: Explained, number: int) -> dict[str, Any]:
    """The strongest walks of one molecule, from both ends."""

    def listed(walks: Sequence[NodeWalk]) -> list[dict[str, Any]]:
        return [{"nodes": list(walk.nodes), "relevance": walk.relevance} for walk in walks]

    return {
        "graph": number,
        "target": found.target,
        "largest": listed(found.walks.top(TOP)),
        "smallest": listed(found.walks.top(TOP, "smallest")),
    }
