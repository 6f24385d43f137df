"""Inputs that say how other inputs are connected: float adjacency matrices, weights of edges.

They steer which features are added up, as attention weights do, and take no relevance where the
value takes all (`nrm.graph.gates`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from nrm.graph.capture import Captured
from nrm.graph.character import is_embedding, reached_by_inputs
from nrm.graph.variables import is_symbolic
from nrm.operators import Call, MatrixProduct, lookup, picks
from nrm.operators.batch_norm import BatchNorm
from nrm.operators.layers import Layer
from nrm.operators.normalization import Normalization
from nrm.operators.transposed import TransposedConvolution

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
