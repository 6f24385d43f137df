"""Experts, pooled graphs, caches, and models that are no Python: right, or one clear sentence."""

import warnings

import pytest
import torch
from support.torch_release import newer
from torch import nn

import nrm
from nrm import rules
from nrm.errors import CaptureError, InputError
from nrm.operators.custom import GROUPED
from nrm.testing import check_operator

X = torch.tensor([[0.9, -0.2, 0.6], [0.3, 0.7, 0.1], [-0.5, 0.4, 0.8]])


class Experts(nn.Module):
    """Each row goes to one of three experts, as models with many experts compute it."""

    def __init__(self, grouped):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.head = nn.Linear(4, 3), nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.randn(3, 4, 4))
        self.grouped = grouped

    def forward(self, x):
        chosen = self.router(x).softmax(-1).max(-1)
        if self.grouped:
            order = chosen.indices.argsort()
            counts = (chosen.indices[:, None] == torch.arange(3)).sum(0)
            ends = counts.cumsum(0).to(torch.int32)
            rows = torch._grouped_mm(x[order], self.weight, offs=ends)
            hidden = rows[order.argsort()]
        else:
            hidden = torch.bmm(x[:, None], self.weight[chosen.indices])[:, 0]
        return self.head(torch.relu(hidden) * chosen.values[:, None])


@newer("has no grouped matrix product")
def test_a_product_with_the_matrix_of_each_group_is_one_for_each_row():
    ends = torch.tensor([1, 1, 3])
    check_operator(GROUPED, torch.randn(4, 3), torch.randn(3, 3, 2), ends, carries=["input"])
    x = torch.cat([X, X[:, :1].flip(0)], 1)
    for composite in (rules.Zero(), nrm.composites.GammaFlat(0.25)):
        found, expected = (
            nrm.Explainer(Experts(grouped).eval(), composite, batch_axis=None)(x, target=(1, 0))
            for grouped in (True, False)
        )
        torch.testing.assert_close(found.heatmap(), expected.heatmap())
        assert found.diagnostics().worst_cut_deviation < 1e-6


class OtherCache:
    """One that holds who knows what."""

    def get_seq_length(self):
        return 3


def test_a_cache_of_another_kind_is_to_be_left_out():
    model = nn.Linear(3, 2).eval()
    with pytest.raises(InputError, match=r"an? OtherCache .* Leave the cache out"):
        nrm.Explainer(model)(X, past_key_values=OtherCache(), target=0)


# -- discrete pooling of graphs -------------------------------------------------------------------

EDGES = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 4, 0, 4], [1, 0, 2, 1, 3, 2, 4, 3, 4, 0]])


class Pooled(nn.Module):
    def __init__(self, kind, frozen=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.pool, self.head = nn.Linear(3, 4), kind(4, ratio=0.5), nn.Linear(4, 2)
        self.frozen = frozen

    def forward(self, x, edge_index):
        hidden = torch.relu(self.first(x))
        if self.frozen is not None:  # the nodes that stay, with their scores
            kept, scores = self.frozen
            return self.head((hidden[kept] * scores[:, None]).mean(0, keepdim=True))
        return self.head(self.pool(hidden, edge_index)[0].mean(0, keepdim=True))


@pytest.mark.parametrize("kind", ["TopKPooling", "SAGPooling"])
def test_pools_that_keep_the_best_nodes_take_scores_for_gates(kind):
    geometric = pytest.importorskip("torch_geometric.nn")
    model = Pooled(getattr(geometric, kind)).double().eval()
    x = torch.randn((5, 3), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        found = model.pool(torch.relu(model.first(x)), EDGES)
    kept, scores = found[4], found[5]
    R = nrm.Explainer(model, rules.Zero(), bias="input", batch_axis=None)(x, EDGES, target=(0, 1))
    plain = Pooled(getattr(geometric, kind), (kept, scores)).double().eval()
    held = x.clone().requires_grad_()
    with torch.enable_grad():
        plain(held, EDGES)[0, 1].backward()
    torch.testing.assert_close(R.heatmap() * R.scale, held.grad * x)


class WritesIntoParts(nn.Module):
    """What PyG's cumulative sums do: into parts of memory that holds anything."""

    def forward(self, x):
        if x.sum() < -100:  # to be traced
            return x
        memory = x.new_empty((1, 4))
        memory[:, :1] = 0
        torch.cumsum(x[0], 0, out=memory[0, 1:])
        return memory * 2


@pytest.mark.parametrize("kind", ["median", "GPS"])
def test_medians_of_neighbours_and_attention_beside_them(kind):
    """In whatever order the edges come."""
    geometric = pytest.importorskip("torch_geometric.nn")

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            inner = geometric.GCNConv(4, 4)
            gps = kind == "GPS"
            self.conv = geometric.GPSConv(4, inner, heads=2) if gps else None
            self.median = None if gps else geometric.SAGEConv(4, 4, aggr="median")
            self.last = nn.Linear(4, 3)

        def forward(self, x, edges):
            return self.last((self.conv or self.median)(x, edges)).mean(0, keepdim=True)

    torch.manual_seed(0)
    model, x = Network().double().eval(), torch.randn(4, 4).double()
    edges = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 0, 3, 2, 2, 0]])
    explainer = nrm.Explainer(model, batch_axis=None)
    R = explainer(x, edges, target=(0, 1))
    assert R.diagnostics().worst_cut_deviation < 1e-12
    turned = explainer(x, edges.flip(1), target=(0, 1))
    torch.testing.assert_close(turned.heatmap(), R.heatmap())


def test_what_is_written_into_parts_of_a_tensor_is_followed():
    x = X[:1]
    R = nrm.Explainer(WritesIntoParts().eval(), rules.Zero())(x, target=3)
    assert R.graph.captured.method == "eager"
    torch.testing.assert_close(R.heatmap(), x / x.sum())
    torch.testing.assert_close(R.output, torch.tensor([[0.0, 1.8, 1.4, 2.6]]))


# -- models that are no Python --------------------------------------------------------------------


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def test_torchscript_is_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(plain())
    with pytest.raises(CaptureError, match=r"^the model is TorchScript.*in Python"):
        nrm.Explainer(scripted)(X, target=0)
    with pytest.raises(CaptureError, match=r"^its module 'inner' is TorchScript"):
        nrm.Explainer(Around(scripted).eval())(X, target=0)


@newer("exports no compiled modules")
def test_compiled_modules_are_what_they_were_compiled_from():
    expected = nrm.Explainer(plain())(X, target=0).heatmap()
    model = Around(torch.compile(plain())).eval()
    torch.testing.assert_close(nrm.Explainer(model)(X, target=0).heatmap(), expected)


def test_quantised_and_sparse_models_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear})
    with pytest.raises(InputError, match=r"the model is quantised .*floating point"):
        nrm.Explainer(quantised)(X, target=0)
    sparse = plain()
    sparse.register_buffer("adjacency", torch.eye(3).to_sparse())
    with pytest.raises(InputError, match=r"tensor 'adjacency' is sparse .*to_dense"):
        nrm.Explainer(sparse)(X, target=0)
