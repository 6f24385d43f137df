"""The part of a captured model above a layer: what is computed from the layer, to the output.

Runs that differ in a layer alone need to compute nothing else. What the part reads beside the
layer (what bypasses it, and what came before in other branches) is the same in all of them: it is
given, as the layer is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import Node

from nrm.capture import nodes as addresses
from nrm.capture.nodes import Captured, ancestors, dependents


@dataclass(frozen=True)
class Above:
    """The part above a layer.

    Attributes:
        captured: the part, a graph of its own.
        starts: the nodes of the whole that its inputs stand for: the layer first.
        origin: the node of the whole that each of its nodes is a copy of.
        names: of the nodes that they have in the whole, the one to show first.
    """

    captured: Captured
    starts: tuple[Node, ...]
    origin: Mapping[Node, Node]
    names: Mapping[Node, list[str]]


def above(captured: Captured, layer: Node, explained: Node) -> Above:
    """The part of a model from a layer to what is explained.

    Arguments:
        layer: what is explained depends on it.
    """
    order = list(captured.graph.nodes)
    changing = dependents(order, [layer])
    varying = dependents(order, captured.inputs)

    def is_given(node: Node) -> bool:
        """Whether a node is an input of the part. Sizes and tuples are computed anew instead."""
        if node is layer:
            return True
        apart = node in varying and node not in changing
        return apart and isinstance(node.meta.get("val"), Tensor)

    needed = ancestors([explained], lambda n: () if is_given(n) else n.all_input_nodes)
    graph = FxGraph()
    copies: dict[Node, Node] = {}
    for node in order:
        if node not in needed:
            continue
        if is_given(node):
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[explained])
    starts = (layer, *(node for node in order if node in needed and node is not layer
                       and is_given(node)))  # fmt: skip
    names = addresses.assign(n for n in order if n in ancestors([captured.output]))
    part = Captured(
        graph,
        [copies[node] for node in starts],
        [names.get(node, [node.name])[0] for node in starts],
        {copies[n]: value for n, value in captured.constants.items() if n in copies},
        copies[explained],
        captured.method,
        captured.batched,
        captured.batch_axis,
        captured,
    )
    return Above(part, starts, {copy: node for node, copy in copies.items()}, names)
