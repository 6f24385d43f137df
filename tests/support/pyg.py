"""Networks of PyTorch Geometric on a chain of five atoms."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from torch import nn

import nrm
from nrm import rules

BONDS = [(0, 1), (1, 2), (2, 3), (3, 4)]
EDGES = torch.tensor([[*pair] for a, b in BONDS for pair in ((a, b), (b, a))]).T
KINDS = ["GIN", "GCN", "SAGE", "GAT"]


def torch_geometric_layers():
    """torch_geometric.nn, imported after torchvision, which it may import itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch_geometric", reason="torch_geometric is not installed")
        import torch_geometric.explain
        import torch_geometric.nn

    return torch_geometric.nn


def features(nodes=5):
    return torch.rand(nodes, 3, generator=torch.Generator().manual_seed(3)).double()


@cache
def net(pyg, kind, classes=2, graph_level=True):
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


def measure(model, edges=EDGES, target=(0, 1)):
    return nrm.Explainer(model, rules.Gamma(0.25), batch_axis=None)(
        features(), edges, target=target
    )
