"""Modules that a user gave a rule of their own: each call becomes one operation of the graph.

A rewrite of the captured graph only; the user's modules are never touched.
"""

from __future__ import annotations

import torch
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from nrm.errors import CaptureError
from nrm.graph import addresses
from nrm.operators import Block, has_row


def collapse(graph: FxGraph) -> None:
    """Make one node of every call of a module whose class has a row."""
    calls: dict[str, list[Node]] = {}
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for address, kind in addresses.scopes(node):
            if has_row(kind):
                calls.setdefault(address, []).append(node)
                kinds[address] = kind
                break  # the outermost
    for address, nodes in calls.items():
        _collapse(graph, address, kinds[address], nodes)
    graph.lint()


def _collapse(graph: FxGraph, address: str, kind: str, nodes: list[Node]) -> None:
    inside = set(nodes)
    results = [n for n in nodes if any(user not in inside for user in n.users)]
    if len(results) != 1:
        raise CaptureError(
            f"module {address!r} ({kind}) has a rule of its own, but returns {len(results)} "
            "tensors. Give the rule to a module that returns one."
        )
    result = results[0]
    given = list(dict.fromkeys(p for n in nodes for p in n.all_input_nodes if p not in inside))
    names = _names(given, address)
    body = FxGraph()
    within = {node: body.placeholder(f"argument_{i}") for i, node in enumerate(given)}
    for node in nodes:
        within[node] = body.node_copy(node, within.__getitem__)
    body.output(within[result])
    block = Block.of(kind, GraphModule(torch.nn.Module(), body), list(names.values()))
    with graph.inserting_before(result):
        call = graph.call_function(block, tuple(given))
    call.meta = dict(result.meta)
    result.replace_all_uses_with(call)
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def _names(given: list[Node], address: str) -> dict[Node, str]:
    """`input`, `input_1`, ... and parameters by their names within the module."""
    names: dict[Node, str] = {}
    count = 0
    for node in given:
        parameter = node.meta.get("parameter")
        if parameter is not None:
            names[node] = parameter.removeprefix(address.partition("@")[0] + ".")
        else:
            names[node] = "input" + (f"_{count}" if count else "")
            count += 1
    return names
