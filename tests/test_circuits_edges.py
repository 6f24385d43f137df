"""Direct edges and what circuits keep, against the enumeration of all walks; and the laws."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from support import steps
from support.networks import NETWORKS, RULES, make
from support.pairs import in_pairs
from torch import Tensor, nn

import nrm
from nrm.errors import NeuronSetError, QueryError, UnknownLayerError

pytestmark = pytest.mark.usefixtures("captured_once")

LAYOUTS = ["alone", "shared", "spanning", "returning"]


def drawn(rng, R, net, layout):
    """Random components: for nrm, and the component of every neuron for the oracle.

    Each has neurons of a variable of its own (`alone`), some share one (`shared`), each has neurons
    of several (`spanning`); or they have neurons of the same variables, so that walks go to and
    fro (`returning`).
    """
    names = [name for name in net.values if not name.endswith(".bias")]
    masks: dict[str, dict[str, np.ndarray]] = {}
    owner: dict[tuple[str, int], str] = {}
    count = {"alone": 3, "shared": 2, "spanning": 4, "returning": len(names)}[layout]
    variables = [str(name) for name in rng.permutation(names)[:count]]
    for place, variable in enumerate(variables):
        size = len(net.values[variable])
        who = {
            "alone": np.where(rng.random(size) < 0.7, place, -1),
            "shared": rng.integers(-1, 3, size) + 3 * place * (rng.random() < 0.5),
            "spanning": np.where(rng.random(size) < 0.7, place // 2, -1),
            "returning": rng.integers(-1, 2, size),
        }[layout]
        for neuron, number in enumerate(who):
            if number >= 0:
                owner[variable, neuron] = f"c{number}"
                mask = masks.setdefault(f"c{number}", {})
                mask.setdefault(variable, np.zeros(size, dtype=bool))[neuron] = True
    if not owner:
        return drawn(rng, R, net, layout)
    sets = {}
    for name, lies in masks.items():
        united = None
        for variable, mask in lies.items():
            shape = R.graph.variable(variable).shape[1:]
            one = nrm.mask(variable, torch.from_numpy(mask).view(shape))
            united = one if united is None else united | one
        sets[name] = united
    return sets, owner


def told(R, owner):
    """What the oracle needs to know of the graph: the order of variables, the names of leaves."""
    order = {v.name: v.index for v in R.graph.variables}
    components = set(owner.values())
    leaves = {}
    for v in R.graph.leaves:
        name = "biases" if v.kind == "bias" else v.name
        leaves[v.name] = f"{name} (the rest)" if name in components else name
    return order, owner, leaves


def near(found, expected, walks):
    size = max(1.0, sum(abs(r) for _, r in walks))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-10 * size, rtol=0)


@in_pairs("network, rule, bias, layout", NETWORKS, RULES, ["drop", "input"], LAYOUTS)
def test_edges_equal_the_steps_of_all_walks(network, rule, bias, layout):
    case = make(network, rule, bias == "input", seed=1)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=1)
    walks = [net.walks(1) for net in case.oracles]
    rng = np.random.default_rng([*network.encode(), *layout.encode()])
    for _ in range(4):
        sets, owner = drawn(rng, R, case.oracles[0], layout)
        edges = R.edges(sets, memory=int(rng.choice([1, 2**28])))
        known = told(R, owner)
        for sample in range(2):
            expected = steps.edges_of(walks[sample], *known)
            assert {s for s, _ in expected} <= set(edges.senders)
            table = np.array(
                [[expected.pop((s, r), 0.0) for s in edges.senders] for r in edges.receivers]
            )
            assert not expected
            near(edges.relevance[sample], table, walks[sample])
            ended = {"c": 0.0}
            del ended
        # any set of edges keeps what it keeps
        chosen = torch.from_numpy(rng.random(edges.relevance.shape[1:]) < 0.7)
        allowed = {
            (edges.senders[j], edges.receivers[i]) for i, j in chosen.nonzero().tolist()
        }
        found = edges.walks.kept(chosen)
        for sample in range(2):
            near(found[sample], steps.kept(walks[sample], allowed, *known), walks[sample])
        near(edges.walks.kept(torch.ones_like(chosen)), np.ones(2), walks[0])
