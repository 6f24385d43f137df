"""Norms, softmax, and products with matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support import oracle as o
from support.architectures.describing import Walks, as_array, every, parameters, randomize


class Norms(nn.Module):
    """Group, instance and layer norm over the last axis, RMS norm."""

    inputs = ((1, 3),)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group = nn.Conv1d(1, 2, 2), nn.GroupNorm(1, 2)
        self.instance, self.layer = nn.InstanceNorm1d(2, affine=True), nn.LayerNorm(2)
        self.rms, self.head = nn.RMSNorm(2), nn.Linear(4, 2)
        randomize(self.group, self.instance, self.layer, self.rms)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rms(self.group(self.conv(x)))
        h = self.layer(h) + self.instance(h)
        return self.head(h.flatten(1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        w, b = parameters(self.conv)
        terms = [(2 * c + t, "input", t + k, w[c, 0, k]) for c, t, k in np.ndindex(2, 2, 2)]
        net.weighted("conv", walks.column, 4, terms, np.repeat(b, 2))

        def norm(layer: str, x: str, groups: list[list[int]], by_channel: bool) -> None:
            gain, bias = parameters(getattr(self, layer))
            spread = np.repeat if by_channel else np.tile
            gain, bias = spread(gain, 2), spread(bias, 2)
            if walks.norm == "linear":
                net.normalize(layer, walks.column, x, groups, gain, bias)
                return
            net.normalize(layer, walks.column, x, groups, gain, bias)
            values = net.values[layer]
            net.leaves = [leaf for leaf in net.leaves if leaf != f"{layer}.bias"]
            net.identity(layer, x, lambda _: values)

        norm("group", "conv", [[0, 1, 2, 3]], by_channel=True)
        gain = np.tile(as_array(self.rms.weight), 2)
        eps = np.finfo(np.float64).eps

        def scaled(v: np.ndarray) -> np.ndarray:
            square = np.repeat((v.reshape(2, 2) ** 2).mean(1), 2)
            return gain * v / np.sqrt(square + eps)

        net.identity("rms", "group", scaled)
        norm("layer", "rms", [[0, 1], [2, 3]], by_channel=False)
        norm("instance", "rms", [[0, 1], [2, 3]], by_channel=True)
        net.add(":add", walks.column, [("layer", 1.0), ("instance", 1.0)])
        net.linear("head", walks.column, ":add", *parameters(self.head))


class Classifier(nn.Module):
    """A softmax at the output, over an axis that is not the last."""

    inputs = ((3,),)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).unflatten(1, (3, 2)).softmax(1).flatten(1)

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        net.linear("head", walks.column, "input", *parameters(self.head))
        net.softmax(":softmax", walks.softmax_column, "head", [[0, 2, 4], [1, 3, 5]])
        net.identity(":flatten", ":softmax")


class Products(nn.Module):
    """Products of two activations: matmul, bmm, einsum, addmm by batch, a scalar product."""

    inputs = ((2,), (2,))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(2, 4)
        self.added = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.a(x).unflatten(1, (2, 2)), self.b(y).unflatten(1, (2, 2))
        c = torch.einsum("bik,bjk->bij", a, b)
        added = self.added.expand(x.shape[0], -1, -1)
        d = torch.baddbmm(added, c, a, beta=0.5, alpha=-2.0)
        return torch.matmul(d, b)[:, 0]

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("x", x[0])
        net.input("y", x[1])
        net.linear("a", walks.column, "x", *parameters(self.a))
        net.linear("b", walks.column, "y", *parameters(self.b))
        alphas = walks.shares(0, 0)
        sites = list(np.ndindex(2, 2, 2))
        terms = [(2 * i + j, ("a", 2 * i + k), ("b", 2 * j + k)) for i, j, k in sites]
        net.product(":einsum", walks.column, 4, terms, alphas)
        terms = [(2 * i + j, (":einsum", 2 * i + k), ("a", 2 * k + j)) for i, j, k in sites]
        net.product(":baddbmm", walks.column, 4, terms, alphas)
        added = 0.5 * as_array(self.added).ravel()
        net.values[":baddbmm"] = -2 * net.values[":baddbmm"] + added
        for j in range(4):
            for parent in net.parents[":baddbmm", j]:
                parent.weight *= -2
            if net.bias_is_input:
                leaf = (":baddbmm.bias", j)
                net.parents[":baddbmm", j].append(o.Parent(leaf, 1.0, float(added[j]), True))
        if net.bias_is_input:
            net.leaves.append(":baddbmm.bias")
        terms = [(2 * i + j, (":baddbmm", 2 * i + k), ("b", 2 * k + j)) for i, j, k in sites]
        net.product(":matmul", walks.column, 4, terms, alphas)
        net.pick(":select", every(":matmul", 2))


class Linears(nn.Module):
    """Linear maps by every operator that computes one, with constants on either side."""

    inputs = ((2,),)

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3))
        self.left, self.right = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3, 2))
        self.mixed, self.vector = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.addmm(self.b, x, self.w, beta=2.0, alpha=0.5))
        h = F.linear(h, self.right.T).unsqueeze(-1)
        h = torch.matmul(self.mixed, h)
        h = torch.einsum("io,bij->bjo", self.left, h)
        a = torch.einsum("bjo,oi->bi", h, self.right)
        return torch.cat([torch.mm(a, self.mixed), (a @ self.vector).unsqueeze(-1)], 1)

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        w, b, left, right, mixed, vector = (
            as_array(t) for t in (self.w, self.b, self.left, self.right, self.mixed, self.vector)
        )
        net.input("input", x[0])
        net.linear(":addmm", walks.column, "input", 0.5 * w.T, 2 * b)
        net.identity(":tanh", ":addmm", np.tanh)
        net.linear(":linear", walks.column, ":tanh", right.T, None)
        net.linear(":matmul", walks.column, ":linear", mixed, None)
        net.linear(":einsum", walks.column, ":matmul", left.T, None)
        net.linear(":einsum@1", walks.column, ":einsum", right.T, None)
        net.linear(":mm", walks.column, ":einsum@1", mixed.T, None)
        net.linear(":matmul@1", walks.column, ":einsum@1", vector[None], None)
        net.cat(":cat", ":mm", ":matmul@1")
