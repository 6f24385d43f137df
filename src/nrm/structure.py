"""What a captured graph says of a network: its structure inputs, its kind, and its gates.

- Inputs that say how other inputs are connected (adjacency matrices, weights of edges) steer which
  features are added up, as attention weights do, and take no relevance where the value takes all.
- Networks whose activations are signed and smooth get another composite by default.
- A factor of a product is a gate, more or less, as told by what computed it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence

from torch import Tensor
from torch.fx import Node

from nrm.capture.nodes import (
    Captured,
    is_float_tensor,
    is_mask,
    is_symbolic,
    reads_no_values,
    unfollowed,
)
from nrm.operators import carries_none, function_of, picks, row_of
from nrm.rules.base import STRUCTURE

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
            covered = row_of(node) if node in reached else None
            if covered is None:
                continue
            call, row = covered
            factors = row.factors(call)
            if not row.is_product or len(factors) != 2 or not reached.issuperset(factors):
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
    found = row_of(node)
    if found is None:
        return is_embedding(node)
    _, row = found
    if row.is_product and row.adds_up:
        return not reached.issuperset(node.all_input_nodes)
    return row.applies_weights


# -- What kind of network a graph computes, read from what happens to its inputs.
# Only nodes that depend on a real-valued input count: what is done to constants decides nothing,
# and neither does how often a constant was recorded by the way of capture.

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
        role = function_of(node).role
        if "label" in node.meta or role == "normalization" or is_embedding(node):
            return True
        if _divides_by_spread(node, role, reached):
            return True
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
        if not _has_values(node) or unfollowed(node) == "steps":
            continue
        if is_embedding(node) or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached & needed


def is_embedding(node: Node) -> bool:
    """Whether a node looks up vectors of integers."""
    return function_of(node).role == "lookup" and is_float_tensor(node)


def _has_values(node: Node) -> bool:
    return is_float_tensor(node) or isinstance(node.meta.get("val"), tuple | list)


def _divides_by_spread(node: Node, role: str, reached: set[Node]) -> bool:
    """Whether a node scales what it is given by how far that spreads."""
    if role == "times":
        return any(_is_spread(a, reached, inverse=True) for a in node.args)
    return role == "over" and _is_spread(node.args[1], reached, inverse=False)


def _is_spread(value: object, reached: set[Node], inverse: bool) -> bool:
    """Whether something is a standard deviation or root mean square, or the inverse of one."""
    node = value
    while isinstance(node, Node) and node in reached:
        role = function_of(node).role
        if role == "inverse root":
            return inverse and _is_mean(node.args[0], reached)
        if role == "root":
            return not inverse and _is_mean(node.args[0], reached)
        if role == "spread":
            return not inverse
        if role == "inverse":
            node, inverse = node.args[0], not inverse
        elif role == "over" and node.args[1] in reached:
            node, inverse = node.args[1], not inverse  # one over it
        else:
            node = _behind(node, reached)
    return False


def _is_mean(value: object, reached: set[Node]) -> bool:
    """Whether something is a mean or variance, perhaps plus a constant."""
    node = value
    while isinstance(node, Node) and node in reached:
        if function_of(node).role == "mean":
            return True
        node = _behind(node, reached)
    return False


def _behind(node: Node, reached: set[Node]) -> Node | None:
    """The operand of a view, cast, elementwise function or sum with a constant."""
    if picks(node):
        producer = node.args[0]
        return producer if isinstance(producer, Node) else None
    found = row_of(node)
    parents = [parent for parent in node.all_input_nodes if parent in reached]
    if found is None or len(parents) != 1:
        return None
    _, row = found
    passed = row.one_parent or row.moves or row.function.role in ("plus", "minus", "minus from")
    return parents[0] if passed else None


def _weight(captured: Captured, node: Node, reached: set[Node]) -> str | None:
    """What a product takes for its weight, as it is computed; `None` where both factors vary.

    By name, or by where it lies in memory: an eager trace records each use anew.
    """
    found = row_of(node)
    if found is None:
        return None
    call, row = found
    factors = [factor for factor in row.factors(call) if isinstance(factor, Node)]
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


# -- How much a factor of a product is a gate, as told by what computed it.
# A gate says how much of a value passes: a sigmoid in a recurrent cell, a softmax in attention, the
# reciprocal norm in a normalisation written out by hand. `nrm.rules.Alpha` decides what it gets.


def gate_ranks(
    factors: Sequence[Node], carries: Callable[[Node], bool], structure: Container[Node]
) -> tuple[int, ...]:
    """How much each factor of a product is a gate; structure more than whatever it multiplies."""
    ranks = [None if f in structure else gate_rank(f, carries) for f in factors]
    others = [rank for rank in ranks if rank is not None]
    above = STRUCTURE if max(others, default=0) < STRUCTURE else max(others) + 1
    return tuple(above if rank is None else rank for rank in ranks)


def gate_rank(node: Node, carries: Callable[[Node], bool]) -> int:
    """0 for a value; the larger, the more `node` is a gate (`nrm.operators.call`)."""
    source: Node | None = node
    while source is not None:
        rank = function_of(source).gate
        if rank:
            return rank
        source = _shown(source, carries)
    return 0


def _shown(node: Node, carries: Callable[[Node], bool]) -> Node | None:
    """The operand behind a view, a constant factor or a constant summand."""
    if picks(node):
        producer = node.args[0]
        assert isinstance(producer, Node)
        return _shown(producer, carries)
    found = row_of(node) if node.op == "call_function" else None
    if found is None or carries_none(node.target):  # type: ignore[arg-type]
        return None
    call, row = found
    return row.shown(call, carries)
