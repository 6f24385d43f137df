"""Circuits: what they keep, how small they are beside the smallest, files."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from support import steps
from support.networks import make
from test_circuits_edges import drawn, told

import nrm
from nrm.errors import InputError, QueryError

pytestmark = pytest.mark.usefixtures("captured_once")

NETWORKS = ["MLP", "Residual", "TwoInputs"]


def smallest(walks, known, edges, share, sample):
    """The size of the smallest set that keeps a share, of all sets tried."""
    taken = [
        (relevance, frozenset(steps.steps(visited, *known))) for visited, relevance in walks[sample]
    ]
    chains: dict[frozenset, float] = {}
    for relevance, chain in taken:
        chains[chain] = chains.get(chain, 0.0) + relevance
    every = sorted({step for chain in chains for step in chain})
    for size in range(len(every) + 1):
        for chosen in itertools.combinations(every, size):
            kept = sum(r for chain, r in chains.items() if chain <= set(chosen))
            if abs(1 - kept) <= 1 - share + 1e-9:
                return size
    raise AssertionError("all edges keep everything")


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("rule", ["zplus", "zero", "gamma"])
@pytest.mark.parametrize("network", NETWORKS)
def test_circuits_keep_what_they_say_and_are_as_far_from_the_smallest_as_they_say(
    network, rule, share
):
    case = make(network, rule, False, seed=6, nonnegative=True)
    R = nrm.Explainer(case.model, case.composite, bias="drop")(*case.inputs, target=1)
    walks = [net.walks(1) for net in case.oracles]
    rng = np.random.default_rng([*network.encode(), *rule.encode()])
    for layout in ("alone", "spanning"):
        sets, owner = drawn(rng, R, case.oracles[0], layout)
        sets = dict(list(sets.items())[:2])  # few edges, so that all sets of them can be tried
        owner = {neuron: name for neuron, name in owner.items() if name in sets}
        edges, known = R.edges(sets), told(R, owner)
        for sample in range(2):
            circuit = edges.circuit(share, sample=sample, work=200)
            size = max(1.0, sum(abs(r) for _, r in walks[sample]))
            kept = steps.kept(walks[sample], circuit.edges, *known)
            assert circuit.kept == pytest.approx(kept, abs=1e-10 * size)
            assert abs(1 - circuit.kept) <= 1 - share + 1e-10
            least = smallest(walks, known, edges, share, sample)
            assert least <= len(circuit)
            ends = [{R.graph.variable(x).is_leaf for x in one.layers} for one in sets.values()]
            if circuit.fewest is None:  # walks may end in a component, or go on
                assert {True, False} in ends
                assert circuit.gap is None
            else:
                assert circuit.fewest <= least
                assert circuit.gap == len(circuit) - circuit.fewest


@pytest.mark.parametrize("network", NETWORKS)
def test_gaps_are_true_where_edges_have_either_sign(network):
    """Sets may keep more than all edges do; whether all smaller ones are tried or few."""
    rng, negative, exact, known_gaps = np.random.default_rng([*network.encode()]), 0, 0, 0
    cases = [(rule, seed, bias) for rule in ("zero", "gamma") for seed in (3, 6) for bias in (0, 1)]
    for rule, seed, bias in cases:
        case = make(network, rule, bool(bias), seed=seed)
        kind = "input" if bias else "drop"
        R = nrm.Explainer(case.model, case.composite, bias=kind)(*case.inputs, target=1)
        sets, owner = drawn(rng, R, case.oracles[0], "alone")
        sets = dict(list(sets.items())[:2])
        owner = {neuron: name for neuron, name in owner.items() if name in sets}
        edges, known = R.edges(sets), told(R, owner)
        for sample, net in enumerate(case.oracles):
            walks = [net.walks(1)] if sample == 0 else [[], net.walks(1)]
            negative += bool((edges.relevance[sample] < 0).any())
            for share in (0.6, 0.95):
                least = smallest(walks, known, edges, share, sample)
                for work in (3, 10, 2000):
                    circuit = edges.circuit(share, sample=sample, work=work)
                    size = max(1.0, sum(abs(r) for _, r in walks[sample]))
                    kept = steps.kept(walks[sample], circuit.edges, *known)
                    assert circuit.kept == pytest.approx(kept, abs=1e-10 * size)
                    assert abs(1 - kept) <= 1 - share + 1e-9 * size
                    assert circuit.runs <= work
                    assert least <= len(circuit)
                    if circuit.fewest is not None:
                        known_gaps += 1
                        assert circuit.fewest <= least
                exact += circuit.gap == 0
                assert len(circuit) == least  # all could be tried
                assert circuit.gap == 0
    assert exact == 2 * 2 * len(cases)
    assert negative > len(cases) // 2
    assert known_gaps > 3 * len(cases)


def test_what_is_not_needed_is_not_in_it():
    case = make("Residual", "zplus", False, seed=6, nonnegative=True)
    R = nrm.Explainer(case.model, case.composite)(*case.inputs, target=1)
    edges = R.edges(["first", "inner", ":relu@1"])
    circuit = edges.circuit(0.6)
    for sender, receiver in circuit.edges:  # each can be reached, and goes on
        assert receiver == "output" or any(s == receiver for s, _ in circuit.edges)
        assert sender == "input" or any(r == sender for _, r in circuit.edges)
    # no single one can be left out
    for place in circuit.chosen.nonzero().tolist():
        fewer = circuit.chosen.clone()
        fewer[tuple(place)] = False
        assert abs(1 - float(edges.walks.kept(fewer).mean())) > 1 - 0.6
    assert len(edges.circuit(1.0)) >= len(circuit)
    assert circuit.runs <= 64
    assert len(edges.circuit(0.6, work=1)) >= len(circuit)


@pytest.fixture(scope="module")
def named():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    R = nrm.Explainer(model)(torch.randn(1, 4, 8).double(), target=(0, 0))
    return R.edges(nrm.components(R))


def test_files(named, tmp_path):
    circuit = named.circuit(0.8, work=20)
    circuit.save(tmp_path / "circuit.json")
    again = nrm.Circuit.load(tmp_path / "circuit.json")
    assert torch.equal(again.scores, circuit.scores)
    assert torch.equal(again.chosen, circuit.chosen)
    assert (again.kept, again.share, again.fewest) == (circuit.kept, 0.8, circuit.fewest)
    assert again.edges == circuit.edges
    assert str(again) == str(circuit)
    assert [file.name for file in tmp_path.iterdir()] == ["circuit.json"]
    for text in ("{}", "[]", "no", '{"format": "nrm circuit", "version": 99}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(InputError, match="no circuit that nrm saved"):
            nrm.Circuit.load(tmp_path / "other.json")


def test_the_score_of_an_edge_is_its_relevance_in_the_circuit_or_not(named):
    circuit = named.circuit(0.5, work=5)
    for sender in circuit.senders:
        assert circuit.score(sender, "output") == float(named(sender, "output"))
    with pytest.raises(QueryError, match=r"no sender 'a9\.h0'; there is: .*a1\.h1"):
        circuit.score("a9.h0", "output")
    with pytest.raises(QueryError, match="no receiver 'biases'; there is: output, "):
        circuit.score("m0", "biases")


def test_the_layout_that_evaluation_tools_read(named, tmp_path):
    circuit = named.circuit(0.8, work=20)
    circuit.save(tmp_path / "eap.json", layout="eap")
    found = json.loads((tmp_path / "eap.json").read_text())
    assert found["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False}
    nodes = ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits"]
    assert list(found["nodes"]) == nodes
    legal = set()  # as EAP-IG makes them
    for place, receiver in enumerate(nodes):
        for sender in nodes[:place]:
            if receiver.startswith("a") and sender[:2] == receiver[:2]:
                continue  # heads of one layer
            slots = ("<q>", "<k>", "<v>") if receiver.startswith("a") else ("",)
            legal |= {f"{sender}->{receiver}{slot}" for slot in slots}
    assert set(found["edges"]) <= legal
    assert found["edges"]["m0->logits"]["score"] == pytest.approx(float(named("m0", "output")))
    start = float(named("embed", "output") + named("biases", "output"))
    assert found["edges"]["input->logits"]["score"] == pytest.approx(start)
    for sender, receiver in circuit.edges:
        sender = "input" if sender in ("embed", "biases") else sender
        receiver = "logits" if receiver == "output" else receiver
        slot = "<v>" if receiver.startswith("a") else ""
        assert found["edges"][f"{sender}->{receiver}{slot}"]["in_graph"]
        assert found["nodes"][sender]["in_graph"]
    with pytest.raises(QueryError, match="the layout is one of"):
        circuit.save(tmp_path / "x.json", layout="other")


def test_leaves_with_any_name_are_inputs_in_that_layout(tmp_path):
    names = ("a0.h0", "transformer.h.0.attn:masked_fill@1.fill")
    scores = torch.tensor([[0.5, 0.25], [0.0, 0.5]])
    found = nrm.Circuit(("output", "a0.h0"), names, scores, scores != 0, 1.0, 0.9, None)
    found.save(tmp_path / "eap.json", layout="eap")
    assert set(json.loads((tmp_path / "eap.json").read_text())["nodes"]) == {
        "input", "a0.h0", "m0", "logits"
    }  # fmt: skip
    split = nrm.Circuit(("output",), ("a0.h0@1",), scores[:1, :1], scores[:1, :1] > 0, 1, 0.9, None)
    with pytest.raises(QueryError, match=r"whole heads and MLPs, and not 'a0\.h0@1'"):
        split.save(tmp_path / "eap.json", layout="eap")


def test_what_makes_no_circuit_is_refused(named):
    for share in (0, -0.5, 1.5):
        with pytest.raises(QueryError, match="a share is above 0"):
            named.circuit(share)
    with pytest.raises(QueryError, match="positive number of sets"):
        named.circuit(0.9, work=0)
    with pytest.raises(QueryError, match="no sample 3"):
        named.circuit(0.9, sample=3)
