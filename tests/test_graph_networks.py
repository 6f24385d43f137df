"""Nodes, edges, subgraphs and walks of nodes, against a transcription of GNN-LRP and each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.gnn_lrp import of_model
from torch import nn

import nrm
from nrm import graph_networks as gn
from nrm import rules
from nrm.errors import NeuronSetError, QueryError
from nrm_reproduce.mutag import (
    composite,
    enumerated_subgraph,
    gammas,
    parts,
    walk_relevance,
    walks_inside,
)
from nrm_reproduce.networks import GIN

NODES = 5
BONDS = [(0, 1), (1, 2), (2, 3), (3, 0), (3, 4)]
EDGES = torch.tensor([[*pair] for a, b in BONDS for pair in ((a, b), (b, a))]).T


def _gin(depth, seed=0):
    torch.manual_seed(seed)
    inner = [[12, 12, 12]] * (depth - 2)
    model = GIN([[3, 12, 12], *inner, [12, 2]]).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(-0.05 * parameter.abs())
    adjacency = torch.eye(NODES, dtype=torch.bool)
    for a, b in BONDS:
        adjacency[a, b] = adjacency[b, a] = True
    return model, adjacency, torch.eye(3).double()[torch.randint(3, (NODES,))]


def _explained(depth, seed=0, target=1):
    model, adjacency, x = _gin(depth, seed)
    explainer = nrm.Explainer(model, composite(depth), batch_axis=None)
    return explainer(adjacency, x, target=target), (model, adjacency, x)


# -- sets ------------------------------------------------------------------------------------------


def test_a_node_is_all_its_features():
    R, _ = _explained(2)
    by_node = R.marginal("blocks.0").sum(1)
    for node in range(NODES):
        assert torch.allclose(R(gn.nodes("blocks.0", node)), by_node[node], atol=1e-12)
    assert torch.allclose(R(gn.nodes("blocks.0", 1, 3)), by_node[[1, 3]].sum(), atol=1e-12)
    assert torch.allclose(R(gn.nodes("blocks.0", -1)), by_node[-1], atol=1e-12)


def test_sets_that_cannot_be_are_refused():
    R, _ = _explained(2)
    with pytest.raises(NeuronSetError, match="names no node"):
        gn.nodes("blocks.0")
    with pytest.raises(NeuronSetError, match="names no edge"):
        gn.edges("blocks.0")
    with pytest.raises(NeuronSetError, match="out of range"):
        R(gn.nodes("blocks.0", NODES))
    with pytest.raises(NeuronSetError, match="names no node"):
        gn.subgraph(["features", "blocks.0"], [])
    with pytest.raises(NeuronSetError, match="nodes of 1 layers"):
        gn.subgraph(["features", "blocks.0"], [[1, 2]])


def test_a_subgraph_may_have_nodes_of_its_own_in_each_layer():
    R, _ = _explained(2)
    layers = gn.node_layers(R)
    walks = gn.node_walks(R)
    inside = [{0, 1}, {0}, {0, 3}]
    expected = sum(
        w.relevance for w in walks if all(n in s for n, s in zip(w.nodes, inside, strict=True))
    )
    found = R(*gn.subgraph(layers, [sorted(s) for s in inside]))
    assert float(found) == pytest.approx(expected, abs=1e-12)


# -- walks and subgraphs against GNN-LRP -----------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_walk_is_that_of_gnn_lrp(depth, seed):
    target = seed % 2
    R, (model, adjacency, x) = _explained(depth, seed, target)
    theirs = of_model(model, gammas(depth), adjacency, x)
    assert theirs.logits() == pytest.approx(R.output.numpy(), abs=1e-12)
    walks = gn.node_walks(R)
    assert walks.exact
    found = {walk.nodes: walk.relevance for walk in walks}
    assert len(found) == len(walks)
    for nodes in itertools.product(range(NODES), repeat=depth + 1):
        linked = all(adjacency[a, b] for a, b in itertools.pairwise(nodes))
        expected = theirs.walk(nodes, target) if linked else 0.0
        assert found.pop(nodes, 0.0) == pytest.approx(expected, abs=1e-10), nodes
    assert not found


@pytest.mark.parametrize("depth", [2, 3])
def test_subgraphs_are_those_of_sgnn_lrp(depth):
    R, (model, adjacency, x) = _explained(depth)
    theirs = of_model(model, gammas(depth), adjacency, x)
    layers, walks = gn.node_layers(R), gn.node_walks(R)
    for size in range(1, NODES + 1):
        for chosen in itertools.combinations(range(NODES), size):
            found = float(R(*gn.subgraph(layers, chosen)))
            assert found == pytest.approx(theirs.subgraph(chosen, 1), abs=1e-10)
            assert found == pytest.approx(walks.inside(chosen).total, abs=1e-12)


def test_walk_by_walk_the_same_comes_out():
    R, (model, adjacency, x) = _explained(3)
    for walk in itertools.islice(gn.node_walks(R), 20):
        one = walk_relevance(model, adjacency, x, 1, walk.nodes)
        assert float(one / R.scale) == pytest.approx(walk.relevance, abs=1e-10)
    chosen = [0, 2, 3]
    found = enumerated_subgraph(model, adjacency, x, 1, chosen) / R.scale
    assert float(found) == pytest.approx(
        float(R(*gn.subgraph(gn.node_layers(R), chosen))), abs=1e-10
    )
    inside = set(walks_inside(adjacency, 3, chosen))
    assert inside == {walk.nodes for walk in gn.node_walks(R).inside(chosen)}


def test_what_stays_ends_or_leaves_adds_up_to_one():
    R, _ = _explained(3)
    layers = gn.node_layers(R)
    assert layers == ["features", "blocks.0", "blocks.1", R.graph.variable("blocks.2").name]
    for chosen in ([0], [1, 2], [0, 1, 2, 3], range(NODES)):
        found = parts(R, layers, list(chosen))
        assert found.total == pytest.approx(1, abs=1e-10)
        assert found.ended != 0
    assert found.leaving == 0
    biases = sum(float(share) for share in R.biases().values())
    assert gn.node_walks(R).total + biases == pytest.approx(1, abs=1e-10)


# -- which walks -----------------------------------------------------------------------------------


def test_the_top_walks_come_from_either_end():
    R, _ = _explained(3)
    walks = gn.node_walks(R)
    values = walks.relevance.tolist()
    assert [w.relevance for w in walks.top(5)] == sorted(values)[::-1][:5]
    assert [w.relevance for w in walks.top(5, "smallest")] == sorted(values)[:5]
    sizes = [abs(w.relevance) for w in walks.top(5, "absolute")]
    assert sizes == sorted(map(abs, values))[::-1][:5]
    assert len(walks.top(10**6)) == len(walks)
    with pytest.raises(QueryError, match="the order is one of"):
        walks.top(5, "best")
    with pytest.raises(QueryError, match="positive integer"):
        walks.top(0)


@pytest.mark.parametrize("order", ["largest", "smallest", "absolute"])
@pytest.mark.parametrize("depth", [3, 4])
def test_the_top_walks_are_found_without_listing_all(depth, order):
    R, _ = _explained(depth)
    found = gn.top_walks(R, k=10, order=order)
    assert found.exact
    assert found.visited < 1
    layers = gn.node_layers(R)

    def best(layers, k):
        """With all that are no walks, as far as they are among the first k."""
        every = gn.node_walks(R, *layers).relevance.tolist()
        every += [0.0] * (NODES ** len(layers) - len(every))
        key = {"largest": lambda r: -r, "smallest": lambda r: r, "absolute": lambda r: -abs(r)}
        return [relevance for relevance in sorted(every, key=key[order])[:k] if relevance]

    expected = best(layers, 10)
    assert [flow.relevance for flow in found] == pytest.approx(expected, abs=1e-12)
    for flow in found:
        assert list(flow.parts) == layers
        assert float(R(*flow.sets)) == pytest.approx(flow.relevance, abs=1e-12)
    named = gn.top_walks(R, layers[0], layers[-1], k=3, order=order)
    ends = (layers[0], layers[-1])
    assert [f.relevance for f in named] == pytest.approx(best(ends, 3), abs=1e-12)


def test_memory_only_decides_how_many_messages_travel_at_once():
    R, _ = _explained(3)
    all_at_once, one_by_one = gn.node_walks(R), gn.node_walks(R, memory=1)
    assert torch.equal(all_at_once.nodes, one_by_one.nodes)
    assert torch.allclose(all_at_once.relevance, one_by_one.relevance, atol=1e-14)


def test_too_many_walks_are_counted_and_refused():
    R, (_, adjacency, _) = _explained(3)
    count = len(gn.node_walks(R))
    assert count == int(torch.linalg.matrix_power(adjacency.double(), 3).sum())
    assert len(gn.node_walks(R, max_walks=count)) == count
    with pytest.raises(QueryError, match=f"there are {count} walks of nodes .*'features'"):
        gn.node_walks(R, max_walks=count - 1)


def test_a_beam_finds_some_of_the_walks():
    R, _ = _explained(3)
    everything = {walk.nodes: walk.relevance for walk in gn.node_walks(R)}
    some = gn.node_walks(R, beam=3, max_walks=1)
    assert not some.exact
    assert 0 < len(some) < len(everything)
    for walk in some:
        assert walk.relevance == pytest.approx(everything[walk.nodes], abs=1e-14)
    wide = gn.node_walks(R, beam=len(everything))
    assert wide.exact
    assert len(wide) == len(everything)
    for beam in (0, 2.5):
        with pytest.raises(QueryError, match="positive integer"):
            gn.node_walks(R, beam=beam)


def test_walks_can_be_read_at_other_layers():
    R, _ = _explained(3)
    some = gn.node_walks(R, "blocks.0", "blocks.2")
    found = {walk.nodes: walk.relevance for walk in some}
    for lower, upper in itertools.product(range(NODES), repeat=2):
        step = float(R(*gn.step("blocks.0", "blocks.2", lower, upper)))
        assert found.get((lower, upper), 0.0) == pytest.approx(step, abs=1e-12)


# -- which layers ----------------------------------------------------------------------------------


class _Skipping(nn.Module):
    """Both layers of message passing are read out, and the input too if `all_of_it`."""

    def __init__(self, all_of_it):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.all_of_it = all_of_it

    def forward(self, adjacency, x):
        mean = adjacency.to(x.dtype)
        h = self.first(mean @ x).relu()
        read = [h, self.second(mean @ h).relu()]
        return torch.cat([x, *read] if self.all_of_it else read, 1).sum(0)


def test_models_without_layers_of_their_own_say_so():
    _, adjacency, x = _gin(2)
    torch.manual_seed(0)
    model = _Skipping(all_of_it=True).double().eval()
    R = nrm.Explainer(model, rules.Gamma(0.25), batch_axis=None)(adjacency, x, target=9)
    with pytest.raises(QueryError, match=r"something skips it\. Name the layers"):
        gn.node_layers(R)
    walks = gn.node_walks(R, "x", ":relu", ":relu@1")
    assert walks.total == pytest.approx(1, abs=1e-10)  # output 9 is of the second layer alone
    alone = nrm.Explainer(nn.Sequential(nn.Linear(3, 2)).double().eval(), batch_axis=None)(
        x, target=(0, 0)
    )
    with pytest.raises(QueryError, match="no step of message passing"):
        gn.node_layers(alone)
    with pytest.raises(QueryError, match="no variable has a row for each edge"):
        gn.edge_layers(alone)


def test_a_skip_to_the_readout_is_a_step_in_place():
    _, adjacency, x = _gin(2)
    torch.manual_seed(0)
    model = _Skipping(all_of_it=False).double().eval()
    explain = nrm.Explainer(model, rules.Gamma(0.25), batch_axis=None)
    for target in range(8):
        R = explain(adjacency, x, target=target)
        assert gn.node_layers(R) == ["x", ":relu", ":cat"]
        walks = gn.node_walks(R)
        assert walks.total == pytest.approx(1, abs=1e-10)
        if target < 4:
            assert (walks.nodes[:, 1] == walks.nodes[:, 2]).all()


class _Fixed(nn.Module):
    """A graph that is part of the model; signals on its nodes come in batches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(4, 4) * (torch.rand(4, 4) < 0.7))
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = (self.mean @ self.first(x)).relu()
        return (self.mean @ self.second(h)).sum(1)


def test_signals_in_batches_on_a_graph_of_the_model():
    torch.manual_seed(1)
    model, x = _Fixed().double().eval(), torch.rand(2, 4, 2).double()
    explainer = nrm.Explainer(model, rules.Gamma(0.25))
    R = explainer(x, target=1)
    assert R(gn.nodes("input", 2)).shape == (2,)
    assert torch.allclose(R(gn.nodes("input", 2)), R.heatmap()[:, 2].sum(1), atol=1e-12)
    with pytest.raises(QueryError, match="one graph at a time"):
        gn.node_walks(R)
    for sample in range(2):
        alone = explainer(x[sample : sample + 1], target=1)
        layers = gn.node_layers(alone)
        walks = gn.node_walks(alone)
        assert walks.total == pytest.approx(1, abs=1e-10)
        joint = R(*gn.subgraph(layers, [0, 2]))[sample]
        assert float(joint) == pytest.approx(walks.inside([0, 2]).total, abs=1e-12)


class _Readout(nn.Module):
    """Messages of the graph's own features, and of the node that sends."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 2) for _ in range(3))

    def forward(self, x, edge_index, batch):
        sender, receiver = edge_index
        whole = x.new_zeros(1, 3).index_add(0, batch, x)
        message = self.a(whole)[batch[sender]] + self.b(x)[sender]
        out = x.new_zeros(NODES, 2).index_add(0, receiver, message) + self.c(x)
        return x.new_zeros(1, 2).index_add(0, batch, torch.relu(out))


def test_edges_of_messages_that_read_the_whole_graph_too():
    torch.manual_seed(0)
    model, batch = _Readout().double().eval(), torch.zeros(NODES, dtype=torch.long)
    explainer = nrm.Explainer(model, batch_axis=None)
    R = explainer(torch.rand(NODES, 3).double(), EDGES, batch, target=(0, 1))
    (layer,) = gn.edge_layers(R)
    assert torch.equal(layer.senders, EDGES[0])
    assert torch.equal(layer.receivers, EDGES[1])
    assert layer.rows(3, 4) == [8]
    torch.testing.assert_close(gn.edge_relevance(R, EDGES), R.marginal(layer.name).sum(1))
