"""The bounds of the search: as tight as they can be shown to be, and how much they spare."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.matrices import Dense
from torch import nn

import nrm
from nrm import rules
from nrm.between import Between, Course
from nrm.bounds import arrivals, intervals
from nrm.composites import Everywhere
from nrm.engine import Absolute
from nrm.joint import partition

RULES = [rules.Zero(), rules.Gamma(0.25), rules.AlphaBeta(2.0, 1.0), rules.ZPlus()]
ORDERS = {"largest": lambda r: r, "smallest": lambda r: -r, "absolute": abs}


def waves(model):
    """Weights of both signs, all different, without a random number."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            phase = torch.arange(parameter.numel(), dtype=torch.float64) * 2.3 + number
            parameter.copy_((phase.sin() + 0.2).view_as(parameter))
    return model.double().eval()


def layered(rule):
    sizes = [(4, 5), (5, 6), (6, 4), (4, 2)]
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), nn.Tanh())]
    x = torch.tensor([[0.3, -0.8, 1.1, 0.5]]).double()
    return nrm.Explainer(waves(nn.Sequential(*layers[:-1])), Everywhere(rule))(x, target=0)


LAYERS = ["5", "3", "1", "input"]
PAIRED = {"5": [[0, 1], [2, 3]], "3": [[0, 1, 2], [3, 4, 5]], "1": [[0, 4], [1, 2, 3]]}
PAIRED["input"] = [[0, 3], [1, 2]]
"""Neurons of each layer in two parts."""


def found_intervals(R, parts):
    """The intervals of the layers, as the search has them."""
    forward, layers = R.forward_pass, [R.graph.variable(layer) for layer in LAYERS]
    ways = [Between(R.graph, upper, lower) for upper, lower in itertools.pairwise(layers)]
    way = Course(R.marginal(LAYERS[0]).unsqueeze(0), ways, [None] * len(layers))
    sizes = Absolute(forward)
    arriving = arrivals(forward, sizes, parts, way)
    return intervals(forward, sizes, parts, way, arriving, 2**20)


def continuations(dense, parts, depth):
    """`[neurons, combinations]`: the relevance from each neuron on, through parts of all layers
    below, by listing them."""
    layer = dense.graph.variable(LAYERS[depth])
    if depth == len(LAYERS) - 1:
        return torch.ones(dense.forward.shape(layer).numel(), 1).double()
    onward = continuations(dense, parts, depth + 1)
    step = dense.between(layer, dense.graph.variable(LAYERS[depth + 1]))
    return torch.cat([step[:, part] @ onward[part] for part in parts[depth + 1]], 1)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_of_neurons_they_are_the_best_continuations(rule):
    R = layered(rule)
    dense, absolute, forward = Dense(R), Dense(R, absolute=True), R.forward_pass
    coming = R.marginal(LAYERS[0]).flatten().abs()
    single = [[[n] for n in range(R.marginal(layer).numel())] for layer in LAYERS]
    found = found_intervals(R, [partition(layer, "neuron", forward) for layer in LAYERS])
    for depth, interval in enumerate(found):
        ways = continuations(dense, single, depth)
        ends = map(R.graph.variable, (LAYERS[0], LAYERS[depth]))
        reached = coming @ absolute.between(*ends) > 0  # no flow comes to the others
        for bound, best in ((interval.low, ways.amin(1)), (interval.high, ways.amax(1))):
            best = best.clamp(max=0) if bound is interval.low else best.clamp(min=0)
            torch.testing.assert_close(bound[0, 0, reached], best[reached])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_of_sets_they_are_those_of_total_and_absolute_relevance(rule):
    """`(t - v) / 2` and `(t + v) / 2`, and no combination of parts goes beyond them."""
    R = layered(rule)
    dense, absolute = Dense(R), Dense(R, absolute=True)
    sets = [[nrm.neurons(layer, *some) for some in PAIRED[layer]] for layer in LAYERS]
    parts = [partition(some, "channel", R.forward_pass) for some in sets]
    found = found_intervals(R, parts)
    low, high = torch.zeros(4).double(), torch.ones(4).double()
    for depth in range(len(LAYERS) - 1, -1, -1):
        if depth < len(LAYERS) - 1:
            ends = map(R.graph.variable, LAYERS[depth : depth + 2])
            upper, lower = ends
            total = dense.between(upper, lower) @ (high + low)
            size = absolute.between(upper, lower) @ (high - low)
            low, high = ((total - size) / 2).clamp(max=0), ((total + size) / 2).clamp(min=0)
        torch.testing.assert_close(found[depth].low[0, 0], low)
        torch.testing.assert_close(found[depth].high[0, 0], high)
        ways = continuations(dense, [PAIRED[layer] for layer in LAYERS], depth)
        assert bool((ways.amin(1) >= low - 1e-12).all())
        assert bool((ways.amax(1) <= high + 1e-12).all())


class Tower(nn.Module):
    """Convolutions with activations between them, the channels of each ever weaker."""

    def __init__(self):
        super().__init__()
        sizes = itertools.pairwise([2, 6, 7, 6, 5])
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


def tower(rule):
    model = waves(Tower())
    with torch.no_grad():
        for conv in model.convs:
            conv.weight *= 0.6 ** torch.arange(len(conv.weight))[:, None, None, None]
    x = (torch.arange(2 * 25) * 1.7).cos().view(1, 2, 5, 5).double()
    return nrm.Explainer(model, Everywhere(rule))(x, target=0)


CHAINS = {
    "contracted": ["convs.0", "convs.1", "convs.2", "convs.3"],  # one convolution between each two
    "by messages": ["convs.3", "convs.1", "input"],  # two
}
FOLLOWED = {
    "Zero": {
        "contracted": [(16, 120), (25, 246), (16, 120)],
        "by messages": [(17, 22), (17, 22), (11, 10)],
    },
    "Gamma": {
        "contracted": [(14, 84), (26, 258), (15, 84)],
        "by messages": [(22, 32), (32, 52), (22, 32)],
    },
    "AlphaBeta": {
        "contracted": [(18, 120), (22, 228), (21, 132)],
        "by messages": [(20, 28), (29, 46), (20, 28)],
    },
}
"""The beginnings followed and the combinations evaluated, of 1260 and of 70, in each order."""


@pytest.mark.parametrize("way", CHAINS)
@pytest.mark.parametrize("rule", RULES[:3], ids=repr)
def test_how_much_they_spare(rule, way):
    """As much as they did: were a bound looser, more beginnings would be followed."""
    R, layers = tower(rule), CHAINS[way]
    table = R.joint(*layers)[0].flatten()
    for order, expected in zip(ORDERS, FOLLOWED[type(rule).__name__][way], strict=True):
        flows = R.top(*layers, k=3, order=order)
        best = sorted(table.tolist(), key=ORDERS[order], reverse=True)[:3]
        assert flows.exact
        assert [flow.relevance for flow in flows] == pytest.approx(best, abs=1e-12)
        assert (flows.expanded, round(flows.visited * len(table))) == expected
