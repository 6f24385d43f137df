"""Graph networks: PyTorch Geometric's convolutions and poolings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures.cases import Case, case


class GraphNet(nn.Module):
    """Three graph convolutions and a linear layer: scores for every node."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(8, 16), layer(16, 16), layer(16, 16)])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x, edge_index))
        scores: Tensor = self.head(x)
        return scores


def _graph(layer: Callable[[Any, int, int], nn.Module]) -> Case:
    """A network on a random graph of 20 nodes and 60 edges."""
    geometric = importlib.import_module("torch_geometric.nn")
    x, edges = torch.randn(20, 8), torch.randint(20, (2, 60))
    model = GraphNet(lambda width, out: layer(geometric, width, out))
    return Case(model, (x, edges), target=(4, None))


@case("GCN", "torch_geometric")
def _gcn() -> Case:
    return _graph(lambda pyg, width, out: pyg.GCNConv(width, out))


@case("GIN", "torch_geometric")
def _gin() -> Case:
    return _graph(
        lambda pyg, width, out: pyg.GINConv(
            nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out)), train_eps=True
        )
    )


@case("GraphSAGE", "torch_geometric")
def _sage() -> Case:
    return _graph(lambda pyg, width, out: pyg.SAGEConv(width, out))


@case("GAT", "torch_geometric")
def _gat() -> Case:
    return _graph(lambda pyg, width, out: pyg.GATConv(width, out // 2, heads=2))


def _perceptron(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out))


@case("ChebConv", "torch_geometric")
def _cheb() -> Case:
    return _graph(lambda pyg, width, out: pyg.ChebConv(width, out, K=3))


@case("SGConv", "torch_geometric")
def _sgc() -> Case:
    return _graph(lambda pyg, width, out: pyg.SGConv(width, out, K=2))


@case("GraphConv", "torch_geometric")
def _graph_conv() -> Case:
    return _graph(lambda pyg, width, out: pyg.GraphConv(width, out))


@case("TAGConv", "torch_geometric")
def _tag() -> Case:
    return _graph(lambda pyg, width, out: pyg.TAGConv(width, out, K=2))


@case("ARMAConv", "torch_geometric")
def _arma() -> Case:
    return _graph(lambda pyg, width, out: pyg.ARMAConv(width, out, num_stacks=2, num_layers=2))


@case("APPNP", "torch_geometric")
def _appnp() -> Case:
    return _graph(lambda pyg, width, out: Propagated(nn.Linear(width, out), pyg.APPNP(3, 0.2)))


class Propagated(nn.Module):
    """A linear layer of nodes, and what passes its results along the edges."""

    def __init__(self, linear: nn.Module, convolution: nn.Module) -> None:
        super().__init__()
        self.linear, self.convolution = linear, convolution

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        made: Tensor = self.convolution(self.linear(x), edge_index)
        return made


@case("EdgeConv", "torch_geometric")
def _edge_conv() -> Case:
    return _graph(lambda pyg, width, out: pyg.EdgeConv(_perceptron(2 * width, out)))


@case("GATv2", "torch_geometric")
def _gatv2() -> Case:
    return _graph(lambda pyg, width, out: pyg.GATv2Conv(width, out // 2, heads=2))


@case("TransformerConv", "torch_geometric")
def _transformer_conv() -> Case:
    return _graph(lambda pyg, width, out: pyg.TransformerConv(width, out // 2, heads=2))


@case("GatedGraphConv", "torch_geometric")
def _gated_graph() -> Case:
    return _graph(lambda pyg, width, out: pyg.GatedGraphConv(out, num_layers=2))


@case("GraphSAGE, largest of the neighbours", "torch_geometric")
def _sage_max() -> Case:
    return _graph(lambda pyg, width, out: pyg.SAGEConv(width, out, aggr="max"))


@case("PNA, mean, smallest and largest", "torch_geometric")
def _pna() -> Case:
    degrees = torch.tensor([1, 4, 6, 5, 3, 1])
    return _graph(
        lambda pyg, width, out: pyg.PNAConv(
            width,
            out,
            aggregators=["mean", "min", "max"],
            scalers=["identity", "amplification"],
            deg=degrees,
        )
    )


@case("PNA, with the spread", "torch_geometric")
def _pna_std() -> Case:
    degrees = torch.tensor([1, 4, 6, 5, 3, 1])
    return _graph(
        lambda pyg, width, out: pyg.PNAConv(
            width, out, aggregators=["mean", "std"], scalers=["identity"], deg=degrees
        )
    )


class EdgeFeatures(nn.Module):
    """A GIN that reads what its edges say, and relations of several kinds."""

    def __init__(self, pyg: Any) -> None:
        super().__init__()
        self.first = pyg.GINEConv(_perceptron(8, 16), edge_dim=4)
        self.second = pyg.NNConv(16, 16, nn.Sequential(nn.Linear(4, 256)), aggr="mean")
        self.third = pyg.RGCNConv(16, 16, num_relations=3)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor, features: Tensor, kinds: Tensor) -> Tensor:
        x = torch.relu(self.first(x, edge_index, features))
        x = torch.relu(self.second(x, edge_index, features))
        scores: Tensor = self.head(torch.relu(self.third(x, edge_index, kinds)))
        return scores


def _pyg() -> Any:
    return importlib.import_module("torch_geometric.nn")


@case("GINE, NNConv and RGCN, features of edges", "torch_geometric")
def _edge_features() -> Case:
    x, edges = torch.randn(20, 8), torch.randint(20, (2, 60))
    args = (x, edges, torch.randn(60, 4), torch.randint(3, (60,)))
    return Case(EdgeFeatures(_pyg()), args, target=(4, None))


class Pooled(nn.Module):
    """Two graph convolutions, a pooling of nodes, and scores for each graph of a batch."""

    def __init__(self, pyg: Any, pools: tuple[str, ...], coarser: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = pyg.GraphConv(8, 16), pyg.GraphConv(16, 16)
        self.coarser, self.norm = coarser, pyg.BatchNorm(16)
        self.pools = [getattr(pyg, f"global_{name}_pool") for name in pools]
        self.head = nn.Linear(16 * len(pools), 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x, edge_index)))
        if self.coarser is not None:
            x, edge_index, _, batch, *_ = self.coarser(x, edge_index, batch=batch)
        x = torch.relu(self.second(x, edge_index))
        scores: Tensor = self.head(torch.cat([pool(x, batch, 2) for pool in self.pools], 1))
        return scores


def _pooled(*pools: str, coarser: Callable[[Any], nn.Module] | None = None) -> Case:
    """Two graphs of ten nodes each, in one batch; the first is scored."""
    pyg = _pyg()
    edges = torch.cat([torch.randint(10, (2, 25)), torch.randint(10, 20, (2, 25))], 1)
    batch = torch.arange(2).repeat_interleave(10)
    model = Pooled(pyg, pools, coarser(pyg) if coarser else None)
    args = (torch.randn(20, 8), edges, batch)
    return Case(model, args, target=(0, None), options={"batch_axis": None})


@case("global poolings: sum, mean, largest", "torch_geometric")
def _global_pools() -> Case:
    return _pooled("add", "mean", "max")


@case("TopKPooling", "torch_geometric")
def _top_k() -> Case:
    return _pooled("mean", coarser=lambda pyg: pyg.TopKPooling(16, ratio=0.5))


@case("SAGPooling", "torch_geometric")
def _sag() -> Case:
    return _pooled("mean", coarser=lambda pyg: pyg.SAGPooling(16, ratio=0.5))


class DensePooled(nn.Module):
    """Nodes softly assigned to clusters, on a dense adjacency matrix (DiffPool)."""

    def __init__(self, pyg: Any) -> None:
        super().__init__()
        self.pool = pyg.dense_diff_pool
        self.assign, self.embed = pyg.DenseGCNConv(8, 4), pyg.DenseGCNConv(8, 16)
        self.second, self.head = pyg.DenseGCNConv(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        assigned, embedded = self.assign(x, adjacency), torch.relu(self.embed(x, adjacency))
        x, adjacency, *_ = self.pool(embedded, adjacency, assigned)
        scores: Tensor = self.head(torch.relu(self.second(x, adjacency)).mean(1))
        return scores


@case("DiffPool, dense", "torch_geometric")
def _diff_pool() -> Case:
    adjacency = (torch.rand(1, 10, 10) < 0.3).float()
    return Case(DensePooled(_pyg()), (torch.randn(1, 10, 8), adjacency), leaves=("x",))
