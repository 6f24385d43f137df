"""Walks one by one, as the GNN-LRP scripts go about it: a forward and a backward pass for each.

Nothing here knows of nrm's engine: it is what message passing is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nrm.experiments.mutag.gin import GIN, gammas


def walks_inside(adjacency: Tensor, steps: int, chosen: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every walk of some steps that never leaves the chosen nodes, from the input up."""
    inside = {node: [n for n in chosen if bool(adjacency[node, n])] for node in chosen}

    def extended(walk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(walk) > steps:
            yield walk
            return
        for node in inside[walk[-1]]:
            yield from extended((*walk, node))

    for node in chosen:
        yield from extended((node,))


def walk_relevance(
    model: GIN, adjacency: Tensor, features: Tensor, target: int, walk: Sequence[int]
) -> Tensor:
    """The relevance of one walk `(n_0, ..., n_L)`, in units of the logit.

    Gradients flow through the walk's nodes alone, and through each linear layer as LRP-gamma has
    it: the value of a neuron, the slopes of its modified weights.
    """
    x = features.detach().clone().requires_grad_()
    with torch.enable_grad():
        h = x
        mean = adjacency.to(x.dtype).T / 2
        for block, gamma, node in zip(model.blocks, gammas(len(walk) - 1), walk[1:], strict=True):
            h = mean @ h
            for layer in block.layers:  # type: ignore[union-attr]
                h = _gamma_linear(h, layer.weight, layer.bias, gamma)
                if h.shape[-1] > 10:
                    h = h.clamp(min=0)
            kept = torch.zeros(len(h), 1, dtype=h.dtype)
            kept[node] = 1
            h = h * kept + (h * (1 - kept)).detach()
        logit = (h.sum(0) / 20**0.5)[target]
        (gradient,) = torch.autograd.grad(logit, x)
    return (gradient * features)[walk[0]].sum()


def enumerated_subgraph(
    model: GIN, adjacency: Tensor, features: Tensor, target: int, chosen: Sequence[int]
) -> Tensor:
    """The relevance of a subgraph, walk by walk, in units of the logit."""
    total = features.new_zeros(())
    for walk in walks_inside(adjacency, len(model.blocks), chosen):
        total = total + walk_relevance(model, adjacency, features, target, walk)
    return total


def _gamma_linear(h: Tensor, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
    """The linear layer's value, with the slopes of LRP-gamma."""
    value = (h @ weight.T + bias).detach()
    raised = h @ (weight + gamma * weight.clamp(min=0)).T + bias + gamma * bias.clamp(min=0)
    safe = torch.where(raised == 0, 1.0, raised.detach())
    return raised * torch.where(raised == 0, 0.0, value / safe)
