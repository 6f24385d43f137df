"""`mutag`: GNN-LRP's relevances of the pretrained network, and the experiment."""

from __future__ import annotations

import csv

import pytest
import torch
from support.gnn_lrp import of_model

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from nrm import graph_networks as gn
from nrm_reproduce import mutag
from nrm_reproduce.data import load_molecules
from nrm_reproduce.mutag import TABLE, enumerated_subgraph, gammas, make_explainer, parts
from nrm_reproduce.networks import load_gin
from nrm_reproduce.report import PAGE, RESULT


@pytest.fixture(scope="module")
def network(shared):
    return load_gin(shared / "graphs")[0]


@pytest.fixture(scope="module")
def molecules(shared):
    return load_molecules(shared / "graphs")


def test_gammas_fall_from_three_to_zero(network):
    assert gammas(len(network.blocks)) == [3, 1.5, 0]


@pytest.mark.parametrize("number", [0, 137])
def test_the_best_walks_of_neurons_are_those_of_a_plain_recursion(network, molecules, number):
    """Viterbi's, written out: the ten best and worst continuations of every neuron, layer by
    layer, over a matrix of all connections."""
    model, molecule = network, molecules[number]
    R = make_explainer(model)(molecule.adjacency, molecule.features)
    theirs = of_model(model, gammas(3), molecule.adjacency, molecule.features)
    ways = torch.ones(molecule.features.numel(), 1).double()
    for depth in range(3):
        ways = _ends((_steps(theirs, depth).unsqueeze(-1) * ways).flatten(1))
    top = torch.tensor(theirs.h[-1])[:, int(R.target)]
    start = torch.zeros(theirs.h[-1].shape).double()
    start[:, int(R.target)] = top / top.sum()
    best = _ends((start.flatten()[:, None] * ways).flatten()[None])[0]
    layers = gn.node_layers(R)
    for order, expected in (("largest", best[:10]), ("smallest", best[10:])):
        found = R.top(*layers, k=10, by="neuron", order=order)
        assert found.exact
        values = torch.tensor([flow.relevance for flow in found], dtype=torch.float64)
        torch.testing.assert_close(values, expected, atol=1e-12, rtol=1e-9)


def _steps(theirs, depth):
    """`R(i | j)` of all neurons after and before a block: `[after, before]`."""
    inside = [torch.tensor(h) for h in theirs._inside(theirs.blocks[depth], theirs.h[depth])]
    gamma = theirs.gammas[depth]
    through = torch.eye(inside[-1].shape[1]).double().expand(len(inside[0]), -1, -1)
    for (weight, bias), below in zip(theirs.blocks[depth][::-1], inside[-2::-1], strict=True):
        weight, bias = torch.tensor(weight), torch.tensor(bias)
        columns = below[:, :, None] * (weight + gamma * weight.clamp(min=0))
        total = columns.sum(1, keepdim=True) + bias + gamma * bias.clamp(min=0)
        through = (columns / torch.where(total == 0, 1, total)) @ through  # [node, below, after]
    h, near = torch.tensor(theirs.h[depth]), torch.tensor(theirs.neighbours)
    sent = near[:, :, None] * h[:, None]  # [sender, node, feature]
    share = (sent / sent.sum(0).clamp(min=1e-300)).nan_to_num()
    steps = torch.einsum("snf,nfj->njsf", share, through)
    return steps.reshape(steps.shape[0] * steps.shape[1], -1)


def _ends(products):
    """The ten largest of each row, from the largest, and the ten smallest, from the smallest."""
    return torch.cat([products.topk(10).values, -(-products).topk(10).values], 1)


@pytest.mark.parametrize("number", [31, 67, 109, 142, 157])
def test_walks_and_subgraphs_are_those_of_gnn_lrp(network, molecules, number):
    model, molecule = network, molecules[number]
    R = make_explainer(model)(molecule.adjacency, molecule.features)
    target, layers, walks = int(R.target), gn.node_layers(R), gn.node_walks(R)
    theirs = of_model(model, gammas(3), molecule.adjacency, molecule.features)
    size = max(1.0, float(walks.relevance.abs().sum()))
    assert walks.exact
    for walk in [*walks.top(3), *walks.top(3, "smallest"), walks[0]]:
        expected = theirs.walk(walk.nodes, target)
        assert walk.relevance == pytest.approx(expected, abs=1e-10 * size)
    for chosen in [*molecule.rings[:1], (0,), tuple(range(0, molecule.size, 2))]:
        found = float(R(*gn.subgraph(layers, chosen)))
        assert found == pytest.approx(theirs.subgraph(chosen, target), abs=1e-10 * size)
        assert found == pytest.approx(walks.inside(chosen).total, abs=1e-10 * size)
        assert parts(R, layers, chosen).total == pytest.approx(1, abs=1e-10 * size)


def test_a_ring_walk_by_walk(network, molecules):
    model, molecule = network, molecules[142]
    R = make_explainer(model)(molecule.adjacency, molecule.features)
    ring = molecule.rings[0]
    found = R(*gn.subgraph(gn.node_layers(R), ring)) * R.scale
    expected = enumerated_subgraph(
        model, molecule.adjacency, molecule.features, int(R.target), ring
    )
    assert float(found) == pytest.approx(float(expected), abs=1e-10)


def test_the_experiment_from_end_to_end(command, result, shared, tmp_path, monkeypatch):
    """Interrupted once; then it goes on with the molecule at which it stopped."""
    real, asked = mutag.explained, []

    def interrupted(explainer, molecule, number):
        asked.append(number)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(explainer, molecule, number)

    monkeypatch.setattr(mutag, "explained", interrupted)
    out = tmp_path / "out"
    given = ("mutag", "--data", shared / "graphs", "--out", out, "--samples", 2)
    assert command(*given).exit_code == 130
    found = command(*given)
    assert found.exit_code == 0, found.output
    assert asked == [0, 1, 1]
    assert sorted(path.name for path in out.iterdir()) == ["kept", PAGE, RESULT, TABLE, "walks.png"]
    details = result(out)["details"]
    assert max(details["checks"].values()) < 1e-10
    assert details["logits"]["accuracy"] == pytest.approx(170 / 188)
    with (out / TABLE).open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["graph"] for row in rows].count("0") == 23 + 5
    assert float(rows[-1]["relevance"]) == details["subgraphs"][-1]["relevance"]
    assert [drawn["graph"] for drawn in details["walks"]] == [0, 1]
    relevances, laws = result(out)["tables"]
    rings = [row["relevance"] for row in details["subgraphs"] if row["kind"] == "ring"]
    assert relevances["lines"][1][:3] == ["rings", len(rings), min(rings)]
    assert max(line[1] for line in laws["lines"]) < 1e-10


def test_a_folder_without_data_is_refused(command, tmp_path):
    found = command("mutag", "--data", tmp_path, "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "holds no mutag_gin3.safetensors" in found.output
    assert not (tmp_path / "out").exists()


def test_places_of_atoms_are_a_bond_apart(molecules):
    for number in mutag.DRAWN[:2]:
        molecule = molecules[number]
        places = mutag.layout(molecule)
        lengths = [float(((places[a] - places[b]) ** 2).sum() ** 0.5) for a, b in molecule.bonds]
        assert sorted(lengths)[len(lengths) // 2] == pytest.approx(1, abs=0.05)
        apart = [
            float(((places[a] - places[b]) ** 2).sum() ** 0.5)
            for a in range(molecule.size)
            for b in range(a)
        ]
        assert min(apart) > 0.6  # no atom hides another
