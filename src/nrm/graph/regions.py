"""Parts of a model under `torch.autocast`, or with gradients switched on or off, as operators.

`torch.export` keeps each as one operator with a graph of its own; an eager trace marks where it
begins and ends. Gradients change no value, and which precision is computed in is decided in
`nrm.graph.precision`.
"""

from __future__ import annotations

import operator

import torch
from torch.amp import autocast_mode
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from nrm.errors import CaptureError

_BODY = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}
"""The place of the graph among an operator's arguments; what the graph reads follows."""

_MARKS = (autocast_mode._enter_autocast, autocast_mode._exit_autocast)


def inline(graph: FxGraph) -> None:
    """Put every region's operators in its place.

    Raises:
        CaptureError: there are other graphs within the graph, as `torch.cond` has them.
    """
    for node in reversed(list(graph.nodes)):  # an end reads its beginning
        if node.target in _MARKS:
            graph.erase_node(node)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            place = _BODY.get(str(node.target))
            if place is not None:
                _replace(graph, node, place)
            elif any(map(_graph_of, node.all_input_nodes)):
                raise CaptureError(
                    f"no rule covers {node.target}, which decides within the graph what is "
                    "computed. Write it in plain Python (if, for): it is then followed for one "
                    "input at a time."
                )
        elif _graph_of(node) is not None and not node.users:
            graph.erase_node(node)
    graph.lint()


def _replace(graph: FxGraph, region: Node, place: int) -> None:
    holder = region.args[place]
    assert isinstance(holder, Node)
    body = _graph_of(holder)
    assert body is not None
    inline(body)
    within = dict(zip(body.find_nodes(op="placeholder"), region.args[place + 1 :], strict=True))
    with graph.inserting_before(region):
        for node in body.nodes:
            if node.op not in ("placeholder", "output"):
                within[node] = graph.node_copy(node, within.__getitem__)
    results = body.output_node().args[0]
    assert isinstance(results, list | tuple)
    for user in list(region.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(within[results[user.args[1]]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(region)


def _graph_of(node: Node) -> FxGraph | None:
    """The graph that a node stands for, if it does."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    assert isinstance(node.target, str)
    found = getattr(node.graph.owning_module, node.target, None)
    return found.graph if isinstance(found, GraphModule) else None
