"""A graph network: GNN-LRP, subgraphs, SymbXAI and Harsanyi dividends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import nrm
from benchmarks.methods import definitions
from benchmarks.methods.chain import GAMMA, linear
from benchmarks.methods.table import Row, deviation
from nrm import methods
from nrm.composites import Composite, head
from nrm.rules import PlainGamma, Zero


class GraphNetwork(nn.Module):
    """The module that `definitions.GraphNetwork` describes."""

    adjacency: Tensor

    def __init__(self, adjacency: Tensor, weights: Sequence[Tensor], readout: Tensor) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.layers = nn.ModuleList(linear(weight) for weight in weights)
        self.out = linear(readout)

    def forward(self, x: Tensor) -> Tensor:
        """Features of nodes `[nodes, features]` to `[1, classes]`."""
        for layer in self.layers:
            x = torch.relu(layer(self.adjacency @ x))
        logits: Tensor = self.out(x.mean(0, keepdim=True))
        return logits


def graph_rows() -> Iterator[Row]:
    """A graph network under LRP-gamma, by masked gradients and signed sums over subgraphs."""
    torch.manual_seed(0)
    size, widths, target = 5, (3, 6, 6), 0
    edges = torch.rand(size, size, dtype=torch.float64).triu(1) > 0.5
    adjacency = torch.eye(size, dtype=torch.float64) + edges + edges.T
    weights = [torch.randn(pair, dtype=torch.float64) for pair in itertools.pairwise(widths)]
    readout = torch.randn(widths[-1], 2, dtype=torch.float64)
    x = torch.rand(size, widths[0], dtype=torch.float64)
    model = GraphNetwork(adjacency, weights, readout).eval()
    composite = Composite([(head, Zero())], PlainGamma(GAMMA))
    R = nrm.Explainer(model, composite, batch_axis=None)(x, target=(0, target))
    other = definitions.GraphNetwork(adjacency, weights, readout[:, target], GAMMA)
    layers = ["x", *(f"layers.{k}" for k in range(len(weights)))]
    logit = float(R.scale)

    def node(layer: str, *chosen: int) -> nrm.NeuronSet:
        return nrm.channels(layer, *chosen, axis=0)

    def visits(*chosen: int) -> nrm.NeuronSet:
        return nrm.NeuronSet(tuple(m for layer in layers for m in node(layer, *chosen).members))

    def row(
        method: str, call: str, query: str, by: str, found: list[Tensor], expected: list[float]
    ) -> Row:
        theirs = torch.tensor(expected, dtype=torch.float64) / logit
        return Row(method, call, query, by, deviation(torch.cat(found), theirs))

    walks = list(itertools.product(range(size), repeat=len(layers)))
    yield row(
        "GNN-LRP, a walk of nodes", "subgraph(R, node, node, …)", "R(node, node, …)",
        "masked gradients",
        [methods.subgraph(R, *map(node, layers, walk)) for walk in walks],
        [other.relevance(x, [[i] for i in walk]) for walk in walks],
    )  # fmt: skip
    yield row(
        "Subgraph relevance", "subgraph(R, nodes, nodes, …)", "R(nodes, nodes, …)",
        "masked gradients",
        [methods.subgraph(R, *(node(layer, 0, 1, 3) for layer in layers))],
        [other.within(x, {0, 1, 3})],
    )  # fmt: skip
    dividends = other.dividends(x)

    def signed_sum(holds: Callable[[frozenset[int]], bool]) -> float:
        return sum(value for nodes, value in dividends.items() if holds(nodes))

    def exactly(visited: frozenset[int]) -> float:
        return signed_sum(lambda nodes: nodes & set(range(3)) == visited)

    a, b = visits(0, 2), visits(1, 2)
    in_a, in_b = {0, 2}, {1, 2}
    for name, formula, query, holds in (
        ("a set", a, "S", lambda v: bool(v & in_a)),
        ("not", ~a, "~S", lambda v: not v & in_a),
        ("and", a & b, "S & T", lambda v: bool(v & in_a and v & in_b)),
        ("or", a | b, "S | T", lambda v: bool(v & in_a or v & in_b)),
    ):
        yield row(
            f"SymbXAI, {name}", f"symbxai(R, {query})", f"R({query})", "signed sums",
            [methods.symbxai(R, formula)], [signed_sum(holds)],
        )  # fmt: skip
    family = [visits(i) for i in range(3)]
    ours = methods.harsanyi(R, *family)
    subsets = definitions.subsets(range(3))
    yield row(
        "Harsanyi dividends", "harsanyi(R, S, T, …)", "R.outcomes(S, T, …)", "signed sums",
        [ours.get(frozenset(family[i] for i in s), torch.zeros_like(R.scale)) for s in subsets],
        [exactly(s) for s in subsets],
    )  # fmt: skip
