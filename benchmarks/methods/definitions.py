"""The methods of benchmarks.methods from their definitions, sharing nothing with nrm.

Chains of linear layers and ReLUs: every walk is enumerated and its factors multiplied. Graph
networks: GNN-LRP by gradients of a forward pass whose messages are masked, as its authors do it,
and SymbXAI by sums over masked subgraphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]
Walk = tuple[int, ...]
"""One neuron of each layer, from the input to the output."""


def contributions(weights: Sequence[Matrix], x: Matrix, gamma: float) -> list[Matrix]:
    """T~ of every layer, `a_i (w_ij + gamma max(w_ij, 0))` (eq. 14); a ReLU between layers."""
    found = []
    for weight in weights:
        found.append(x[:, None] * (weight + gamma * np.maximum(weight, 0)))
        x = np.maximum(x @ weight, 0)
    return found


def columns(matrix: Matrix) -> Matrix:
    """`R(i | j)` (eq. 17)."""
    found: Matrix = matrix / matrix.sum(0)
    return found


def walks(factors: Sequence[Matrix], target: int, start: float) -> dict[Walk, float]:
    """Every walk to the target and the product of its factors (eqs. 12, 26)."""
    sizes = [range(len(matrix)) for matrix in factors]
    found = {}
    for path in itertools.product(*sizes):
        walk = (*path, target)
        relevance = start
        for layer, matrix in enumerate(factors):
            relevance *= matrix[walk[layer], walk[layer + 1]]
        found[walk] = relevance
    return found


def total(relevance: dict[Walk, float], counts: Callable[[Walk], float]) -> float:
    """The sum of what each walk counts (eq. 33); true and false are one and zero."""
    return sum(r * counts(walk) for walk, r in relevance.items())


class GraphNetwork:
    """`h -> relu(A h W)` in every layer, mean over nodes, a linear readout; all without biases."""

    def __init__(
        self, adjacency: Tensor, weights: Sequence[Tensor], readout: Tensor, gamma: float
    ) -> None:
        self.adjacency, self.weights = adjacency, weights
        self.readout, self.gamma = readout, gamma

    def relevance(self, x: Tensor, open_nodes: Sequence[Collection[int]]) -> float:
        """GNN-LRP: of the walks that stay in some nodes of each layer, from the input up.

        A forward pass whose gradient is LRP-gamma (values stay as they are), where messages that
        come from closed nodes are constants; then gradient times input. In units of the output.
        """
        x = x.clone().requires_grad_()
        hidden = _detached_outside(x, open_nodes[0])
        for weight, nodes in zip(self.weights, open_nodes[1:], strict=True):
            mixed = self.adjacency @ hidden
            value = torch.relu(mixed @ weight)
            raised = mixed @ (weight + self.gamma * weight.clamp(min=0))
            hidden = _detached_outside(raised * (value / raised).detach(), nodes)
        (gradient,) = torch.autograd.grad(hidden.mean(0) @ self.readout, x)
        return float((x.detach() * gradient).sum())

    def within(self, x: Tensor, nodes: Collection[int]) -> float:
        """The relevance of a subgraph: of the walks that never leave its nodes."""
        return self.relevance(x, [nodes] * (len(self.weights) + 1))

    def dividends(self, x: Tensor) -> dict[frozenset[int], float]:
        """Of every set of nodes, signed sums over its subgraphs: walks that visit exactly these."""
        alone = {nodes: self.within(x, nodes) for nodes in subsets(range(len(x)))}
        return {
            nodes: sum((-1) ** (len(nodes) - len(part)) * alone[part] for part in subsets(nodes))
            for nodes in alone
        }


def subsets(items: Iterable[int]) -> list[frozenset[int]]:
    """All of them, the empty set first."""
    listed = sorted(items)
    return [
        frozenset(chosen)
        for size in range(len(listed) + 1)
        for chosen in itertools.combinations(listed, size)
    ]


def _detached_outside(hidden: Tensor, nodes: Collection[int]) -> Tensor:
    mask = torch.zeros(len(hidden), 1, dtype=hidden.dtype)
    mask[list(nodes)] = 1
    return hidden * mask + (hidden * (1 - mask)).detach()
