"""Walks of nodes: the most relevant ones, and all of them (GNN-LRP as queries on the measure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from nrm.errors import QueryError
from nrm.graph import Variable
from nrm.graph_networks.layers import node_layers
from nrm.graph_networks.prefixes import Prefixes
from nrm.measure import Measure
from nrm.search import Flows, Order, in_depth, keys


@dataclass(frozen=True)
class NodeWalk:
    """One node in each layer, from the input up, and the relevance of the walks through them."""

    nodes: tuple[int, ...]
    relevance: float


@dataclass(frozen=True, eq=False)
class NodeWalks:
    """Walks of nodes.

    Attributes:
        layers: where they are read, from the input up.
        nodes: `[walks, layers]`, the node of every walk in each layer.
        relevance: `[walks]`.
        exact: whether these are all walks that carry any relevance. `False` where only the
            `beam` best beginnings were followed.
    """

    layers: tuple[str, ...]
    nodes: Tensor
    relevance: Tensor
    exact: bool

    @property
    def total(self) -> float:
        """The relevance of all of them together."""
        return float(self.relevance.sum())

    def top(self, k: int = 10, order: Order = "largest") -> list[NodeWalk]:
        """The `k` walks with the largest, smallest or absolutely largest relevance, in order."""
        if order not in get_args(Order):
            raise QueryError(f"the order is one of {get_args(Order)}, not {order!r}")
        if not isinstance(k, int) or k < 1:
            raise QueryError(f"k is a positive integer, not {k!r}")
        best = keys(self.relevance, order).topk(min(k, len(self))).indices
        return [self[place] for place in best.tolist()]

    def inside(self, chosen: Sequence[int]) -> NodeWalks:
        """The walks that never leave some nodes: their total is the subgraph's relevance."""
        members = torch.as_tensor(list(chosen), device=self.nodes.device)
        kept = torch.isin(self.nodes, members).all(1)
        return NodeWalks(self.layers, self.nodes[kept], self.relevance[kept], self.exact)

    def __len__(self) -> int:
        return len(self.relevance)

    def __getitem__(self, place: int) -> NodeWalk:
        return NodeWalk(tuple(self.nodes[place].tolist()), float(self.relevance[place]))

    def __iter__(self) -> Iterator[NodeWalk]:
        return (self[place] for place in range(len(self)))

    def __repr__(self) -> str:
        kind = "exact" if self.exact else "beam"
        return f"NodeWalks({len(self)} walks over {list(self.layers)}, {kind})"


def top_walks(
    R: Measure,
    *layers: str,
    k: int = 10,
    order: Order = "largest",
    axis: int = 0,
    work: int | None = None,
    seconds: float | None = None,
    memory: int = 2**28,
) -> Flows:
    """The most relevant walks of nodes, exactly, without listing all of them.

    `R.top` with layers divided by node: `flow.parts` holds the node of each layer. Where
    combinations that carry none, which are no walks, come before the k-th, the list is shorter.

    Arguments:
        layers: where to read walks; by default `node_layers(R)`.
        axis: the axis of the nodes, not counting the batch.
        others: as for `Measure.top`.
    """
    _require_one(R)
    found = R.top(
        *(layers or node_layers(R)),
        k=k,
        by=axis,
        order=order,
        work=work,
        seconds=seconds,
        memory=memory,
    )
    return replace(found, flows=[flow for flow in found if flow.relevance])


def node_walks(
    R: Measure,
    *layers: str,
    max_walks: int = 100_000,
    beam: int | None = None,
    axis: int = 0,
    memory: int = 2**28,
) -> NodeWalks:
    """The relevance of every walk `(n_0, ..., n_L)` of nodes, one in each layer.

    Messages are split by node, layer by layer, so that each walk's relevance is exact. Without
    `beam` all walks that carry any relevance are listed, so whatever `NodeWalks.top` says is exact
    too; under a beam it is not, because a walk may be missing.

    Arguments:
        layers: where to read walks, in any order; by default `node_layers(R)`. Walks that end
            before the lowest layer, at biases, are not listed.
        max_walks: refuse to list more walks than that.
        beam: follow only so many beginnings, those with the largest sum of absolute relevance.
        axis: the axis of the nodes, not counting the batch.
        memory: bytes that the messages travelling at once may take, roughly.

    Raises:
        QueryError: there are more walks than `max_walks`, and there is no beam.
    """
    _require_one(R)
    for what, number in (("max_walks", max_walks), ("beam", 1 if beam is None else beam)):
        if not isinstance(number, int) or number < 1:
            raise QueryError(f"{what} is a positive integer, not {number!r}")
    variables = [R.graph.variable(layer) for layer in layers or node_layers(R)]
    order = in_depth(variables, R.graph)
    start = R.marginal(order[0].name).unsqueeze(0)
    if beam is None:
        _refuse_too_many(R, order, start, max_walks, axis, memory)
    prefixes = Prefixes.split(start, order[0], axis)
    exact = True
    for lower in order[1:]:
        if beam is not None and len(prefixes) > beam:
            prefixes, exact = prefixes.strongest(beam), False
        prefixes = prefixes.step(R.forward_pass, lower, memory)
    return NodeWalks(
        tuple(variable.name for variable in order[::-1]),
        prefixes.nodes.flip(1),
        prefixes.relevance,
        exact,
    )


def _require_one(R: Measure) -> None:
    if R.batch > 1:
        raise QueryError("walks of nodes are those of one sample: explain one graph at a time.")


def _refuse_too_many(
    R: Measure, order: Sequence[Variable], start: Tensor, most: int, axis: int, memory: int
) -> None:
    """Count walks before listing them: from which node relevance gets to which, step by step."""
    merged = Prefixes.split(start, order[0], axis)
    ways = [1] * len(merged)  # how many walks each one stands for
    for lower in order[1:]:
        below = merged.step(R.forward_pass, lower, memory)
        count = sum(ways[parent] for parent in below.parents.tolist())
        if count > most:
            raise QueryError(
                f"there are {count} walks of nodes from {order[0].name!r} to {lower.name!r} "
                f"(max_walks is {most}). Allow more with max_walks=, or follow only the "
                f"strongest beginnings with beam=."
            )
        merged, ways = below.merged(ways)
