"""Layers of PyTorch Geometric: walks of nodes, edges and steps."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support.pyg import EDGES, KINDS, features, measure, net, torch_geometric_layers
from torch import nn

import nrm
from nrm import graph_networks as gn
from nrm import rules
from nrm.errors import QueryError

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def pyg(torchvision_models):
    return torch_geometric_layers()


@pytest.mark.parametrize("kind", KINDS)
def test_walks_sum_to_one_and_subgraphs_to_their_walks(pyg, kind):
    R = measure(net(pyg, kind))
    layers = gn.node_layers(R)
    assert layers == ["x", ":relu", ":relu@1"]
    walks = gn.node_walks(R)
    linked = {(a, b) for a, b in EDGES.T.tolist()} | {(n, n) for n in range(5)}
    assert all(step in linked for walk in walks for step in itertools.pairwise(walk.nodes))
    assert len(walks) == sum(
        (a, b) in linked and (b, c) in linked for a, b, c in itertools.product(range(5), repeat=3)
    )
    assert walks.total == pytest.approx(1, abs=1e-10)
    for chosen in ([2], [0, 1], [1, 2, 4]):
        found = float(R(*gn.subgraph(layers, chosen)))
        assert found == pytest.approx(walks.inside(chosen).total, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_a_step(pyg, kind):
    R = measure(net(pyg, kind))
    layers, messages = gn.node_layers(R), gn.edge_layers(R)
    assert len(messages) == 2
    walks = gn.node_walks(R)
    for depth, layer in enumerate(messages):
        for a, b in EDGES.T.tolist():
            rows = layer.rows(a, b)
            assert len(rows) == 1
            along = float(R(gn.edges(layer, *rows)))
            step = float(R(*gn.step(layers[depth], layers[depth + 1], a, b)))
            assert along == pytest.approx(step, abs=1e-10)
            taken = (walks.nodes[:, depth] == a) & (walks.nodes[:, depth + 1] == b)
            assert along == pytest.approx(float(walks.relevance[taken].sum()), abs=1e-10)
    total = sum(
        walk.relevance * sum(a != b for a, b in itertools.pairwise(walk.nodes)) for walk in walks
    )
    assert float(gn.edge_relevance(R, EDGES).sum()) == pytest.approx(total, abs=1e-10)


def test_edges_jointly_with_a_node_above_them(pyg):
    R = measure(net(pyg, "GIN"))
    walks = gn.node_walks(R)
    found = gn.edge_relevance(R, EDGES, gn.nodes(":relu@1", 2))
    for column, (a, b) in enumerate(EDGES.T.tolist()):
        expected = sum(
            walk.relevance
            for walk in walks
            for step in itertools.pairwise(walk.nodes)
            if walk.nodes[-1] == 2 and step == (a, b)
        )
        assert float(found[column]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("kind", ["GIN", "GCN"])
def test_loops_and_the_order_of_edges(pyg, kind):
    """GCN takes loops out and puts them in again at the end; a loop keeps its relevance."""
    model = net(pyg, kind)
    loops = torch.tensor([[1, 4], [1, 4]])
    edges = torch.cat([loops[:, :1], EDGES.flip(1), loops[:, 1:]], 1)
    R = measure(model, edges)
    found = gn.edge_relevance(R, edges)
    for column, (a, b) in enumerate(edges.T.tolist()):
        expected = sum(float(R(gn.edges(layer, *layer.rows(a, b)))) for layer in gn.edge_layers(R))
        assert float(found[column]) == pytest.approx(expected, abs=1e-10)
        assert expected != 0


def test_against_the_direction_of_edges(pyg):
    plain = gn.edge_relevance(measure(net(pyg, "GIN")), EDGES)
    model = copy.deepcopy(net(pyg, "GIN"))
    for conv in (model.first, model.second):
        conv.flow = "target_to_source"
    back = gn.edge_relevance(measure(model, EDGES.flip(0)), EDGES.flip(0))
    assert torch.allclose(plain, back, atol=1e-10)


def test_messages_that_read_both_ends_and_weights_of_edges(pyg):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = pyg.EdgeConv(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), aggr="max")
            self.second = pyg.GCNConv(8, 2)

        def forward(self, x, edge_index, edge_weight):
            h = self.first(x, edge_index)
            return self.second(h, edge_index, edge_weight).sum(0, keepdim=True)

    torch.manual_seed(0)
    explainer = nrm.Explainer(Net().double().eval(), rules.Gamma(0.25), batch_axis=None)
    weight = torch.rand(8).double() + 0.5
    R = explainer(features(), EDGES, weight, target=(0, 1))
    first, second = gn.edge_layers(R)
    for layer in (first, second):
        assert [layer.rows(a, b) for a, b in EDGES.T.tolist()] == [[row] for row in range(8)]
    along = gn.edge_relevance(R, EDGES)
    for row in range(8):
        both = R(gn.edges(first, row)) + R(gn.edges(second, row))
        assert float(along[row]) == pytest.approx(float(both), abs=1e-10)
    assert float(along.abs().min()) > 0


def test_a_readout_is_no_step(pyg):
    """Its scatter adds up nodes that no edge picked, right above a step that does pick."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = pyg.GCNConv(3, 4)

        def forward(self, x, edge_index, batch):
            return pyg.global_add_pool(self.conv(x, edge_index).relu(), batch, 1)

    torch.manual_seed(0)
    explainer = nrm.Explainer(Net().double().eval(), rules.Gamma(0.25), batch_axis=None)
    R = explainer(features(), EDGES, torch.zeros(5, dtype=torch.long), target=None)
    assert len(gn.edge_layers(R)) == 1
    assert gn.node_layers(R) == ["x", ":relu"]


def test_edges_that_the_model_makes_itself_are_refused(pyg):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = pyg.SAGEConv(3, 2)

        def forward(self, x, edge_index):
            return self.conv(x, edge_index.flip(1)).sum(0, keepdim=True)

    torch.manual_seed(0)
    R = measure(Net().double().eval())
    with pytest.raises(QueryError, match="edges of its own"):
        gn.edge_relevance(R, EDGES)


def test_many_graphs_as_one(pyg):
    """Walks never leave their graph, so all graphs of a batch answer one query each at once."""
    model = net(pyg, "GIN")
    x, batch = torch.cat([features(), 0.5 + features()]), torch.arange(2).repeat_interleave(5)
    edges = torch.cat([EDGES, EDGES + 5], 1)
    start = torch.zeros(2, 2).double()
    start[0, 1] = start[1, 0] = 1
    explainer = nrm.Explainer(model, rules.Gamma(0.25), batch_axis=None)
    R = explainer(x, edges, batch, output_relevance=start)
    lowest, *others = gn.node_layers(R)
    chosen = [1, 2, 3, 5, 6]
    message = R.marginal(lowest, *gn.subgraph(others, chosen)).sum(1)
    inside = torch.isin(torch.arange(10), torch.tensor(chosen))
    found = 2 * torch.zeros(2).double().index_add(0, batch[inside], message[inside])
    for graph, (own, target, nodes) in enumerate(
        [(features(), 1, [1, 2, 3]), (0.5 + features(), 0, [0, 1])]
    ):
        alone = explainer(own, EDGES, torch.zeros(5, dtype=torch.long), target=(0, target))
        expected = alone(*gn.subgraph(gn.node_layers(alone), nodes))
        assert float(found[graph]) == pytest.approx(float(expected), abs=1e-10)
