"""Random small networks, composites and queries against an oracle (`tests/fuzzing.py`).

Each seed is a test; what fails prints its seed, its network and the query. `NRM_FUZZ_SEED` sets
the first seed, `NRM_FUZZ_COUNT` how many; `python tests/fuzzing.py` runs for hours and makes what
fails small.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from support import oracle as o
from support.fuzz.cases import Case, Explained, compare
from support.fuzz.flows import Flows
from support.fuzz.networks import BATCH
from support.fuzz.queries import Asked
from support.networks import NETWORKS, make

import nrm

FIRST = int(os.environ.get("NRM_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("NRM_FUZZ_COUNT", "20"))
LISTED = 1500
"""So many walks are listed one by one."""


@pytest.mark.filterwarnings("ignore::nrm.RelevanceWarning")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_every_answer_is_that_of_the_oracle(seed):
    case = Case.drawn(seed)
    found = list(case.findings())
    assert not found, "\n".join([str(case), *map(str, found)])


def test_seeds_are_asked_and_not_passed_over():
    """Of the seeds of this run, few are left out because rounding decides what is right."""
    seeds = range(FIRST, FIRST + COUNT)
    left_out = [seed for seed in seeds if Case.drawn(seed).flows() is None]
    assert len(left_out) <= max(1, COUNT // 4)


@pytest.mark.parametrize("bias", [False, True], ids=["drop", "input"])
@pytest.mark.parametrize("network", NETWORKS)
def test_flows_are_the_sums_over_listed_walks(network, bias):
    """The second oracle against the first, on networks that are written out by hand."""
    net = make(network, "alpha2beta1", bias, seed=3).oracles[0]
    _compare(net, np.random.default_rng(0))


def test_flows_are_the_sums_over_listed_walks_of_random_networks():
    compared = 0
    for seed in range(FIRST, FIRST + 25):
        case = Case.drawn(seed)
        net = case.walks.describe(case.network, 0)
        if _count(net) <= LISTED:
            _compare(net, np.random.default_rng(seed))
            compared += 1
    assert compared >= 5


def test_what_is_wrong_is_found():
    """Answers that are off by little are findings, at every query."""
    case = next(c for c in map(Case.drawn, range(FIRST, FIRST + COUNT)) if c.flows())
    target = 0
    known = case.flows(Explained([target] * BATCH))
    assert known is not None
    flows, raw = known
    model, inputs = case.network.model(), case.network.inputs
    explainer = nrm.Explainer(model, case.walks.composite, bias=case.walks.bias)
    R = explainer(**inputs, target=target)
    asked = Asked(R, case.network, flows, raw, 1e-9, np.random.default_rng(0))
    assert not list(compare(asked, "as it is", 1))
    wrong = [Flows(flow.net, target) for flow in flows]
    for flow in wrong:
        for columns in flow.matrices.values():
            for matrix in columns.values():
                matrix *= 1 + 1e-6
    asked = Asked(R, case.network, wrong, raw, 1e-9, np.random.default_rng(0))
    assert len(list(compare(asked, "a little off", 1))) > 10


def _count(net: o.Oracle) -> int:
    """How many walks there are, from all outputs."""
    flows = Flows(net, 0)
    ways = {name: np.ones(size) for name, size in flows.sizes.items()}
    for name in reversed(flows.order):
        if name in flows.matrices:
            ways[name] = sum((m != 0).T @ ways[p] for p, m in flows.matrices[name].items())
    return int(ways[net.output].sum())


def _compare(net: o.Oracle, rng: np.random.Generator) -> None:
    for normalized in (True, False):
        walks = net.walks(1, normalized)
        flows = Flows(net, 1, normalized)
        size = max(1.0, sum(abs(r) for _, r in walks))
        np.testing.assert_allclose(flows.variation, sum(abs(r) for _, r in walks))
        for _ in range(3):
            events, picked = [], []
            for _ in range(int(rng.integers(1, 4))):
                name = str(rng.choice(flows.order))
                mask = rng.random(flows.sizes[name]) < 0.6
                events.append({name: mask})
                picked.append({(name, int(i)) for i in np.flatnonzero(mask)})
            asked = flows.asked(events)
            close = {"atol": 1e-10 * size, "rtol": 0}
            np.testing.assert_allclose(asked.relevance(), o.relevance(walks, *picked), **close)
            avoids = sum(r for visited, r in walks if not visited & picked[0])
            np.testing.assert_allclose(asked.relevance(lambda h: not h[0]), avoids, **close)
            every = asked.marginals()
            for name in flows.order:
                expected = o.marginal(walks, name, flows.sizes[name], *picked)
                np.testing.assert_allclose(every[name], expected, **close)
            weighed = str(rng.choice(flows.order))
            weights = {weighed: rng.normal(size=flows.sizes[weighed])}
            product = sum(
                r * np.prod([weights[n][i] for n, i in visited if n == weighed])
                for visited, r in walks
            )
            found = flows.asked(weights=weights).relevance()
            np.testing.assert_allclose(found, product, atol=1e-9 * size, rtol=0)
            if normalized:
                name = str(rng.choice(flows.order))
                below = _from(name, net)
                np.testing.assert_allclose(
                    asked.conditionals()[name][0],
                    o.relevance(below, *picked),
                    atol=1e-10 * max(1.0, sum(abs(r) for _, r in below)),
                    rtol=0,
                )


def _from(name: str, net: o.Oracle) -> list[tuple[frozenset[o.Neuron], float]]:
    """All walks from the first neuron of a variable on, of relevance one there."""
    output, net.output = net.output, name
    walks = net.walks(0)
    net.output = output
    return walks
