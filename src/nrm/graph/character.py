"""What kind of network a graph computes, read from what happens to its inputs.

Only nodes that depend on a real-valued input count: what is done to constants decides nothing, and
neither does how often a constant was recorded by the way of capture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch.fx import Node

from nrm.graph.capture import Captured
from nrm.graph.draft import is_mask
from nrm.graph.variables import is_float_tensor, reads_no_values
from nrm.operators import Call, Identity, Routing, Sum, lookup, picks

_NORMS = (
    "layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm",
    "_fused_rms_norm",
)  # fmt: skip
_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "mv")

RECURRENT = 3
"""How often one linear layer is applied in what counts as a recurrent network."""


def is_signed(captured: Captured) -> bool:
    """Whether activations are signed and smooth, as in transformers and recurrent networks.

    That is, there are embeddings, norms over a sample's own neurons (also written out: what is
    divided by the root of a mean or variance), or hidden states of a recurrence.
    """
    reached = reached_by_inputs(captured)
    applied = Counter[str]()
    for node in captured.graph.nodes:
        if node not in reached:
            continue
        name = operator_name(node)
        if "label" in node.meta or name in _NORMS or is_embedding(node):
            return True
        if name == "instance_norm" and Call.of(node)["use_input_stats"]:
            return True
        if _divides_by_spread(node, name, reached):
            return True
        if name in _PRODUCTS:
            weight = _weight(captured, node, reached)
            if weight is not None:
                applied[weight] += 1
    return max(applied.values(), default=0) >= RECURRENT


def reached_by_inputs(captured: Captured) -> set[Node]:
    """The nodes of real values on the way from real-valued inputs or embeddings to the output."""
    needed: set[Node] = set()
    waiting = [captured.output]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    varying = set(captured.inputs)
    reached = {
        node
        for node, name in zip(captured.inputs, captured.names, strict=True)
        if is_float_tensor(node) and not is_mask(name)
    }
    for node in captured.graph.nodes:
        if node.op != "call_function" or varying.isdisjoint(node.all_input_nodes):
            continue
        if reads_no_values(node):
            continue
        varying.add(node)
        if not _has_values(node):
            continue
        if is_embedding(node) or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached & needed


def operator_name(node: Node) -> str:
    """`layer_norm` for `aten.layer_norm.default`."""
    return str(node.target).partition(".")[2].partition(".")[0]


def is_embedding(node: Node) -> bool:
    """Whether a node looks up vectors of integers."""
    return operator_name(node) == "embedding" and is_float_tensor(node)


def _has_values(node: Node) -> bool:
    return is_float_tensor(node) or isinstance(node.meta.get("val"), tuple | list)


def _divides_by_spread(node: Node, name: str, reached: set[Node]) -> bool:
    """Whether a node scales what it is given by how far that spreads."""
    if name in ("mul", "multiply"):
        return any(_is_spread(a, reached, inverse=True) for a in node.args)
    if name in ("div", "divide", "true_divide"):
        return _is_spread(node.args[1], reached, inverse=False)
    return False


def _is_spread(value: object, reached: set[Node], inverse: bool) -> bool:
    """Whether something is a standard deviation or root mean square, or the inverse of one."""
    node = value
    while isinstance(node, Node) and node in reached:
        name = operator_name(node)
        if picks(node):
            node = node.args[0]
        elif name == "rsqrt":
            return inverse and _is_mean(node.args[0], reached)
        elif name == "reciprocal":
            node, inverse = node.args[0], not inverse
        elif name == "sqrt":
            return not inverse and _is_mean(node.args[0], reached)
        elif name == "pow" and node.args[1] in (0.5, -0.5):
            return inverse == (node.args[1] == -0.5) and _is_mean(node.args[0], reached)
        elif name in ("std", "std_mean"):
            return not inverse
        elif name in ("div", "divide", "true_divide") and node.args[1] in reached:
            node, inverse = node.args[1], not inverse  # one over it
        else:
            node = _behind(node, reached)
    return False


def _is_mean(value: object, reached: set[Node]) -> bool:
    """Whether something is a mean or variance, perhaps plus a constant."""
    node = value
    while isinstance(node, Node) and node in reached:
        if operator_name(node) in ("mean", "var", "var_mean"):
            return True
        node = _behind(node, reached)
    return False


def _behind(node: Node, reached: set[Node]) -> Node | None:
    """The operand of a view, cast, elementwise function or sum with a constant."""
    if picks(node):
        producer = node.args[0]
        return producer if isinstance(producer, Node) else None
    row = lookup(node.target) if hasattr(node.target, "_schema") else None  # type: ignore[arg-type]
    parents = [parent for parent in node.all_input_nodes if parent in reached]
    return parents[0] if len(parents) == 1 and isinstance(row, Identity | Routing | Sum) else None


def _weight(captured: Captured, node: Node, reached: set[Node]) -> str | None:
    """What a product takes for its weight, as it is computed; `None` where both factors vary.

    By name, or by where it lies in memory: an eager trace records each use anew.
    """
    factors = _factors(node)
    constant = [factor for factor in factors if factor not in reached]
    return _recipe(captured, constant[0]) if len(constant) == 1 < len(factors) else None


def _recipe(captured: Captured, value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_recipe(captured, item) for item in value)}]"
    if not isinstance(value, Node):
        return repr(value)
    if value in captured.constants:
        stored = captured.constants[value]
        return str(value.meta.get("parameter") or (stored.data_ptr(), stored.shape))
    if value.op != "call_function":
        return value.name
    arguments = [*value.args, *value.kwargs.values()]
    return f"{value.target}{_recipe(captured, arguments)}"


def _factors(node: Node) -> Sequence[Node]:
    name = operator_name(node)
    listed = node.args[1] if name == "einsum" else node.args[1:3]
    if name not in ("einsum", "addmm", "baddbmm"):
        listed = node.args[:2]
    assert isinstance(listed, Sequence)
    return [factor for factor in listed if isinstance(factor, Node)]
