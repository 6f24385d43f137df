"""Attention of every kind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support import oracle as o
from support.architectures.describing import Walks, as_array, by_position, parameters
from support.oracle import Neuron


class Attention(nn.Module):
    """Scaled dot-product attention of one head, with every kind of mask."""

    inputs = ((2, 2),)
    mask = np.ones((2, 2), dtype=bool)
    scale = 2**-0.5

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(self.q(x), self.k(x), self.v(x)).flatten(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        for name in ("q", "k", "v"):
            by_position(net, name, walks, "input", 2, getattr(self, name))
        q, k, v = ([[[(n, 2 * t + c) for c in (0, 1)] for t in (0, 1)]] for n in ("q", "k", "v"))
        _attention(net, walks, q, k, v, self.describe_mask, scale=self.scale)
        net.linear("head", walks.column, ":matmul@1", *parameters(self.head))

    def describe_mask(self, net: o.Oracle, walks: Walks, scores: str) -> str:
        if self.mask.all():
            return scores
        chosen = [(scores, i) if open_ else None for i, open_ in enumerate(self.mask.ravel())]
        return net.fill(":masked_fill", chosen, -np.inf)


class CausalAttention(Attention):
    mask = np.array([[True, False], [True, True]])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class MaskedAttention(Attention):
    mask = np.array([[False, True], [True, True]])
    scale = 0.3

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.from_numpy(self.mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)


class AddedMaskAttention(Attention):
    """A mask of numbers that are added, some of them minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("added", torch.tensor([[0.2, -torch.inf], [-0.4, 0.0]]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.added)

    def describe_mask(self, net: o.Oracle, walks: Walks, scores: str) -> str:
        added = self.added.numpy().ravel().clip(-1e300)
        if net.bias_is_input:
            return net.add(":add", walks.column, [(scores, 1.0)], added)
        return net.identity(":add", scores, lambda v: v + added)


class WrittenAttention(CausalAttention):
    """The same, as operators of the model's own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q * self.scale, k.transpose(1, 2))
        closed = torch.tensor([[False, True], [False, False]])
        return torch.matmul(scores.masked_fill(closed, -torch.inf).softmax(-1), v)


class GroupedQueryAttention(nn.Module):
    """Two heads of queries share one of keys and values."""

    inputs = ((2, 1),)

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([2, 1, 1], -1)
        q = q.unflatten(-1, (2, 1)).transpose(1, 2)
        heads = F.scaled_dot_product_attention(
            q, k.unsqueeze(1), v.unsqueeze(1), is_causal=True, enable_gqa=True
        )
        return heads.flatten(1)

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        by_position(net, "qkv", walks, "input", 2, self.qkv)
        q = [[[("qkv", 4 * t + h)] for t in (0, 1)] for h in (0, 1)]
        k = [[[("qkv", 4 * t + 2)] for t in (0, 1)] for _ in (0, 1)]
        v = [[[("qkv", 4 * t + 3)] for t in (0, 1)] for _ in (0, 1)]
        _attention(net, walks, q, k, v, self.describe_mask)
        net.identity(":flatten", ":matmul@1")

    def describe_mask(self, net: o.Oracle, walks: Walks, scores: str) -> str:
        chosen = [None if i % 4 == 1 else (scores, i) for i in range(8)]
        return net.fill(":masked_fill", chosen, -np.inf)


class Multihead(nn.Module):
    """torch's own module: projections in one, two heads, the output projected.

    One sample: the module flattens the batch with the positions.
    """

    inputs = ((2, 2),)
    batch = 1

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(2, 2, batch_first=True)
        nn.init.normal_(self.a.in_proj_bias)
        nn.init.normal_(self.a.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x, x, x, need_weights=False)[0].flatten(1)

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        w, b = as_array(self.a.in_proj_weight), as_array(self.a.in_proj_bias)
        by_position(net, "a:linear", walks, "input", 2, (w, b))
        q, k, v = (
            [[[("a:linear", 6 * t + 2 * part + h)] for t in (0, 1)] for h in (0, 1)]
            for part in range(3)
        )
        _attention(net, walks, q, k, v, lambda net, walks, scores: scores, "a")
        order = [("a:matmul@1", 2 * h + t) for t in (0, 1) for h in (0, 1)]
        net.pick("a:permute", order)
        by_position(net, "a:linear@1", walks, "a:permute", 2, self.a.out_proj)
        net.identity(":flatten", "a:linear@1")


Vectors = list[list[list[Neuron]]]
"""Heads, positions, features."""


def _attention(
    net: o.Oracle,
    walks: Walks,
    q: Vectors,
    k: Vectors,
    v: Vectors,
    mask: Callable[[o.Oracle, Walks, str], str],
    scope: str = "",
    scale: float = 1.0,
) -> None:
    heads, long, features = len(q), len(q[0]), len(q[0][0])
    flat = [n for head in q for row in head for n in row]
    scaled = net.elementwise(f"{scope}:mul" + "@1" * bool(scope), flat, lambda x: scale * x)
    grid = np.arange(heads * long * long).reshape(heads, long, long)
    terms = [
        (int(grid[h, t, s]), (scaled, (h * long + t) * features + c), k[h][s][c])
        for h, t, s, c in np.ndindex(heads, long, long, features)
    ]
    net.product(f"{scope}:matmul", walks.column, grid.size, terms, walks.shares(0, 0))
    masked = mask(net, walks, f"{scope}:matmul")
    weights = net.softmax(
        f"{scope}:softmax", walks.softmax_column, masked, grid.reshape(-1, long).tolist()
    )
    terms = [
        ((h * long + t) * features + c, (weights, int(grid[h, t, s])), v[h][s][c])
        for h, t, s, c in np.ndindex(heads, long, long, features)
    ]
    size = heads * long * features
    net.product(f"{scope}:matmul@1", walks.column, size, terms, walks.shares(1, 0))
