"""Nodes, edges and subgraphs as neuron sets, and walks of nodes (GNN-LRP as queries).

The nodes of a graph lie along one axis of every variable. A walk of nodes is read layer by layer:
the message at a layer is split by node, and the part of each node sent on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from nrm.engine import in_chunks, message_size, send_between
from nrm.errors import NeuronSetError, QueryError
from nrm.formulas import NeuronSet
from nrm.graph import Variable
from nrm.graph_networks.edges import EdgeLayer, node_layers
from nrm.measure import Measure
from nrm.prepare import Pass
from nrm.search import Flows, Order, in_depth, keys
from nrm.sets import channels

# -- Neuron sets.


def nodes(layer: str, *indices: int, axis: int = 0) -> NeuronSet:
    """All features of some nodes in a layer.

    Arguments:
        layer: address of a variable.
        indices: node numbers.
        axis: the axis of the nodes, not counting the batch.

    Raises:
        NeuronSetError: no nodes given.

    Example:
        >>> R(nodes("conv1", 3, 4), nodes("x", 7))  # from node 3 or 4 after conv1 to node 7
    """
    if not indices:
        raise NeuronSetError(f"nodes({layer!r}) names no node: the set is empty.")
    return channels(layer, *indices, axis=axis)


def edges(layer: str | EdgeLayer, *indices: int, axis: int = 0) -> NeuronSet:
    """The messages along some edges, as neurons: all features of some rows of an edge layer.

    Arguments:
        layer: what `edge_layers` found, or the address of a variable with one row for each edge.
        indices: row numbers; `EdgeLayer.rows` finds those from one node to another.
        axis: the axis of the edges, not counting the batch.

    Raises:
        NeuronSetError: no edges given.
    """
    name = layer.name if isinstance(layer, EdgeLayer) else layer
    if not indices:
        raise NeuronSetError(f"edges({name!r}) names no edge: the set is empty.")
    return channels(name, *indices, axis=axis)


def step(lower: str, upper: str, sender: int, receiver: int, axis: int = 0) -> list[NeuronSet]:
    """The step from `receiver` in the upper layer down to `sender` in the lower one.

    `R(*step(...))` is the relevance of the walks that take it, over an edge or in place.
    """
    return [nodes(lower, sender, axis=axis), nodes(upper, receiver, axis=axis)]


def subgraph(
    layers: Iterable[str], chosen: Sequence[int] | Sequence[Sequence[int]], axis: int = 0
) -> list[NeuronSet]:
    """The same nodes in every layer (or some of their own for each), one set a layer.

    `R(*subgraph(layers, chosen))` is the relevance `R(S_0, ..., S_L)` of the subgraph: that of the
    walks that never leave it.

    Arguments:
        layers: addresses of variables, such as `node_layers` gives.
        chosen: node numbers, or one sequence of them for each layer.
        axis: the axis of the nodes, not counting the batch.

    Raises:
        NeuronSetError: no nodes, or not as many sequences as layers.
    """
    names = list(layers)
    if hasattr(chosen, "tolist"):  # tensors and arrays
        chosen = chosen.tolist()
    own = [list(one) for one in chosen if not isinstance(one, int)]
    if not own:
        own = [[int(node) for node in chosen if isinstance(node, int)]] * len(names)
    if len(own) != len(names):
        raise NeuronSetError(f"a subgraph has nodes of {len(own)} layers, but there are {names}.")
    return [nodes(name, *some, axis=axis) for name, some in zip(names, own, strict=True)]


# -- Beginnings of walks, with the message of each at the node it has come to.


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Walks from the output down to a layer.

    Attributes:
        variable: the layer.
        axis: that of the nodes, not counting the batch, of which there is one.
        nodes: `[P, layers so far]`, the node of every walk in each layer.
        held: `[P, *features]`, the message of each at its last node; elsewhere it has none.
        parents: `[P]`, which prefix each came from.
    """

    variable: Variable
    axis: int
    nodes: Tensor
    held: Tensor
    parents: Tensor

    @classmethod
    def split(cls, message: Tensor, variable: Variable, axis: int) -> Prefixes:
        """The parts of a message `[1, *shape]`, one for each node that holds any."""
        parents, nodes, held = _parts(message, variable, axis)
        return cls(variable, axis, nodes[:, None], held, parents)

    @property
    def relevance(self) -> Tensor:
        """`[P]`: the joint relevance of the nodes so far."""
        return self.held.flatten(1).sum(1)

    def strongest(self, beam: int) -> Prefixes:
        """Those with the largest sum of absolute relevance."""
        return self._at(self.held.abs().flatten(1).sum(1).topk(beam).indices)

    def step(self, forward: Pass, lower: Variable, memory: int) -> Prefixes:
        """Every prefix with every node of a lower layer that its message gets to."""
        shape = forward.shape(self.variable)
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def stepped(chosen: Sequence[int]) -> None:
            part = self._at(slice(chosen[0], chosen[-1] + 1))
            arrived = send_between(forward, part._messages(shape), self.variable, lower)
            parents, nodes, held = _parts(arrived, lower, self.axis)
            found.append((parents + chosen[0], nodes, held))

        each = message_size(forward, self.variable, lower)
        in_chunks(range(len(self)), memory, each, stepped)
        if not found:  # nothing is left to go on from
            blank = self.held.new_zeros((0, *forward.shape(lower)))
            found.append(_parts(blank, lower, self.axis))
        parents, nodes, held = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        so_far = torch.cat([self.nodes[parents], nodes[:, None]], 1)
        return Prefixes(lower, self.axis, so_far, held, parents)

    def merged(self, ways: list[int]) -> tuple[Prefixes, list[int]]:
        """One prefix for each last node, and how many walks it stands for.

        Arguments:
            ways: the same for the prefixes that these came from.
        """
        last, group = torch.unique(self.nodes[:, -1], return_inverse=True)
        held = self.held.new_zeros((len(last), *self.held.shape[1:]))
        held.index_add_(0, group, self.held.abs())
        counts = [0] * len(last)
        for place, parent in zip(group.tolist(), self.parents.tolist(), strict=True):
            counts[place] += ways[parent]
        parents = torch.arange(len(last), device=last.device)
        return Prefixes(self.variable, self.axis, last[:, None], held, parents), counts

    def _messages(self, shape: torch.Size) -> Tensor:
        """`[P, *shape]`."""
        message = self.held.new_zeros((len(self), *shape))
        every = torch.arange(len(self), device=message.device)
        _by_node(message, self.variable, self.axis)[every, self.nodes[:, -1]] = self.held
        return message

    def _at(self, chosen: Tensor | slice) -> Prefixes:
        return Prefixes(
            self.variable, self.axis, self.nodes[chosen], self.held[chosen], self.parents[chosen]
        )

    def __len__(self) -> int:
        return len(self.nodes)


def _by_node(message: Tensor, variable: Variable, axis: int) -> Tensor:
    """`[K, *shape]` as `[K, nodes, *features]`, of the one sample, in the same memory."""
    sample = variable.canonical(message)[:, 0]
    return sample.movedim(1 + variable.axis_of(sample.shape[1:], axis), 1)


def _parts(message: Tensor, variable: Variable, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a message `[K, *shape]` holds at each node: its row, the node, and `[P, *features]`."""
    by_node = _by_node(message, variable, axis)
    holds = by_node.flatten(2).ne(0).any(2) if by_node.dim() > 2 else by_node.ne(0)
    rows, nodes = holds.nonzero(as_tuple=True)
    return rows, nodes, by_node[rows, nodes]


# -- Walks: the most relevant ones, and all of them.


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
