"""The search with conditions whose sets lie anywhere, against listing all walks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from support.formulas import random_formula, random_set, those
from support.listed import ORDERS, chains, explained, listed
from support.networks import NETWORKS, make
from support.pairs import in_pairs
from torch import nn

import nrm
from nrm import rules
from nrm.composites import Everywhere

pytestmark = pytest.mark.usefixtures("captured_once")


def asked(rng, R, net, several):
    """A random formula over sets of one layer each or of two; and on which walks it holds."""
    most = 3 if several else 2
    pairs = [random_set(rng, R, net, int(rng.integers(1, most))) for _ in range(3)]
    formula, holds = random_formula(rng, [one for one, _ in pairs])
    return formula, lambda walks: those(walks, [picked for _, picked in pairs], holds)


@in_pairs(
    "network, rule, bias, by, seed",
    NETWORKS,
    ["zero", "gamma", "plain-gamma", "zplus", "alpha2beta1", "flat"],
    ["drop", "input"],
    ["neuron", "channel"],
    [0, 1],
)
def test_formulas_over_sets_anywhere(network, rule, bias, by, seed):
    """Above the layers, between and below them, in them and beside them; in every order."""
    R, walks = explained(network, rule, bias)
    net = make(network, rule, bias == "input", seed=3).oracles[1]
    rng = np.random.default_rng(seed)
    size = max(1.0, sum(abs(relevance) for _, relevance in walks))
    for order, layers in zip(itertools.cycle(ORDERS), chains(R, 3)):
        formula, on = asked(rng, R, net, several=seed == 1)
        everything = listed(R, on(walks), layers, by)
        flows = R.top(*layers, nrm.Condition(formula), k=6, by=by, order=order, sample=1)
        assert flows.exact
        best = sorted(everything.values(), key=ORDERS[order], reverse=True)[:6]
        whole = sum(everything.values())
        assert [f.relevance for f in flows] == pytest.approx(best, abs=1e-10 * size)
        for flow in flows:
            mine = everything[tuple(flow.parts[name] for name in layers)]
            assert flow.relevance == pytest.approx(mine, abs=1e-10 * size)
            if abs(whole) > 1e-3:
                assert flow.share * whole == pytest.approx(flow.relevance, abs=1e-9 * size)
        one = R(*flows[0].sets, formula)[1]
        assert float(one) == pytest.approx(flows[0].relevance, abs=1e-10 * size)


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("network", ["MLP", "Residual", "Conv"])
def test_given_a_formula_all_is_divided_by_its_relevance(network, bias):
    R, walks = explained(network, "zero", bias)
    net = make(network, "zero", bias == "input", seed=3).oracles[1]
    rng = np.random.default_rng(11)
    for layers in chains(R, 2):
        for _ in range(4):
            formula, on = asked(rng, R, net, several=True)
            known = sum(relevance for _, relevance in on(walks))
            if abs(known) < 1e-3:
                continue
            values = {k: v / known for k, v in listed(R, on(walks), layers, "neuron").items()}
            flows = R.top(*layers, given=formula, k=4, by="neuron", sample=1)
            best = sorted(values.values(), reverse=True)[:4]
            assert [f.relevance for f in flows] == pytest.approx(best, abs=1e-8)
            assert flows.gap == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("work", [1, 2, 4])
@pytest.mark.parametrize("network", ["MLP", "Residual"])
def test_a_search_that_stops_says_the_gap(network, work, order):
    """Nothing that is not listed goes beyond the last one listed by more than the gap."""
    R, walks = explained(network, "zero", "input")
    net = make(network, "zero", True, seed=3).oracles[1]
    rng = np.random.default_rng(5)
    key = ORDERS[order]
    for layers in chains(R, 3)[-3:]:
        formula, on = asked(rng, R, net, several=True)
        everything = listed(R, on(walks), layers, "neuron")
        told = []
        flows = R.top(
            *layers, nrm.Condition(formula), k=2, by="neuron", order=order, sample=1, work=work,
            progress=told.append,
        )  # fmt: skip
        kept = {tuple(flow.parts[name] for name in layers) for flow in flows}
        worst = min(key(flow.relevance) for flow in flows)
        for parts, value in everything.items():
            if parts not in kept:
                assert key(value) <= worst + flows.gap + 1e-9
        assert told[-1] == flows.gap


def test_a_greedy_search_knows_what_is_still_open():
    """The best part of the first layer is the best jointly with a set that lies below it."""
    R, _ = explained("MLP", "zero", "drop")
    below = nrm.neurons("input", 0)
    greedy = R.top("layers.2", "layers.0", nrm.Condition(below), k=1, by="neuron", method="greedy")
    upper = R.marginal("layers.2", below)[0]
    best = int(upper.argmax())
    lower = R.marginal("layers.0", nrm.neurons("layers.2", best), below)[0]
    assert greedy[0].parts == {"layers.2": best, "layers.0": int(lower.argmax())}
    assert greedy[0].relevance == pytest.approx(float(lower.max()))


# -- convolutions, whose pairs of channels are found at once ---------------------------------------


class Tower(nn.Module):
    """Convolutions, over one of which there is a skip connection."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.c, self.d = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.act, self.head = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        x = self.act(self.b(self.act(self.a(x))))
        x = self.act(self.d(self.act(self.c(x)) + x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(1)
    model = Tower().double().eval()
    for layer in (model.a, model.b, model.c, model.d):
        nn.init.constant_(layer.bias, 0.2)  # no channel is silent
    return model, torch.randn(1, 2, 6, 6).double()


PATCH, CORNER = nrm.patch("input", slice(1, 4), slice(2, 6)), nrm.patch("b", slice(0, 3), slice(3))
SELECTIONS = {
    "a patch below": PATCH,
    "no patch below": ~PATCH,
    "between": nrm.channels("c", 1, 4),
    "not between": ~nrm.channels("c", 1, 4),
    "beside a skip or below": nrm.channels("c", 0, 1) | PATCH,
    "in a column": nrm.channels("b", 0, 2, 3),
    "a place in a column": CORNER & PATCH,
    "above or below": nrm.channels(":relu_3", 1) | PATCH,
    "one of two": nrm.channels("c", 2) ^ CORNER,
    "everywhere": (nrm.channels("d", 0, 1) | ~CORNER) & ~nrm.patch("a", slice(0, 2), slice(0, 6)),
}


@pytest.mark.parametrize("rule", [rules.Zero(), rules.Gamma(0.25), rules.Occlusion()], ids=repr)
@pytest.mark.parametrize("chosen", SELECTIONS)
def test_channels_of_convolutions(tower, rule, chosen):
    """Every combination asked by itself: `R(channel, channel, channel, selection)`."""
    model, x = tower
    R = nrm.Explainer(model, Everywhere(rule))(x, target=1)
    layers = ["a", "b", "d"]
    formula = SELECTIONS[chosen]
    if chosen == "above or below":
        name = [v.name for v in R.graph.variables if v.producer and v.producer.kind == "activation"]
        formula = nrm.channels(name[-1], 1) | PATCH
    sizes = [R.channels(layer).shape[1] for layer in layers]
    every = list(itertools.product(*map(range, sizes)))
    sets = [
        nrm.channels("a", i) & nrm.channels("b", j) & nrm.channels("d", k) & formula
        for i, j, k in every
    ]
    values = torch.cat([R.relevances(*sets[k : k + 30])[:, 0] for k in range(0, len(sets), 30)])
    right = dict(zip(every, values.tolist(), strict=True))
    size = max(1.0, float(values.abs().sum()))
    for order, key in ORDERS.items():
        flows = R.top(*layers, nrm.Condition(formula), k=5, order=order)
        best = sorted(right.values(), key=key, reverse=True)[:5]
        assert flows.gap == 0
        assert [f.relevance for f in flows] == pytest.approx(best, abs=1e-10 * size)
        for flow in flows:
            assert right[tuple(flow.parts.values())] == pytest.approx(
                flow.relevance, abs=1e-10 * size
            )
    assert math.isclose(
        sum(f.share for f in R.top(*layers, nrm.Condition(formula), k=len(every))), 1, rel_tol=1e-6
    )


def test_bounds_spare_work_with_a_patch_below(tower):
    """As they do without: fewer beginnings are followed than there are."""
    model, x = tower
    R = nrm.Explainer(model, Everywhere(rules.Gamma(0.25)))(x, target=1)
    layers = ["input", "a", "b", "d"]
    flows = R.top(*layers, nrm.Condition(nrm.patch("input", slice(0, 4), slice(0, 4))), k=1)
    beginnings = 1 + 4 + 4 * 6
    assert flows.exact
    assert flows.expanded < beginnings


def test_what_never_holds_has_no_relevance(tower):
    """Two channels of one layer are visited by no walk."""
    model, x = tower
    R = nrm.Explainer(model, Everywhere(rules.Zero()))(x, target=1)
    both = nrm.channels("a", 0) & nrm.channels("a", 1)
    flows = R.top("b", "d", nrm.Condition(both), k=3)
    assert [f.relevance for f in flows] == [0, 0, 0]
    assert flows.exact
