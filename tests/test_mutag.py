"""MUTAG and the pretrained network: GNN-LRP's relevances, and the experiment's command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from support.gnn_lrp import of_model

from nrm import graph_networks as gn
from nrm.errors import InputError
from nrm.experiments.mutag.enumeration import enumerated_subgraph
from nrm.experiments.mutag.gin import gammas, load_gin
from nrm.experiments.mutag.molecules import load_molecules
from nrm.experiments.mutag.relevance import explain, make_explainer, parts

DATA = Path(__file__).parents[2] / "shared" / "data" / "graphs"
needs_data = pytest.mark.skipif(
    not DATA.exists(), reason="needs MUTAG and the pretrained network in ../shared/data"
)


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    return load_gin(DATA)


@pytest.fixture(scope="module")
def molecules():
    return load_molecules(DATA)


@needs_data
def test_the_logits_are_those_stored(network, molecules):
    model, stored = network
    logits = torch.stack([model(m.adjacency, m.features) for m in molecules])
    assert logits.shape == stored.shape == (188, 2)
    assert torch.allclose(logits, stored.double(), atol=1e-6 * float(stored.abs().max()))
    right = logits.argmax(1) == torch.tensor([m.label for m in molecules])
    assert int(right.sum()) == 170


@needs_data
def test_gammas_fall_from_three_to_zero(network):
    assert gammas(len(network[0].blocks)) == [3, 1.5, 0]


@needs_data
@pytest.mark.parametrize("number", [0, 137])
def test_the_best_walks_of_neurons_are_those_of_a_plain_recursion(network, molecules, number):
    """Viterbi's, written out: the ten best and worst continuations of every neuron, layer by
    layer, over a matrix of all connections."""
    model, molecule = network[0], molecules[number]
    R = explain(make_explainer(model), molecule)
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


@needs_data
@pytest.mark.parametrize("number", [31, 67, 109, 142, 157])
def test_walks_and_subgraphs_are_those_of_gnn_lrp(network, molecules, number):
    model, molecule = network[0], molecules[number]
    R = explain(make_explainer(model), molecule)
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


@needs_data
def test_a_ring_walk_by_walk(network, molecules):
    model, molecule = network[0], molecules[142]
    R = explain(make_explainer(model), molecule)
    ring = molecule.rings[0]
    found = R(*gn.subgraph(gn.node_layers(R), ring)) * R.scale
    expected = enumerated_subgraph(
        model, molecule.adjacency, molecule.features, int(R.target), ring
    )
    assert float(found) == pytest.approx(float(expected), abs=1e-10)


@needs_data
def test_rings(molecules):
    first = molecules[0]
    assert len(first.rings) == 5
    for molecule in molecules:
        # As many rings as bonds beyond those of a tree; every atom of a ring has two bonds in it.
        assert len(molecule.rings) == len(molecule.bonds) - molecule.size + 1
        for ring in molecule.rings:
            inside = molecule.adjacency[list(ring)][:, list(ring)].sum(1) - 1
            assert (inside == 2).all()


@needs_data
def test_the_command_writes_its_results(tmp_path):
    pytest.importorskip("typer", reason="the command line's packages are not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from nrm.experiments.mutag.__main__ import PICTURE, RESULT, TABLE, main

    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(DATA), "--out", str(out), "--graphs", "2"])
    assert ended.value.code == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([PICTURE, RESULT, TABLE])
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / RESULT).read_text())
    assert max(result["checks"].values()) < 1e-10
    assert result["logits"]["accuracy"] == pytest.approx(170 / 188)
    with (out / TABLE).open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["graph"] for row in rows].count("0") == 23 + 5
    assert float(rows[-1]["relevance"]) == result["subgraphs"][-1]["relevance"]
    assert [drawn["graph"] for drawn in result["walks"]] == [0, 1]


def test_the_command_refuses_a_folder_without_data(tmp_path, capsys):
    pytest.importorskip("typer", reason="the command line's packages are not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from nrm.experiments.mutag.__main__ import main

    with pytest.raises(InputError, match=r"holds no mutag\.json"):
        load_molecules(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "holds no mutag_gin3.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
