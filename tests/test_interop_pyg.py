"""PyTorch Geometric: walks and edges of its layers, and nrm as one of its explainers."""

from __future__ import annotations

import copy
import itertools
import warnings
from functools import cache

import pytest
import torch
from torch import nn

import nrm
from nrm import graph_networks as gn
from nrm import rules
from nrm.errors import InputError, QueryError, TargetError

pytestmark = pytest.mark.usefixtures("captured_once")

BONDS = [(0, 1), (1, 2), (2, 3), (3, 4)]
EDGES = torch.tensor([[*pair] for a, b in BONDS for pair in ((a, b), (b, a))]).T
KINDS = ["GIN", "GCN", "SAGE", "GAT"]


@pytest.fixture(scope="module")
def pyg(torchvision_models):
    """torch_geometric.nn, imported after torchvision, which it may import itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch_geometric", reason="torch_geometric is not installed")
        import torch_geometric.explain
        import torch_geometric.nn

    return torch_geometric.nn


@pytest.fixture(scope="module")
def algorithm(pyg):
    from nrm.interop.pyg import RelevanceExplainer

    return RelevanceExplainer


def _x(nodes=5):
    return torch.rand(nodes, 3, generator=torch.Generator().manual_seed(3)).double()


@cache
def _net(pyg, kind, classes=2, graph_level=True):
    """Two layers of message passing and a linear layer: the same object, captured once."""
    make = {
        "GIN": lambda a, b: pyg.GINConv(nn.Sequential(nn.Linear(a, 6), nn.ReLU(), nn.Linear(6, b))),
        "GCN": pyg.GCNConv,
        "SAGE": pyg.SAGEConv,
        "GAT": lambda a, b: pyg.GATConv(a, b // 2, heads=2),
    }[kind]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = make(3, 16), make(16, 16)
            self.head = nn.Linear(16, classes)

        def forward(self, x, edge_index, batch=None):
            h = self.first(x, edge_index).relu()
            h = self.second(h, edge_index).relu()
            return self.head(pyg.global_add_pool(h, batch) if graph_level else h)

    torch.manual_seed(KINDS.index(kind))
    return Net().double().eval().requires_grad_(False)


def _measure(model, edges=EDGES, target=(0, 1)):
    return nrm.Explainer(model, rules.Gamma(0.25), batch_axis=None)(_x(), edges, target=target)


# -- walks and edges -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_walks_sum_to_one_and_subgraphs_to_their_walks(pyg, kind):
    R = _measure(_net(pyg, kind))
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
    R = _measure(_net(pyg, kind))
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
    R = _measure(_net(pyg, "GIN"))
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
    model = _net(pyg, kind)
    loops = torch.tensor([[1, 4], [1, 4]])
    edges = torch.cat([loops[:, :1], EDGES.flip(1), loops[:, 1:]], 1)
    R = _measure(model, edges)
    found = gn.edge_relevance(R, edges)
    for column, (a, b) in enumerate(edges.T.tolist()):
        expected = sum(float(R(gn.edges(layer, *layer.rows(a, b)))) for layer in gn.edge_layers(R))
        assert float(found[column]) == pytest.approx(expected, abs=1e-10)
        assert expected != 0


def test_against_the_direction_of_edges(pyg):
    plain = gn.edge_relevance(_measure(_net(pyg, "GIN")), EDGES)
    model = copy.deepcopy(_net(pyg, "GIN"))
    for conv in (model.first, model.second):
        conv.flow = "target_to_source"
    back = gn.edge_relevance(_measure(model, EDGES.flip(0)), EDGES.flip(0))
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
    R = explainer(_x(), EDGES, weight, target=(0, 1))
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
    R = explainer(_x(), EDGES, torch.zeros(5, dtype=torch.long), target=None)
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
    R = _measure(Net().double().eval())
    with pytest.raises(QueryError, match="edges of its own"):
        gn.edge_relevance(R, EDGES)


def test_many_graphs_as_one(pyg):
    """Walks never leave their graph, so all graphs of a batch answer one query each at once."""
    model = _net(pyg, "GIN")
    x, batch = torch.cat([_x(), 0.5 + _x()]), torch.arange(2).repeat_interleave(5)
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
    for graph, (own, target, nodes) in enumerate([(_x(), 1, [1, 2, 3]), (0.5 + _x(), 0, [0, 1])]):
        alone = explainer(own, EDGES, torch.zeros(5, dtype=torch.long), target=(0, target))
        expected = alone(*gn.subgraph(gn.node_layers(alone), nodes))
        assert float(found[graph]) == pytest.approx(float(expected), abs=1e-10)


# -- torch_geometric.explain -----------------------------------------------------------------------


def _explain(algorithm, model, mode, level, x=None, edges=EDGES, **options):
    from torch_geometric.explain import Explainer

    call = {name: options.pop(name) for name in ("target", "index", "batch") if name in options}
    settings = {"explanation_type": "model", "node_mask_type": "attributes"} | options
    settings.setdefault("edge_mask_type", "object")
    explainer = Explainer(
        model,
        algorithm if isinstance(algorithm, nn.Module) else algorithm(rules.Gamma(0.25)),
        model_config={"mode": mode, "task_level": level, "return_type": "raw"},
        **settings,
    )
    return explainer(_x() if x is None else x, edges, **call)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_relevance_in_units_of_the_output(pyg, algorithm, kind):
    model = _net(pyg, kind, 3)
    found = _explain(algorithm, model, "multiclass_classification", "graph")
    target = int(found.target)
    R = _measure(model, target=(0, target))
    assert torch.allclose(found.node_mask, R.scale * R.heatmap(), atol=1e-12)
    assert torch.allclose(found.edge_mask, R.scale * gn.edge_relevance(R, EDGES), atol=1e-12)
    assert float(found.node_mask.sum()) == pytest.approx(float(R.output.max()), abs=1e-10)
    shares = _explain(
        algorithm(rules.Gamma(0.25), normalized=True), model, "multiclass_classification", "graph"
    )
    assert torch.allclose(shares.node_mask, R.heatmap(), atol=1e-12)


@cache
def _below_zero(pyg):
    """Its logits are below zero, its probabilities above."""
    body = copy.deepcopy(_net(pyg, "GCN", 3, graph_level=False))
    body.head.bias -= 3
    return body


@pytest.mark.parametrize("head", ["log_softmax", "sigmoid"])
def test_masks_are_of_the_logits_behind_a_head(pyg, algorithm, head):
    class Headed(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x, edge_index):
            logits = self.body(x, edge_index)
            return logits.log_softmax(1) if head == "log_softmax" else logits.sigmoid()

    body = _below_zero(pyg)
    assert float(body(_x(), EDGES).max()) < 0
    for index in (2, torch.tensor([0, 3])):
        masks = [
            _explain(algorithm, m, "multiclass_classification", "node", index=index)
            for m in (body, Headed(body))
        ]
        torch.testing.assert_close(masks[1].node_mask, masks[0].node_mask)
        torch.testing.assert_close(masks[1].edge_mask, masks[0].edge_mask)
        assert masks[0].node_mask.sum() < 0


def test_node_masks_of_every_kind(pyg, algorithm):
    one = algorithm(rules.Gamma(0.25))  # captures the model once
    model = _net(pyg, "GCN")
    masks = {
        kind: _explain(one, model, "regression", "graph", node_mask_type=kind).node_mask
        for kind in ("attributes", "object", "common_attributes")
    }
    assert masks["attributes"].shape == (5, 3)
    assert masks["object"].shape == (5, 1)
    assert masks["common_attributes"].shape == (1, 3)
    assert torch.allclose(masks["object"][:, 0], masks["attributes"].sum(1), atol=1e-12)
    assert torch.allclose(masks["common_attributes"][0], masks["attributes"].sum(0), atol=1e-12)
    only = _explain(one, model, "regression", "graph", edge_mask_type=None)
    assert "edge_mask" not in only
    edges = _explain(one, model, "regression", "graph", node_mask_type=None)
    assert "node_mask" not in edges


def test_nodes_are_explained_by_what_they_see(pyg, algorithm):
    one = algorithm(rules.Gamma(0.25))  # captures the model once
    model = _net(pyg, "GCN", 3, graph_level=False)
    output = model(_x(), EDGES)
    near = _explain(one, model, "multiclass_classification", "node", index=0)
    assert float(near.node_mask.sum()) == pytest.approx(float(output[0].max()), abs=1e-10)
    assert near.node_mask[:3].ne(0).any(1).all()
    assert not near.node_mask[3:].any()  # further than two steps away
    unseen = (EDGES >= 3).any(0)
    assert not near.edge_mask[unseen].any()
    both = _explain(one, model, "multiclass_classification", "node", index=torch.tensor([0, 3]))
    other = _explain(one, model, "multiclass_classification", "node", index=3)
    assert torch.allclose(both.node_mask, near.node_mask + other.node_mask, atol=1e-10)
    assert torch.allclose(both.edge_mask, near.edge_mask + other.edge_mask, atol=1e-10)


def test_a_phenomenon_is_explained_by_its_own_target(pyg, algorithm):
    one = algorithm(rules.Gamma(0.25))  # captures the model once
    model = _net(pyg, "GIN", 3)
    for target in range(3):
        found = _explain(
            one,
            model,
            "multiclass_classification",
            "graph",
            explanation_type="phenomenon",
            target=torch.tensor([target]),
        )
        expected = float(model(_x(), EDGES)[0, target])
        assert float(found.node_mask.sum()) == pytest.approx(expected, abs=1e-10)


def test_the_other_class_of_a_binary_classification_is_the_negative(pyg, algorithm):
    model = _net(pyg, "GIN", 1)
    masks = [
        _explain(
            algorithm,
            model,
            "binary_classification",
            "graph",
            explanation_type="phenomenon",
            target=torch.tensor([target]),
        ).node_mask
        for target in (0, 1)
    ]
    assert torch.allclose(masks[0], -masks[1], atol=1e-12)
    assert float(masks[1].sum()) == pytest.approx(float(model(_x(), EDGES)), abs=1e-10)
    with pytest.raises(TargetError, match="one logit for each row"):
        _explain(algorithm, _net(pyg, "GIN", 2), "binary_classification", "graph")


def test_pairs_of_nodes_are_explained(pyg, algorithm):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _net(pyg, "GIN", 4, graph_level=False)

        def forward(self, x, edge_index, pairs):
            h = self.inner(x, edge_index)
            return (h[pairs[0]] * h[pairs[1]]).sum(1)

    from torch_geometric.explain import Explainer

    model = Pairs().eval()
    explainer = Explainer(
        model,
        algorithm(rules.Gamma(0.25)),
        explanation_type="model",
        node_mask_type="object",
        model_config={"mode": "binary_classification", "task_level": "edge", "return_type": "raw"},
    )
    pairs = torch.tensor([[0, 0], [1, 4]])
    for index in range(2):
        found = explainer(_x(), EDGES, pairs=pairs, index=index)
        logit = float(model(_x(), EDGES, pairs)[index])
        assert float(found.node_mask.sum()) == pytest.approx(abs(logit), abs=1e-10)


def test_graphs_of_a_batch(pyg, algorithm):
    model = _net(pyg, "GIN", 2)
    x = torch.cat([_x(), 0.5 + _x()])
    edges, batch = torch.cat([EDGES, EDGES + 5], 1), torch.arange(2).repeat_interleave(5)
    options = {"edges": edges, "batch": batch}
    found = _explain(algorithm, model, "regression", "graph", x, index=1, **options)
    alone = _explain(algorithm, model, "regression", "graph", 0.5 + _x())
    assert not found.node_mask[:5].any()
    assert torch.allclose(found.node_mask[5:], alone.node_mask, atol=1e-10)
    assert torch.allclose(found.edge_mask[8:], alone.edge_mask, atol=1e-10)


def test_a_model_is_captured_once(pyg, algorithm, monkeypatch):
    captures, itself = [], nrm.explainer.capture
    monkeypatch.setattr(nrm.explainer, "capture", lambda *a: captures.append(1) or itself(*a))
    one = algorithm(rules.Gamma(0.25))
    model, other = _net(pyg, "GIN"), _net(pyg, "GCN")
    first = _explain(one, model, "regression", "graph")
    assert len(captures) == 1
    again = _explain(one, model, "regression", "graph")
    assert len(captures) == 1
    assert torch.equal(first.node_mask, again.node_mask)
    assert not torch.equal(_explain(one, other, "regression", "graph").node_mask, first.node_mask)
    assert len(captures) == 2


def test_integer_nodes(pyg, algorithm):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner = nn.Embedding(4, 3), _net(pyg, "GCN")

        def forward(self, x, edge_index):
            return self.inner(self.embed(x), edge_index)

    torch.manual_seed(0)
    model, kinds = Net().double().eval().requires_grad_(False), torch.tensor([0, 3, 1, 1, 2])
    found = _explain(algorithm, model, "regression", "graph", kinds, node_mask_type="object")
    assert found.node_mask.shape == (5, 1)
    assert float(found.node_mask.sum()) == pytest.approx(float(model(kinds, EDGES).sum()), abs=1e-9)
    with pytest.raises(InputError, match="node_mask_type='object'"):
        _explain(algorithm, model, "regression", "graph", kinds)


def test_what_cannot_be_explained_is_refused(pyg, algorithm, caplog):
    from torch_geometric.explain import Explainer

    model = _net(pyg, "GIN")
    with pytest.raises(ValueError, match="does not support"):
        Explainer(
            model,
            algorithm(),
            explanation_type="model",
            node_mask_type="object",
            model_config={
                "mode": "multiclass_classification",
                "task_level": "graph",
                "return_type": "log_probs",
            },
        )
    assert "expects return_type 'raw', not 'log_probs'" in caplog.text
    connected = algorithm()
    _explain(connected, model, "regression", "graph")
    with pytest.raises(InputError, match="homogeneous"):
        connected(model, {"a": _x()}, {}, target=torch.zeros(1))

    class Dense(nn.Module):
        def forward(self, x, edge_index):
            adjacency = torch.zeros(5, 5, dtype=x.dtype).index_put(
                (edge_index[1], edge_index[0]), x.new_ones(())
            )
            return (adjacency @ x).sum(0, keepdim=True)

    with pytest.raises(QueryError, match="no variable has a row for each edge"):
        _explain(algorithm, Dense().eval(), "regression", "graph")


def test_a_graph_classifier_with_its_batch():
    """GCN normalises by a power in place, whose plain overload has another name."""
    from torch_geometric.nn import GCNConv, global_add_pool

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = GCNConv(3, 4), torch.nn.Linear(4, 2)

        def forward(self, x, edge_index, batch):
            return self.head(global_add_pool(self.conv(x, edge_index).relu(), batch))

    torch.manual_seed(0)
    model = Net().eval()
    x, batch = torch.rand(5, 3), torch.tensor([0, 0, 0, 1, 1])
    edge_index = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])
    chosen = torch.tensor([[0.0, 1.0], [0.0, 0.0]]) * model(x, edge_index, batch).detach()
    R = nrm.Explainer(model, batch_axis=None)(x, edge_index, batch, output_relevance=chosen)
    heat = R.marginal("x")
    torch.testing.assert_close(heat.sum(), torch.tensor(1.0))
    assert heat[3:].abs().max() == 0


# -- Adjacencies in the place of lists of edges.


def _by_matrix(pyg, kind):
    """A network that takes weights of edges, or a matrix, and one that takes no weights."""
    make = {"GCN": pyg.GCNConv, "Graph": pyg.GraphConv, "SAGE": pyg.SAGEConv}[kind]

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = make(3, 6), make(6, 4), nn.Linear(4, 2)

        def forward(self, x, edge_index, edge_weight=None):
            h = torch.relu(self.first(x, edge_index, edge_weight))
            return self.head(torch.relu(self.second(h, edge_index, edge_weight)))

    class Plain(Weighted):
        def forward(self, x, edge_index):
            h = torch.relu(self.first(x, edge_index))
            return self.head(torch.relu(self.second(h, edge_index)))

    torch.manual_seed(0)
    return (Plain if kind == "SAGE" else Weighted)().double().eval()


def _masks_of(model, algorithm, *args, **options):
    import torch_geometric.explain

    explainer = torch_geometric.explain.Explainer(
        model,
        algorithm(rules.Gamma(0.25)),
        explanation_type="model",
        node_mask_type="attributes",
        model_config={
            "mode": "multiclass_classification",
            "task_level": "node",
            "return_type": "raw",
        },
        **options,
    )
    return explainer(*args, index=2)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:Converting sparse tensor")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("kind", ["GCN", "Graph", "SAGE"])
def test_sparse_adjacencies(pyg, algorithm, kind, layout):
    """The entries of the matrix are the edges, its values their weights."""
    import torch_geometric.utils as utils

    model, x = _by_matrix(pyg, kind), _x()
    weight = torch.rand(8, generator=torch.Generator().manual_seed(4)).double() + 0.5
    weight = torch.ones_like(weight) if kind == "SAGE" else weight
    matrix = getattr(utils, f"to_torch_{layout}_tensor")(EDGES.flip(0), weight, size=5)
    found = _masks_of(model, algorithm, x, matrix)
    (to, source), weight = utils.to_edge_index(matrix)
    edges, more = torch.stack([source, to]), () if kind == "SAGE" else (weight,)
    target = (2, int(model(x, edges, *more)[2].argmax()))
    R = nrm.Explainer(model, rules.Gamma(0.25), batch_axis=None)(x, edges, *more, target=target)
    torch.testing.assert_close(found.node_mask, R.heatmap(at="x") * R.scale)
    with pytest.raises(InputError, match="edge_mask_type=None"):
        _masks_of(model, algorithm, x, matrix, edge_mask_type="object")


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:Converting sparse tensor")
def test_a_sparse_adjacency_whose_weights_nobody_reads_is_refused(pyg, algorithm):
    import torch_geometric.utils as utils

    model = _by_matrix(pyg, "SAGE")
    matrix = utils.to_torch_csr_tensor(EDGES.flip(0), torch.rand(8).double() + 1, size=5)
    with pytest.raises(InputError, match="another output for the edges"):
        _masks_of(model, algorithm, _x(), matrix)
    with pytest.raises(InputError, match=r"sparse.*edge_index"):
        nrm.Explainer(model, batch_axis=None)(_x(), matrix.to_sparse_coo(), target=(0, 0))


@pytest.mark.parametrize("kind", ["GCN", "SAGE", "Graph", "GIN"])
def test_dense_adjacencies_are_structure(pyg, algorithm, kind):
    """A float matrix takes nothing, whatever PyG's dense layers do with it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            inner = (nn.Linear(3, 4),) if kind == "GIN" else (3, 4)
            self.conv, self.head = getattr(pyg, f"Dense{kind}Conv")(*inner), nn.Linear(4, 2)

        def forward(self, x, adj):
            return self.head(torch.relu(self.conv(x, adj)[0]))

    torch.manual_seed(0)
    model, x, matrix = Net().double().eval(), _x(), torch.zeros(5, 5).double()
    matrix[EDGES[1], EDGES[0]] = torch.rand(8).double() + 0.5
    found = _masks_of(model, algorithm, x, matrix)
    target = (2, int(model(x, matrix)[2].argmax()))
    R = nrm.Explainer(model, rules.Gamma(0.25), batch_axis=None)(x, matrix, target=target)
    assert float(R.marginal("adj").abs().max()) == 0
    torch.testing.assert_close(found.node_mask, R.heatmap(at="x") * R.scale)
    torch.testing.assert_close(found.node_mask.sum(), R.scale[0])
    assert float(found.node_mask[4].abs().max()) == 0  # two steps away, and there is one
