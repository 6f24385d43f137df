"""GNN-LRP and sGNN-LRP for the GIN of MUTAG, written out neuron by neuron in numpy.

Shares nothing with the package: LRP-gamma from its textbook formula, one neuron j at a time, with
biases in the denominators; relevance in shares of the explained logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Block = list[tuple[Array, Array]]
"""The linear layers of a block: weight `[in, out]` and bias."""


class GraphLRP:
    """One graph under one network.

    Arguments:
        neighbours: `[nodes, nodes]`, the node itself included.
    """

    def __init__(
        self, blocks: Sequence[Block], gammas: Sequence[float], neighbours: Array, x: Array
    ) -> None:
        self.blocks, self.gammas, self.neighbours = blocks, gammas, neighbours
        self.h = [x]
        for block in blocks:
            self.h.append(self._inside(block, self.h[-1])[-1])

    def logits(self) -> Array:
        return self.h[-1].sum(0) / np.sqrt(20)

    def walk(self, nodes: Sequence[int], target: int) -> float:
        """GNN-LRP: the relevance of one walk of nodes, from the input up."""
        relevance = self._top(nodes[-1], target)
        for depth, (lower, upper) in reversed(list(enumerate(pairwise(nodes)))):
            relevance = self._step(depth, upper, relevance).get(lower, 0 * self.h[depth][0])
        return float(relevance.sum())

    def subgraph(self, nodes: Sequence[int], target: int) -> float:
        """sGNN-LRP: relevance flows through the nodes of the subgraph alone."""
        held = {node: self._top(node, target) for node in nodes}
        for depth in reversed(range(len(self.blocks))):
            below = dict.fromkeys(nodes, 0 * self.h[depth][0])
            for node, relevance in held.items():
                for sender, part in self._step(depth, node, relevance).items():
                    if sender in below:
                        below[sender] = below[sender] + part
            held = below
        return float(sum(relevance.sum() for relevance in held.values()))

    def _inside(self, block: Block, h: Array) -> list[Array]:
        """What neighbours add up to, and every linear layer's output."""
        found = [self.neighbours.T @ h / 2]
        for weight, bias in block:
            z = found[-1] @ weight + bias
            found.append(np.maximum(z, 0) if z.shape[1] > 10 else z)
        return found

    def _top(self, node: int, target: int) -> Array:
        top = np.zeros_like(self.h[-1][node])
        top[target] = self.h[-1][node, target] / self.h[-1][:, target].sum()
        return top

    def _step(self, depth: int, node: int, relevance: Array) -> dict[int, Array]:
        """From a node's neurons after a block to those of its neighbours before it."""
        inside, gamma = self._inside(self.blocks[depth], self.h[depth]), self.gammas[depth]
        for (weight, bias), below in zip(self.blocks[depth][::-1], inside[-2::-1], strict=True):
            received = np.zeros(len(weight))
            for j, share in enumerate(relevance):
                if share == 0:
                    continue
                column = below[node] * (weight[:, j] + gamma * np.maximum(weight[:, j], 0))
                received += share * column / (column.sum() + bias[j] + gamma * max(bias[j], 0))
            relevance = received
        sent = {}
        for sender in np.flatnonzero(self.neighbours[:, node]):
            part = np.zeros_like(relevance)
            for i, share in enumerate(relevance):
                if share != 0:
                    total = sum(
                        self.h[depth][n, i] for n in np.flatnonzero(self.neighbours[:, node])
                    )
                    part[i] = share * self.h[depth][sender, i] / total
            sent[int(sender)] = part
        return sent


def of_model(model, gammas, adjacency, features) -> GraphLRP:
    """The transcription with a torch model's weights."""
    blocks = [
        [(layer.weight.numpy().T, layer.bias.numpy()) for layer in block.layers]
        for block in model.blocks
    ]
    return GraphLRP(blocks, gammas, adjacency.numpy().astype(float), features.numpy())
