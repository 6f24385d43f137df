"""What moves neurons about: scatter, fills, interpolation, messages on a graph, tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support import oracle as o
from support.architectures.describing import Walks, as_array, by_position, every, parameters, plus


class Scatter(nn.Module):
    """Sums over indices, where index 1 gets nothing."""

    inputs = ((3,),)
    to = (0, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(3, 3), nn.Linear(15, 2)
        self.register_buffer("index", torch.tensor(self.to))

    def forward(self, x: Tensor) -> Tensor:
        h, batch = self.lift(x), x.shape[0]
        zeros, index = h.new_zeros(batch, 3), self.index.expand(batch, -1)
        a = zeros.scatter_add(1, index, h)
        b = zeros.index_add(1, self.index, h, alpha=2.0)
        c = (zeros + 0.5).scatter_reduce(1, index, h, "sum")
        d = zeros.scatter_reduce(1, index, h, "mean", include_self=False)
        e = a.index_add(1, self.index, h)
        return self.head(torch.cat([a, b, c, d, e], 1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        net.linear("lift", walks.column, "input", *parameters(self.lift))

        def scatter(name: str, weights: Sequence[float], start: float = 0.0) -> None:
            terms = [(j, "lift", i, weights[i]) for i, j in enumerate(self.to)]
            net.weighted(name, walks.column, 3, terms, np.full(3, start))
            net.adopt(name, "empty")
            if not start:
                net.onto_zeros(name, self.to)

        scatter(":scatter_add", (1, 1, 1))
        scatter(":index_add", (2, 2, 2))
        scatter(":scatter_reduce", (1, 1, 1), 0.5)
        scatter(":scatter_reduce@1", (1, 0.5, 0.5))
        terms = [(j, ":scatter_add", j, 1.0) for j in range(3)]
        terms += [(j, "lift", i, 1.0) for i, j in enumerate(self.to)]
        net.weighted(":index_add@1", walks.column, 3, terms)
        net.onto_zeros(":index_add@1", self.to)
        names = (":scatter_add", ":index_add", ":scatter_reduce", ":scatter_reduce@1")
        net.cat(":cat", *names, ":index_add@1")
        net.linear("head", walks.column, ":cat", *parameters(self.head))


class ScatterMax(nn.Module):
    """The largest of what gets to an index; index 1 keeps a constant, and index 0 where larger."""

    inputs = ((3,),)

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.register_buffer("index", torch.tensor(Scatter.to))

    def forward(self, x: Tensor) -> Tensor:
        index = self.index.expand(x.shape[0], -1)
        start = torch.zeros_like(x) + 0.1
        h = start.scatter_reduce(1, index, self.lift(x), "amax", include_self=True)
        return self.head(h)

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        net.linear("lift", walks.column, "input", *parameters(self.lift))
        net.constant(":add", np.full(3, 0.1))
        values = net.values["lift"]
        chosen = []
        for j in range(3):
            best = max(
                [(":add", j)] + [("lift", i) for i in range(3) if Scatter.to[i] == j],
                key=lambda n: 0.1 if n[0] != "lift" else values[n[1]],
            )
            chosen.append(best)
        net.pick(":scatter_reduce", chosen)
        net.linear("head", walks.column, ":scatter_reduce", *parameters(self.head))


class Fills(nn.Module):
    """Padding, masks and triangles: constants in the place of neurons."""

    inputs = ((4,),)
    open_ = np.array([True, False, False, True])

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(4, 4), nn.Linear(16, 2)
        self.register_buffer("mask", torch.from_numpy(self.open_).view(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(self.lift(x), (1, 1), mode="reflect")
        h = F.pad(h, (1, -3), value=0.5).reshape(-1, 2, 2)
        a, b, c = h.masked_fill(~self.mask, 0.7), torch.where(self.mask, h, 0.25), h.tril()
        d = torch.where(self.mask, a, c)
        return self.head(torch.cat([a, b, c, d], 1).flatten(1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        net.linear("lift", walks.column, "input", *parameters(self.lift))
        net.pick(":pad", [("lift", i) for i in (1, 0, 1, 2, 3, 2)])
        net.fill(":pad@1", [None, *every(":pad", 3)], 0.5)
        h = net.identity(":reshape", ":pad@1")
        kept = [(h, i) if open_ else None for i, open_ in enumerate(self.open_)]
        net.fill(":masked_fill", kept, 0.7)
        net.fill(":where", kept, 0.25)
        net.fill(":tril", [(h, 0), None, (h, 2), (h, 3)], 0.0)
        both = [(":masked_fill" if o_ else ":tril", i) for i, o_ in enumerate(self.open_)]
        net.pick(":where@1", both)
        net.cat(":cat", ":masked_fill", ":where", ":tril", ":where@1")
        net.linear("head", walks.column, ":cat", *parameters(self.head))


class Upsampling(nn.Module):
    """Transposed convolutions whose strides leave gaps, interpolation, cumsum, roll, gather."""

    inputs = ((2, 2),)

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 2, 2, stride=3)
        self.two = nn.ConvTranspose2d(2, 2, (1, 2), stride=(1, 3), groups=2, bias=False)
        self.head = nn.Linear(16, 2)
        self.register_buffer("index", torch.tensor([[[0, 3, 3], [1, 2, 4]]]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        g = F.interpolate(h, size=2, mode="nearest")
        g = self.two(g.unsqueeze(2)).flatten(2)
        h = h.cumsum(2).roll(1, 2)
        g = g.gather(2, self.index.expand(g.shape[0], -1, -1))
        return self.head(torch.cat([h, g], 2).flatten(1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        w, b = parameters(self.up)
        terms = [
            (5 * c + 3 * t + k, "input", 2 * i + t, w[i, c, k])
            for c, i, t, k in np.ndindex(2, 2, 2, 2)
        ]
        net.weighted("up", walks.column, 10, terms, np.repeat(b, 5))
        net.adopt("up", "gaps")
        near = [("up", 5 * c + i) for c in (0, 1) for i in (0, 2)]
        net.pick(":upsample_nearest1d", near)
        w, _ = parameters(self.two)
        terms = [
            (5 * c + 3 * t + k, ":upsample_nearest1d", 2 * c + t, w[c, 0, 0, k])
            for c, t, k in np.ndindex(2, 2, 2)
        ]
        net.weighted("two", walks.column, 10, terms)
        net.adopt("two", "gaps")
        terms = [(5 * c + t, "up", 5 * c + s, 1.0) for c in (0, 1) for t in range(5)
                 for s in range(t + 1)]  # fmt: skip
        net.weighted(":cumsum", walks.column, 10, terms)
        rolled = net.pick(":roll", [(":cumsum", 5 * c + (t - 1) % 5) for c, t in np.ndindex(2, 5)])
        picked = [("two", 5 * c + i) for c, row in enumerate(((0, 3, 3), (1, 2, 4))) for i in row]
        net.pick(":gather", picked)
        first, second = every(rolled, 10), every(":gather", 6)
        net.pick(":cat", [*first[:5], *second[:3], *first[5:], *second[3:]])
        net.linear("head", walks.column, ":cat", *parameters(self.head))


class Interpolation(nn.Module):
    """Bilinear interpolation."""

    inputs = ((1, 2, 2),)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(torch.tanh(x), size=(3, 4), mode="bilinear")
        return self.head(h.flatten(1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        net.identity(":tanh", "input", np.tanh)

        def weights(size: int, out: int) -> np.ndarray:
            """Output position, input position."""
            table = np.zeros((out, size))
            for t in range(out):
                at = max((t + 0.5) * size / out - 0.5, 0.0)
                low = min(int(at), size - 1)
                table[t, low] += 1 - (at - low)
                table[t, min(low + 1, size - 1)] += at - low
            return table

        rows, columns = weights(2, 3), weights(2, 4)
        terms = [
            (4 * y + u, ":tanh", 2 * i + j, rows[y, i] * columns[u, j])
            for y, u, i, j in np.ndindex(3, 4, 2, 2)
            if rows[y, i] * columns[u, j] != 0
        ]
        net.weighted(":upsample_bilinear2d", walks.column, 12, terms)
        net.linear("head", walks.column, ":upsample_bilinear2d", *parameters(self.head))


class GraphAttention(nn.Module):
    """A layer of graph attention, its softmax written by hand; nothing gets to node 2."""

    inputs = ((3, 2),)
    start, end = (0, 1, 2, 1), (0, 0, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(2, 2, bias=False)
        self.source, self.sink = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        self.head = nn.Linear(6, 2)
        self.register_buffer("s", torch.tensor(self.start))
        self.register_buffer("t", torch.tensor(self.end))

    def forward(self, x: Tensor) -> Tensor:
        h = self.w(x)
        e = F.leaky_relu(self.source(h)[:, self.s] + self.sink(h)[:, self.t], 0.2).exp()
        total = torch.zeros_like(h[..., :1]).index_add(1, self.t, e)
        weight = e / total[:, self.t]
        h = torch.zeros_like(h).index_add(1, self.t, weight * h[:, self.s])
        return self.head(h.flatten(1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        by_position(net, "w", walks, "input", 3, self.w)
        for name in ("source", "sink"):
            by_position(net, name, walks, "w", 3, getattr(self, name))
        edges = list(zip(self.start, self.end, strict=True))
        terms = [
            (e, *n, 1.0) for e, (s, t) in enumerate(edges) for n in (("source", s), ("sink", t))
        ]
        net.weighted(":add", walks.column, 4, terms)
        net.identity(":leaky_relu", ":add", lambda v: np.where(v < 0, 0.2 * v, v))
        powers = net.values[net.identity(":exp", ":leaky_relu", np.exp)]
        total = np.array([powers[np.array(self.end) == t].sum() for t in self.end])
        net.identity(":div", ":exp", lambda v: v / total)
        value = [("w", 2 * s + c) for s, _ in edges for c in (0, 1)]
        weight = [(":div", e) for e in range(4) for _ in (0, 1)]
        net.split(":mul", [weight, value], walks.shares(1, 0))
        terms = [(2 * t + c, ":mul", 2 * e + c, 1.0) for e, (_, t) in enumerate(edges)
                 for c in (0, 1)]  # fmt: skip
        net.weighted(":index_add@1", walks.column, 6, terms, np.zeros(6))
        net.adopt(":index_add@1", "empty")
        net.onto_zeros(":index_add@1", (2 * t + c for t in self.end for c in (0, 1)))
        net.linear("head", walks.column, ":index_add@1", *parameters(self.head))


class Tokens(nn.Module):
    """Embedded tokens behind a class token, with positions added, and a feature beside them."""

    inputs = (("int", 2), (2,))

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 2), nn.Linear(8, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 2))
        self.position = nn.Parameter(torch.randn(3, 2))

    def forward(self, tokens: Tensor, extra: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], 1) + self.position
        return self.head(torch.cat([h.flatten(1), extra], 1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("embed", as_array(self.embed.weight)[x[0]])
        net.input("extra", x[1])
        net.constant(":expand", as_array(self.token).ravel())
        net.cat(":cat", ":expand", "embed")
        position = as_array(self.position).ravel()
        plus(net, ":add", walks, every(":cat", 6), position)
        net.cat(":cat@1", ":add", "extra")
        net.linear("head", walks.column, ":cat@1", *parameters(self.head))
