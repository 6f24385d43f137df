"""Neuron sets of graph networks: nodes, edges, subgraphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nrm.errors import NeuronSetError
from nrm.formulas import NeuronSet
from nrm.graph_networks.edges import EdgeLayer
from nrm.neurons import channels


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
