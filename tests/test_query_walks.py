"""Every query against the enumeration of all walks, in fp64 to 1e-10."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support import oracle as o
from support.networks import NETWORKS, RULES, make
from support.pairs import in_pairs

import nrm

pytestmark = pytest.mark.usefixtures("captured_once")

BIAS = ["drop", "input"]


def _check(found, expected, walks):
    size = max(1.0, sum(abs(r) for _, r in walks))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-10 * size, rtol=0)


def _random_set(rng, net, names):
    """A random set of one or two variables: for nrm, and as neurons for the oracle."""
    picked, chosen = set(), []
    for name in names:
        size = len(net.values[name])
        indices = rng.choice(size, rng.integers(1, size + 1), replace=False)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[indices] = True
        picked |= {(name, int(i)) for i in indices}
        chosen.append((name, mask))
    return chosen, picked


def _as_set(R, description):
    united = None
    for name, mask in description:
        shape = R.graph.variable(name).shape[1:]
        one = nrm.mask(name, mask.view(shape))
        united = one if united is None else united | one
    return united


@in_pairs("network, rule, bias", NETWORKS, RULES, BIAS)
def test_queries_equal_the_sum_over_walks(network, rule, bias):
    case = make(network, rule, bias == "input", seed=1)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=1)
    walks = [net.walks(1) for net in case.oracles]
    rng = np.random.default_rng(0)
    net = case.oracles[0]
    names = [name for name in net.values if not name.endswith(".bias")]
    assert {v.name for v in R.graph.variables} == {*net.values, *net.leaves}

    for name in names:  # marginal of every variable, and the share of the whole of it
        size, marginal, share = len(net.values[name]), R.marginal(name), R(name)
        for sample in range(2):
            expected = o.marginal(walks[sample], name, size)
            _check(marginal[sample].flatten(), expected, walks[sample])
            _check(share[sample], expected.sum(), walks[sample])

    everything = sum(R(leaf) for leaf in net.leaves)
    for sample in range(2):  # leaves take everything
        _check(everything[sample], 1.0, walks[sample])

    for _ in range(8):  # joint, conditional and heatmaps, for sets anywhere, in any order
        descriptions = [
            _random_set(rng, net, rng.choice(names, rng.integers(1, 3), replace=False))
            for _ in range(rng.integers(1, 4))
        ]
        sets = [_as_set(R, d) for d, _ in descriptions]
        picked = [p for _, p in descriptions]
        found = R(*sets)
        conditional = R(sets[0], given=sets[1:] or None)
        heat = R.heatmap(*sets, at=net.leaves[0])
        inside = R(*sets[1:], within=sets[0])
        closed = {(n, i) for n, mask in descriptions[0][0] for i in range(len(mask))} - picked[0]
        for sample in range(2):
            w = walks[sample]
            joint = o.relevance(w, *picked)
            _check(found[sample], joint, w)
            expected = o.marginal(w, net.leaves[0], len(net.values[net.leaves[0]]), *picked)
            _check(heat[sample].flatten(), expected, w)
            allowed = [(v, r) for v, r in w if not v & closed]
            _check(inside[sample], o.relevance(allowed, *picked[1:]), w)
            known = o.relevance(w, *picked[1:]) if picked[1:] else 1.0
            if abs(known) > 1e-6:
                assert abs(float(conditional[sample]) * known - joint) < 1e-8 * max(
                    1.0, sum(abs(r) for _, r in w)
                )


@in_pairs(
    "network, rule, bias",
    NETWORKS,
    ["zero", "gamma", "plain-gamma", "zplus", "alpha2beta1"],
    BIAS,
)
def test_unnormalized_queries(network, rule, bias):
    """Eq. 26: products of unnormalised contributions and of the output itself."""
    case = make(network, rule, bias == "input", seed=2)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=0)
    net = case.oracles[0]
    leaf = net.leaves[0]
    rng = np.random.default_rng(1)
    names = [name for name in net.values if not name.endswith(".bias")]
    for _ in range(4):
        descriptions = [_random_set(rng, net, [rng.choice(names)]) for _ in range(2)]
        sets = [_as_set(R, d) for d, _ in descriptions]
        picked = [p for _, p in descriptions]
        found = R(*sets, normalized=False)
        heat = R.heatmap(*sets, at=leaf, normalized=False)
        for sample, oracle in enumerate(case.oracles):
            walks = oracle.walks(0, normalized=False)
            _check(found[sample], o.relevance(walks, *picked), walks)
            expected = o.marginal(walks, leaf, len(net.values[leaf]), *picked)
            _check(heat[sample].flatten(), expected, walks)


@pytest.mark.parametrize("bias", BIAS)
def test_joint_of_all_channel_pairs(bias):
    case = make("Concat", "gamma", bias == "input", seed=3)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=1)
    pairs = R.joint("squeeze", ":cat")
    assert pairs.shape == (2, 2, 3)
    torch.testing.assert_close(pairs, R.joint(":cat", "squeeze").transpose(1, 2))
    torch.testing.assert_close(pairs, R.joint("squeeze", ":cat", memory=1))
    for sample, oracle in enumerate(case.oracles):
        walks = oracle.walks(1)
        for a, b in itertools.product(range(2), range(3)):
            expected = o.relevance(
                walks,
                {("squeeze", 4 * a + i) for i in range(4)},
                {(":cat", 4 * b + i) for i in range(4)},
            )
            _check(pairs[sample, a, b], expected, walks)
    best = R.top("squeeze", ":cat", k=2, sample=1)
    assert best.exact
    ranked = pairs[1].flatten().sort(descending=True).values
    torch.testing.assert_close(torch.tensor([f.relevance for f in best]).double(), ranked[:2])


@pytest.mark.parametrize("bias", BIAS)
def test_biases_and_vanished_columns(bias):
    """An input of zeros: every first-layer column vanishes, and nothing may be lost."""
    case = make("Conv", "zero", bias == "input", seed=4)
    zeros = [torch.zeros_like(x) for x in case.inputs]
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*zeros, target=0)
    net = o.Oracle(bias == "input")
    case.model.describe([zeros[0][0].numpy()], net, o.zero)
    walks = net.walks(0)
    _check(R.heatmap()[0].flatten(), o.marginal(walks, "input", 50), walks)
    shares = R.biases()
    for leaf in net.leaves:
        if leaf != "input":
            expected = o.relevance(walks, {(leaf, i) for i in range(200)})
            _check(shares[leaf][0], expected, walks)
    torch.testing.assert_close(
        R.diagnostics().bias_share, sum(shares.values(), torch.zeros(2).double())
    )
