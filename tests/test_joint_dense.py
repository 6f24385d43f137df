"""Joint relevance of parts of layers against dense matrices: values, not totals."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from support.matrices import Dense
from support.networks import NETWORKS, make
from torch import nn

import nrm
from nrm import rules
from nrm.composites import Everywhere

pytestmark = pytest.mark.usefixtures("captured_once")


def numbered(dense, variable, by):
    """The part of each of a variable's elements, over all samples, and how many parts there are.

    The part of the first sample's first, second, ...; those of the next sample follow.
    """
    places = dense.places(variable)
    neurons = sorted({neuron for _, neuron in places})
    if by == "neuron":
        parts = {neuron: number for number, neuron in enumerate(neurons)}
    else:
        axis = by if isinstance(by, int) else variable.channel_axis or 0
        parts = {neuron: neuron[axis] for neuron in neurons}
    size = max(parts.values()) + 1
    return [sample * size + parts[neuron] for sample, neuron in places], size


def expected_joint(dense, layers, by):
    """`[batch, parts of the first layer, ...]`, in the order of `layers`, from the output down."""
    table, sizes = dense.joint(*layers), []
    for axis, layer in enumerate(layers):
        parts, size = numbered(dense, layer, by)
        table = dense.by_part(table, axis, parts)
        sizes.append(size)
    batch = dense.R.batch
    table = table.view([n for size in sizes for n in (batch, size)])
    samples = [table[tuple(x for _ in sizes for x in (k, slice(None)))] for k in range(batch)]
    return torch.stack(samples)


def agree(found, expected):
    size = max(1.0, float(expected.abs().sum()))
    torch.testing.assert_close(found, expected, atol=1e-10 * size, rtol=0)


@pytest.mark.parametrize(
    ("network", "rule", "bias"),
    [
        (network, rule, ("drop", "input")[(row + column) % 2])
        for row, network in enumerate(NETWORKS)
        for column, rule in enumerate(["zero", "gamma", "alpha2beta1", "flat"])
    ],
)
def test_pairs_and_triples(network, rule, bias):
    case = make(network, rule, bias == "input", seed=6)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=1)
    dense = Dense(R)
    small = [v for v in R.graph.variables if R.forward_pass.shape(v).numel() <= 60]
    chains = [
        chain
        for size in (2, 3)
        for chain in itertools.combinations(small[::-1], size)
        if all(b in R.graph.upstream(a) for a, b in itertools.pairwise(chain))
    ]
    for chain in chains[:: max(1, len(chains) // 5)]:
        names = [v.name for v in chain]
        for by in ("neuron", "channel"):
            if by == "channel" and any(not v.neuron_sizes for v in chain):
                continue
            expected = expected_joint(dense, chain, by)
            for method in ("auto", "backward", "forward"):
                agree(R.joint(*names, by=by, method=method), expected)


class Convolved(nn.Module):
    """A convolution with pooling and concatenation on both of its sides."""

    def __init__(self):
        super().__init__()
        self.start, self.lower = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 2)
        self.upper, self.head = nn.Conv2d(4, 3, 2, padding=1), nn.Linear(12, 3)

    def forward(self, x):
        below = torch.cat([torch.relu(self.start(x))[:, 1:, 1:, 1:], self.lower(x)], 1)
        above = torch.relu(self.upper(nn.functional.avg_pool2d(below, 2)))
        return self.head(nn.functional.max_pool2d(above, 2, 1).flatten(1))


@cache
def convolved():
    torch.manual_seed(3)
    return Convolved().double().eval(), torch.randn(2, 2, 5, 5).double()


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize(
    "rule", [rules.Zero(), rules.Gamma(0.25), rules.AlphaBeta(2.0, 1.0), rules.Flat()], ids=repr
)
def test_contractions(rule, bias):
    model, x = convolved()
    R = nrm.Explainer(model, Everywhere(rule), bias=bias)(x, target=2)
    dense, contracted = Dense(R), 0
    upper = R.graph.variable("upper")
    pooled = next(v for v in R.graph.variables if v.name == ":max_pool2d")
    below = [R.graph.variable(name) for name in ("start", "lower", ":cat", ":avg_pool2d")]
    for above, lower in itertools.product((pooled, upper), below):
        contracted += R.joint_method(above.name, lower.name) == "contraction"
        expected = expected_joint(dense, (above, lower), "channel")
        agree(R.joint(above.name, lower.name), expected)
    assert contracted >= 4


class Sequenced(nn.Module):
    """Positions first, then the batch, then channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(6, 2)

    def forward(self, x):
        h = self.b(torch.relu(self.a(x)))
        return self.head(torch.tanh(h).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("rule", [rules.Zero(), rules.Gamma(0.25)], ids=repr)
def test_a_batch_in_the_middle(rule):
    torch.manual_seed(1)
    explainer = nrm.Explainer(Sequenced().double().eval(), Everywhere(rule), batch_axis=1)
    R = explainer(torch.randn(3, 2, 3).double(), target=0)
    dense = Dense(R)
    layers = [R.graph.variable(name) for name in ("b", "a", "input")]
    assert all(layer.batch_axis == 1 for layer in layers)
    for by in ("neuron", "channel", 0, 1):
        agree(R.joint("b", "a", by=by), expected_joint(dense, layers[:2], by))
        agree(R.joint("b", "a", "input", by=by), expected_joint(dense, layers, by))


def test_sets_and_conditions():
    """Sums over some neurons, which a set above all layers holds jointly."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    R = nrm.Explainer(model.double().eval(), rules.Gamma(0.25), bias="input")(
        torch.randn(1, 4).double(), target=1
    )
    dense = Dense(R)
    table = dense.joint(*map(R.graph.variable, ("3", "1", "input")))
    upper = [nrm.neurons("1", 0, 2), nrm.neurons("1", 2, 3, 4)]  # they overlap
    lower = [nrm.neurons("input", 3), nrm.neurons("input", 0, 1)]
    found = R.joint(upper, lower, nrm.neurons("3", 1, 3))[0]
    for (i, some), (j, others) in itertools.product(
        enumerate([[0, 2], [2, 3, 4]]), enumerate([[3], [0, 1]])
    ):
        expected = table[[1, 3]][:, some][:, :, others].sum()
        torch.testing.assert_close(found[i, j], expected)
