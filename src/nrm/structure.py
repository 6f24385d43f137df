"""Inputs that say how other inputs are connected: float adjacency matrices, weights of edges.

They steer which features are added up, as attention weights do, and take no relevance where the
value takes all (`nrm.structure`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from nrm.capture.nodes import Captured, is_float_tensor, is_mask, is_symbolic, reads_no_values
from nrm.operators import (
    Call,
    Identity,
    MatrixProduct,
    Product,
    Quotient,
    Routing,
    Sum,
    carries_none,
    lookup,
    picks,
)
from nrm.operators.layers import Layer, TransposedConvolution
from nrm.operators.norms import Normalization
from nrm.operators.sums import BatchNorm
from nrm.rules.alphas import SCALE, STRUCTURE

_NAMES = (
    "adj", "adjs", "adj_t", "adj_mat", "adj_matrix", "adjacency", "adjacencies",
    "adjacency_matrix", "laplacian", "edge_weight", "edge_weights",
)  # fmt: skip


class Structure:
    """What of a captured graph is nothing but the structure of what other inputs hold.

    An input is structure if it is called so (`adj`, `edge_weight`), or if it is, as it was given
    or rescaled, a square matrix that multiplies features computed from another input, as many as
    the matrix has rows. What mixes another input's own last axis, its channels, is none: nor is a
    product of two inputs' vectors.
    """

    def __init__(self, captured: Captured) -> None:
        named = {
            node
            for node, name in zip(captured.inputs, captured.names, strict=True)
            if name.rpartition(".")[2].lower() in _NAMES
        }
        self._sources: dict[Node, frozenset[Node]] = {}
        self._as_given: set[Node] = set()
        reached = reached_by_inputs(captured)
        for node in captured.graph.nodes:
            if node not in reached:
                continue
            parents = [parent for parent in node.all_input_nodes if parent in reached]
            self._sources[node] = frozenset(
                source for parent in parents for source in self._sources[parent]
            ) or frozenset([node])
            if self._as_given.issuperset(parents) and not _is_weighted(node, reached):
                self._as_given.add(node)
        self._inputs = frozenset(named & reached) | self._by_use(captured, reached)

    def __contains__(self, node: object) -> bool:
        """Whether a node holds structure: that of inputs, as given or rescaled."""
        return node in self._as_given and self._sources[node] <= self._inputs  # type: ignore[index]

    def _by_use(self, captured: Captured, reached: set[Node]) -> frozenset[Node]:
        found: set[Node] = set()
        for node in captured.graph.nodes:
            if node not in reached or not isinstance(node.target, torch._ops.OpOverload):
                continue
            row = lookup(node.target)
            if not isinstance(row, MatrixProduct) or row.passes is None:
                continue
            factors = [slot for name, slot in Call.of(node).nodes() if name in row.passes]
            if len(factors) != 2 or not reached.issuperset(factors):
                continue
            square = [self._is_square(factor) for factor in factors]
            for matrix, features in ((0, 1), (1, 0)):
                sources = self._sources[factors[matrix]]
                others = self._sources[factors[features]] - sources
                if not square[matrix] or square[features] or not others:
                    continue
                size = str(factors[matrix].meta["val"].shape[-1])
                if any(size in _places(source) for source in others):
                    found |= sources
        return frozenset(found)

    def _is_square(self, node: Node) -> bool:
        """Whether a node is a square matrix, or one for each sample, made of one input as given."""
        value = node.meta.get("val")
        if node not in self._as_given or len(self._sources[node]) != 1:
            return False
        if not isinstance(value, Tensor) or not 2 <= value.dim() <= 3:
            return False
        return str(value.shape[-1]) == str(value.shape[-2])


def _places(source: Node) -> list[str]:
    """The sizes of an input's axes (or an embedding's) but for those of samples and channels."""
    value = source.meta["val"]
    sizes = [size for size in value.shape if not is_symbolic(size) and size != 1]
    return [str(size) for size in (sizes[:-1] if len(sizes) > 1 else sizes)]


def _is_weighted(node: Node, reached: set[Node]) -> bool:
    """Whether a node applies weights of the model, or looks vectors up."""
    if picks(node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    row = lookup(node.target)
    if isinstance(row, MatrixProduct):
        return not reached.issuperset(node.all_input_nodes)
    return is_embedding(node) or isinstance(
        row, Layer | TransposedConvolution | BatchNorm | Normalization
    )


# -- What kind of network a graph computes, read from what happens to its inputs.
# Only nodes that depend on a real-valued input count: what is done to constants decides nothing,
# and
# neither does how often a constant was recorded by the way of capture.

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


# -- How much a factor of a product is a gate, as told by what computed it.
# A gate says how much of a value passes: a sigmoid in a recurrent cell, a softmax in attention, the
# reciprocal norm in a normalisation written out by hand. `nrm.rules.Alpha` decides what it gets.

_RANKS = {
    # squashing and smooth functions: a gate against a linear value (SwiGLU, GEGLU). A rectified
    # value is a value, whatever it is multiplied with.
    **dict.fromkeys(
        ["tanh", "hardtanh", "silu", "gelu", "mish", "hardswish", "softplus", "elu"], 1
    ),
    **dict.fromkeys(["sigmoid", "hardsigmoid"], 2),
    # weights that are normalised to sum to one, also by hand
    **dict.fromkeys(["softmax", "_softmax", "exp"], 3),
    # scales: what is left of a vector is its direction
    **dict.fromkeys(
        ["rsqrt", "reciprocal", "sqrt", "linalg_vector_norm", "norm", "std", "var"], SCALE
    ),
}


def gate_ranks(
    factors: Sequence[Node], carries: Callable[[Node], bool], structure: Container[Node]
) -> tuple[int, ...]:
    """How much each factor of a product is a gate; structure more than whatever it multiplies."""
    ranks = [None if f in structure else gate_rank(f, carries) for f in factors]
    others = [rank for rank in ranks if rank is not None]
    above = STRUCTURE if max(others, default=0) < STRUCTURE else max(others) + 1
    return tuple(above if rank is None else rank for rank in ranks)


def gate_rank(node: Node, carries: Callable[[Node], bool]) -> int:
    """0 for a value; the larger, the more `node` is a gate."""
    while True:
        packet, _, overload = str(node.target).rpartition(".")
        name = packet.removeprefix("aten.")
        if name == "pow" and overload == "Tensor_Scalar" and float(_exponent(node)) in (-0.5, 0.5):
            name = "rsqrt"
        if name in _RANKS:
            return _RANKS[name]
        source = _transparent(node, carries)
        if source is None:
            return 0
        node = source


def _exponent(node: Node) -> float:
    value = node.args[1]
    return value if isinstance(value, int | float) else 0.0


def _transparent(node: Node, carries: Callable[[Node], bool]) -> Node | None:
    """The operand behind a view, a constant factor or a constant summand."""
    if picks(node):
        producer = node.args[0]
        assert isinstance(producer, Node)
        return _transparent(producer, carries)
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return None
    if carries_none(node.target):  # type: ignore[arg-type]
        return None
    operator = lookup(node.target)  # type: ignore[arg-type]
    carried = [parent for parent in node.all_input_nodes if carries(parent)]
    if isinstance(operator, Quotient):
        numerator = node.args[0]
        return numerator if isinstance(numerator, Node) and carries(numerator) else None
    if len(carried) == 1 and isinstance(operator, Identity | Routing | Product | Sum):
        return carried[0]
    return None
