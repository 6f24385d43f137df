"""Flows through layers, by listing all walks of an oracle, and what a search has to find."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch

import nrm
from nrm.sets import resolve
from support.networks import make

ORDERS: dict[str, Callable[[float], float]] = {
    "largest": lambda r: r, "smallest": lambda r: -r, "absolute": abs,
}  # fmt: skip


@cache
def explained(network, rule, bias):
    case = make(network, rule, bias == "input", seed=3)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=1)
    return R, case.oracles[1].walks(1)


def chains(R, most):
    """Some chains of layers, each upstream of the one before, and not always in that order."""
    names = [v for v in R.graph.variables if not v.name.endswith("bias")]
    found = []
    for size in range(1, most + 1):
        together = [
            chain
            for chain in itertools.combinations(names, size)
            if all(a in R.graph.upstream(b) for a, b in itertools.pairwise(chain))
        ]
        step = max(1, len(together) // 3)
        found += [[v.name for v in chain] for chain in together[::step]]
    return [chain[::-1] if len(chain) == 2 else chain for chain in found]


def numbers(R, layer, by):
    """For every neuron of a layer, as the oracle counts them, the part it belongs to."""
    (shape,) = {R.marginal(layer).shape[1:]}
    if by == "neuron":
        return list(range(shape.numel()))
    count = R.channels(layer).shape[1]
    parts = torch.full((shape.numel(),), -1)
    for part in range(count):
        (mask,) = resolve(nrm.channels(layer, part), R.forward_pass).values()
        inside = torch.ones(()) if mask is None else mask
        parts[inside.expand(1, 1, *shape).flatten().bool()] = part
    return parts.tolist()


def listed(R, walks, layers, by):
    """The relevance of every combination, from all walks."""
    of = {layer: numbers(R, layer, by) for layer in layers}
    found = dict.fromkeys(itertools.product(*(range(max(of[layer]) + 1) for layer in layers)), 0.0)
    for visited, relevance in walks:
        at = {name: i for name, i in visited if name in of}
        if len(at) == len(layers):
            found[tuple(of[layer][at[layer]] for layer in layers)] += relevance
    return found


def as_set(R, layer, part, by):
    if by == "channel":
        return nrm.channels(layer, part)
    place = torch.unravel_index(torch.tensor(part), R.graph.variable(layer).shape[1:])
    return nrm.neurons(layer, tuple(int(index) for index in place))


def check(R, flows, everything, order, by, k, size):
    names = list(flows[0].parts)
    best = sorted(everything.values(), key=ORDERS[order], reverse=True)[:k]
    assert flows.exact
    assert len(flows) == len(best)
    for flow, relevance in zip(flows, best, strict=True):  # ties: the values, whichever walk
        assert flow.relevance == pytest.approx(relevance, abs=1e-10 * size)
        mine = everything[tuple(flow.parts[name] for name in names)]
        assert flow.relevance == pytest.approx(mine, abs=1e-10 * size)
        assert flow.sets == tuple(as_set(R, *part, by) for part in flow.parts.items())
    assert len({tuple(flow.parts.values()) for flow in flows}) == len(flows)
    assert float(R(*flows[0].sets)[1]) == pytest.approx(flows[0].relevance, abs=1e-10 * size)
