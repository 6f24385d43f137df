"""Linear maps by way of complex numbers (Fourier transforms, rotations) as one operation each.

Relevance is not followed through complex numbers. Where all that happens to them is linear, what
comes out is a linear map of what went in, whose derivatives say everything. A rewrite of the
captured graph only; what is not linear stays, and is refused by name if a walk gets there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from nrm.graph.variables import is_float_tensor, reads_no_values
from nrm.operators import COMPLEX_LINEAR, Block, Routing, lookup, picks

_ALONE = (
    "real", "imag", "view_as_real", "view_as_complex", "complex", "conj", "conj_physical", "_conj",
    "_conj_physical", "resolve_conj", "resolve_neg", "neg", "to", "_to_copy", "clone",
    "contiguous", "alias", "detach", "lift_fresh_copy", "sum", "mean", "cumsum", "stft", "istft",
)  # fmt: skip
"""Linear in all that they read."""

_SUMS = ("add", "sub", "rsub")
_PRODUCTS = ("mul", "multiply", "matmul", "mm", "bmm", "einsum")


def collapse_complex(graph: FxGraph, inputs: Sequence[Node]) -> None:
    """Make one node of every linear map that goes through complex numbers.

    Arguments:
        inputs: the placeholders of the model's inputs.
    """
    varying = set(inputs)
    for node in graph.nodes:
        if not reads_no_values(node) and not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    hidden = {node for node in varying if node.op == "call_function" and _is_complex(node)}
    for node in list(graph.nodes):
        comes_back = node in varying and is_float_tensor(node)
        if comes_back and not hidden.isdisjoint(node.all_input_nodes):
            part = _part(node, hidden)
            if all(_is_linear(inner, varying) for inner in part):
                _replace(graph, node, part)
    graph.lint()


def _part(result: Node, hidden: set[Node]) -> list[Node]:
    """The complex nodes behind a real one, and itself, in order."""
    found = {result}
    waiting = [result]
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent in hidden and parent not in found:
                found.add(parent)
                waiting.append(parent)
    return [node for node in result.graph.nodes if node in found]


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(part, Tensor) and part.is_complex() for part in parts)


def _is_linear(node: Node, varying: set[Node]) -> bool:
    """Whether a node is linear in what depends on the input, of which all is real or complex."""
    if picks(node):
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = str(node.target).split(".")[1]
    moving = [parent for parent in node.all_input_nodes if parent in varying]
    if not all(is_float_tensor(parent) or _is_complex(parent) for parent in moving):
        return False  # an index or a number that depends on the input
    if any(parent.op == "placeholder" and _is_complex(parent) for parent in moving):
        return False  # a complex input
    if name in _SUMS:  # a constant would be a bias
        return moving == [leaf for leaf in node.args if isinstance(leaf, Node)] and all(
            isinstance(leaf, Node) for leaf in node.args
        )
    if name in _PRODUCTS:
        return len(moving) == 1 and sum(_read(node, moving[0])) == 1
    if name in ("div", "divide", "true_divide"):
        return moving == [node.args[0]] and not node.kwargs
    if name in ("constant_pad_nd", "pad"):
        return not any(node.args[3:] if name == "pad" else node.args[2:])
    row = lookup(node.target)
    if isinstance(row, Routing) and row.kind == "view":
        return len(moving) == len(node.all_input_nodes)
    return name in _ALONE or name.startswith("fft_")


def _read(node: Node, parent: Node) -> list[bool]:
    """For every place of a node's arguments that holds a node, whether it is this one."""
    places: list[bool] = []
    torch.fx.node.map_arg((node.args, node.kwargs), lambda leaf: places.append(leaf is parent))
    return places


def _replace(graph: FxGraph, result: Node, part: Sequence[Node]) -> None:
    inside = set(part)
    given = list(dict.fromkeys(p for n in part for p in n.all_input_nodes if p not in inside))
    body = FxGraph()
    within = {node: body.placeholder(f"argument_{i}") for i, node in enumerate(given)}
    for node in part:
        within[node] = body.node_copy(node, within.__getitem__)
    body.output(within[result])
    names = [f"argument_{i}" for i in range(len(given))]
    block = Block.of(COMPLEX_LINEAR, GraphModule(torch.nn.Module(), body), names)
    with graph.inserting_after(result):
        call = graph.call_function(block, tuple(given))
    call.meta = {**result.meta, "spelled": result.target}
    result.replace_all_uses_with(call)
