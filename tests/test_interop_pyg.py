"""nrm as one of the explainers of PyTorch Geometric."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from support.pyg import EDGES, KINDS, features, measure, net, torch_geometric_layers
from torch import nn

import nrm
from nrm import graph_networks as gn
from nrm import rules
from nrm.errors import InputError, QueryError, TargetError

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def pyg(torchvision_models):
    return torch_geometric_layers()


@pytest.fixture(scope="module")
def algorithm(pyg):
    from nrm.interop.pyg import RelevanceExplainer

    return RelevanceExplainer


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
    return explainer(features() if x is None else x, edges, **call)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_relevance_in_units_of_the_output(pyg, algorithm, kind):
    model = net(pyg, kind, 3)
    found = _explain(algorithm, model, "multiclass_classification", "graph")
    target = int(found.target)
    R = measure(model, target=(0, target))
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
    body = copy.deepcopy(net(pyg, "GCN", 3, graph_level=False))
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
    assert float(body(features(), EDGES).max()) < 0
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
    model = net(pyg, "GCN")
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
    model = net(pyg, "GCN", 3, graph_level=False)
    output = model(features(), EDGES)
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
    model = net(pyg, "GIN", 3)
    for target in range(3):
        found = _explain(
            one,
            model,
            "multiclass_classification",
            "graph",
            explanation_type="phenomenon",
            target=torch.tensor([target]),
        )
        expected = float(model(features(), EDGES)[0, target])
        assert float(found.node_mask.sum()) == pytest.approx(expected, abs=1e-10)


def test_the_other_class_of_a_binary_classification_is_the_negative(pyg, algorithm):
    model = net(pyg, "GIN", 1)
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
    assert float(masks[1].sum()) == pytest.approx(float(model(features(), EDGES)), abs=1e-10)
    with pytest.raises(TargetError, match="one logit for each row"):
        _explain(algorithm, net(pyg, "GIN", 2), "binary_classification", "graph")


def test_pairs_of_nodes_are_explained(pyg, algorithm):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net(pyg, "GIN", 4, graph_level=False)

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
        found = explainer(features(), EDGES, pairs=pairs, index=index)
        logit = float(model(features(), EDGES, pairs)[index])
        assert float(found.node_mask.sum()) == pytest.approx(abs(logit), abs=1e-10)


def test_graphs_of_a_batch(pyg, algorithm):
    model = net(pyg, "GIN", 2)
    x = torch.cat([features(), 0.5 + features()])
    edges, batch = torch.cat([EDGES, EDGES + 5], 1), torch.arange(2).repeat_interleave(5)
    options = {"edges": edges, "batch": batch}
    found = _explain(algorithm, model, "regression", "graph", x, index=1, **options)
    alone = _explain(algorithm, model, "regression", "graph", 0.5 + features())
    assert not found.node_mask[:5].any()
    assert torch.allclose(found.node_mask[5:], alone.node_mask, atol=1e-10)
    assert torch.allclose(found.edge_mask[8:], alone.edge_mask, atol=1e-10)


def test_a_model_is_captured_once(pyg, algorithm, monkeypatch):
    captures, itself = [], nrm.explainer.capture
    monkeypatch.setattr(nrm.explainer, "capture", lambda *a: captures.append(1) or itself(*a))
    one = algorithm(rules.Gamma(0.25))
    model, other = net(pyg, "GIN"), net(pyg, "GCN")
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
            self.embed, self.inner = nn.Embedding(4, 3), net(pyg, "GCN")

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

    model = net(pyg, "GIN")
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
        connected(model, {"a": features()}, {}, target=torch.zeros(1))

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

    model, x = _by_matrix(pyg, kind), features()
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
        _masks_of(model, algorithm, features(), matrix)
    with pytest.raises(InputError, match=r"sparse.*edge_index"):
        nrm.Explainer(model, batch_axis=None)(features(), matrix.to_sparse_coo(), target=(0, 0))


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
    model, x, matrix = Net().double().eval(), features(), torch.zeros(5, 5).double()
    matrix[EDGES[1], EDGES[0]] = torch.rand(8).double() + 0.5
    found = _masks_of(model, algorithm, x, matrix)
    target = (2, int(model(x, matrix)[2].argmax()))
    R = nrm.Explainer(model, rules.Gamma(0.25), batch_axis=None)(x, matrix, target=target)
    assert float(R.marginal("adj").abs().max()) == 0
    torch.testing.assert_close(found.node_mask, R.heatmap(at="x") * R.scale)
    torch.testing.assert_close(found.node_mask.sum(), R.scale[0])
    assert float(found.node_mask[4].abs().max()) == 0  # two steps away, and there is one
