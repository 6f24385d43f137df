"""Small networks with every kind of operator, each as a torch module and as an oracle.

A network says neuron by neuron how walks go, for any contribution rule, any alpha of its products
and either setting of the biases. Variables that only move neurons about are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nrm import rules
from nrm.composites import Composite, kind
from support import oracle as o
from support.networks import RULES
from support.oracle import Neuron

ALPHAS: dict[str, rules.Alpha] = {
    "value": rules.ValueTakesAll(),
    "uniform": rules.Uniform(),
    "shares": rules.Shares(0.75, 0.25),
    "order": rules.InOrder(0.4, 0.6),
}


@dataclass(frozen=True)
class Walks:
    """How walks go: the rule of sums, the alpha of products, what else is an identity or not."""

    rule: str = "zero"
    alpha: str = "value"
    bias: str = "drop"
    softmax: str = "identity"
    norm: str = "linear"

    @property
    def column(self) -> o.ColumnRule:
        return RULES[self.rule][1]

    @property
    def softmax_column(self) -> o.ColumnRule | None:
        return self.column if self.softmax == "taylor" else None

    def shares(self, *gates: int) -> list[float]:
        """The alphas of a product of two factors, of which those with the larger rank are gates."""
        alike = gates[0] == gates[1]
        if self.alpha == "order":
            return [0.4, 0.6]
        if self.alpha == "uniform" or alike:
            return [0.5, 0.5]
        value = {"value": 1.0, "shares": 0.75}[self.alpha]
        return [value, 1 - value] if gates[0] < gates[1] else [1 - value, value]

    @property
    def composite(self) -> Composite:
        rule = RULES[self.rule][0]
        choices: list = [(kind("softmax"), rule)] if self.softmax == "taylor" else []
        if self.norm == "identity":
            choices.append((kind("layernorm", "groupnorm", "instancenorm"), rules.Identity()))
        return Composite(choices, rule, alpha_default=ALPHAS[self.alpha])

    def __str__(self) -> str:
        parts = [self.rule, self.alpha, self.bias]
        parts += [self.softmax] if self.softmax == "taylor" else []
        return "-".join(parts + ([self.norm] if self.norm == "identity" else []))


# -- attention -----------------------------------------------------------------------------------


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
            _by_position(net, name, walks, "input", 2, getattr(self, name))
        q, k, v = ([[[(n, 2 * t + c) for c in (0, 1)] for t in (0, 1)]] for n in ("q", "k", "v"))
        _attention(net, walks, q, k, v, self.describe_mask, scale=self.scale)
        net.linear("head", walks.column, ":matmul@1", *_parameters(self.head))

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
        _by_position(net, "qkv", walks, "input", 2, self.qkv)
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
        w, b = _numpy(self.a.in_proj_weight), _numpy(self.a.in_proj_bias)
        _by_position(net, "a:linear", walks, "input", 2, (w, b))
        q, k, v = (
            [[[("a:linear", 6 * t + 2 * part + h)] for t in (0, 1)] for h in (0, 1)]
            for part in range(3)
        )
        _attention(net, walks, q, k, v, lambda net, walks, scores: scores, "a")
        order = [("a:matmul@1", 2 * h + t) for t in (0, 1) for h in (0, 1)]
        net.pick("a:permute", order)
        _by_position(net, "a:linear@1", walks, "a:permute", 2, self.a.out_proj)
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


# -- gates and recurrent cells -------------------------------------------------------------------


class Gates(nn.Module):
    """A gated input, SwiGLU, and a gated linear unit."""

    inputs = ((2,),)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.up = nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 3)
        self.down, self.glu = nn.Linear(3, 4), nn.GLU()

    def forward(self, x: Tensor) -> Tensor:
        h = x * torch.sigmoid(self.a(x))
        return self.glu(self.down(F.silu(self.gate(h)) * self.up(h)))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        net.linear("a", walks.column, "input", *_parameters(self.a))
        net.identity(":sigmoid", "a", _sigmoid)
        h = net.split(":mul", [_all("input", 2), _all(":sigmoid", 2)], walks.shares(0, 1))
        net.linear("gate", walks.column, h, *_parameters(self.gate))
        net.linear("up", walks.column, h, *_parameters(self.up))
        net.identity(":silu", "gate", lambda v: v * _sigmoid(v))
        h = net.split(":mul@1", [_all(":silu", 3), _all("up", 3)], walks.shares(1, 0))
        net.linear("down", walks.column, h, *_parameters(self.down))
        net.elementwise("glu:sigmoid", _all("down", 4)[2:], _sigmoid)
        net.split("glu", [_all("down", 2), _all("glu:sigmoid", 2)], walks.shares(0, 1))


class LSTMCell(nn.Module):
    """One step, from a state that is an input too."""

    inputs = ((2,), (2,), (2,))

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(2, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return self.head(torch.cat(self.cell(x, (h, c)), 1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        for name, value in zip("xhc", x, strict=True):
            net.input(name, value)
        cell = self.cell
        net.linear("cell:linear", walks.column, "x", *_pair(cell, "ih"))
        net.linear("cell:linear@1", walks.column, "h", *_pair(cell, "hh"))
        net.add("cell:add", walks.column, [("cell:linear@1", 1.0), ("cell:linear", 1.0)])
        _lstm_step(net, walks, "cell", "c", 0, "cell:add@1", "cell")
        net.cat(":cat", "cell", "cell:add@1")
        net.linear("head", walks.column, ":cat", *_parameters(self.head))


class LSTM(nn.Module):
    """Two steps from a state of zeros."""

    inputs = ((2, 2),)

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        w, bias = _pair(self.rnn, "ih_l0")
        w_hh, b_hh = _pair(self.rnn, "hh_l0")
        _by_position(net, "rnn:linear", walks, "input", 2, (w, bias))
        _plus(net, "rnn:add", walks, _all("rnn:linear", 8), b_hh)
        _lstm_step(net, walks, "rnn", None, 0, "rnn.c_l0[0]", "rnn.h_l0[0]")
        net.linear("rnn:linear@2", walks.column, "rnn.h_l0[0]", w_hh, b_hh)
        after = net.pick("rnn:unbind.1", _all("rnn:linear", 16)[8:])
        net.add("rnn:add@2", walks.column, [("rnn:linear@2", 1.0), (after, 1.0)])
        _lstm_step(net, walks, "rnn", "rnn.c_l0[0]", 1, "rnn.c_l0[1]", "rnn.h_l0[1]")
        net.identity(":select", "rnn.h_l0[1]")


def _lstm_step(
    net: o.Oracle, walks: Walks, scope: str, state: str | None, step: int, cell: str, hidden: str
) -> None:
    """The gates i, f, g, o of the sum `<scope>:add`; without a state it is a constant leaf."""

    def name(op: str, number: int) -> str:
        return f"{scope}:{op}" + (f"@{number}" if number else "")

    gates = _all(name("add", 2 * step), 8)
    forget = net.elementwise(name("sigmoid", 3 * step), gates[2:4], _sigmoid)
    if state is None:
        state = net.input(f"{scope}:select@1", np.zeros(2))
    kept = net.split(name("mul", 3 * step), [_all(forget, 2), _all(state, 2)], walks.shares(2, 0))
    net.elementwise(name("sigmoid", 3 * step + 1), gates[:2], _sigmoid)
    net.elementwise(name("tanh", 2 * step), gates[4:6], np.tanh)
    added = net.split(
        name("mul", 3 * step + 1),
        [_all(name("sigmoid", 3 * step + 1), 2), _all(name("tanh", 2 * step), 2)],
        walks.shares(2, 1),
    )
    net.add(cell, walks.column, [(kept, 1.0), (added, 1.0)])
    net.elementwise(name("sigmoid", 3 * step + 2), gates[6:], _sigmoid)
    net.identity(name("tanh", 2 * step + 1), cell, np.tanh)
    squashed = _all(name("tanh", 2 * step + 1), 2)
    net.split(hidden, [_all(name("sigmoid", 3 * step + 2), 2), squashed], walks.shares(2, 1))


class GRUCell(nn.Module):
    inputs = ((2,), (2,))

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, 2)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell(x, h)

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("x", x[0])
        net.input("h", x[1])
        net.linear("cell:linear", walks.column, "x", *_pair(self.cell, "ih"))
        net.linear("cell:linear@1", walks.column, "h", *_pair(self.cell, "hh"))
        from_x, from_h = _all("cell:linear", 6), _all("cell:linear@1", 6)
        _gru_step(net, walks, "cell", from_x, from_h, "h", 0, "cell")


class GRU(nn.Module):
    """Two steps; a state of zeros makes what the first takes from it a constant."""

    inputs = ((2, 2),)

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        w_hh, b_hh = _pair(self.rnn, "hh_l0")
        _by_position(net, "rnn:linear", walks, "input", 2, _pair(self.rnn, "ih_l0"))
        first, second = _all("rnn:linear", 12)[:6], _all("rnn:linear", 12)[6:]
        _gru_step(net, walks, "rnn", first, b_hh, None, 0, "rnn.h_l0[0]")
        net.linear("rnn:linear@2", walks.column, "rnn.h_l0[0]", w_hh, b_hh)
        state = _all("rnn:linear@2", 6)
        _gru_step(net, walks, "rnn", second, state, "rnn.h_l0[0]", 1, "rnn.h_l0[1]")
        net.identity(":select", "rnn.h_l0[1]")


def _gru_step(
    net: o.Oracle,
    walks: Walks,
    scope: str,
    x: list[Neuron],
    h: list[Neuron] | np.ndarray,
    state: str | None,
    step: int,
    hidden: str,
) -> None:
    """Gates r, z and the candidate n; without a state what `h` adds is a constant."""

    def name(op: str, number: int) -> str:
        return f"{scope}:{op}" + (f"@{number}" if number else "")

    def gate(number: int, part: slice) -> str:
        """Add what comes from the state, and squash."""
        added = name("add", 4 * step + number)
        if isinstance(h, np.ndarray):
            _plus(net, added, walks, x[part], h[part])
        else:
            terms = [
                (j, *neuron, 1.0)
                for j, both in enumerate(zip(x[part], h[part], strict=True))
                for neuron in both
            ]
            net.weighted(added, walks.column, 2, terms)
        return net.identity(name("sigmoid", 2 * step + number), added, _sigmoid)

    update, reset = gate(0, slice(2, 4)), gate(1, slice(0, 2))
    constant = isinstance(h, np.ndarray)
    into = _all(net.input(f"{scope}:chunk.2@1", h[4:]), 2) if constant else h[4:]
    candidate = net.split(name("mul", 3 * step), [_all(reset, 2), into], walks.shares(2, 0))
    terms = [(j, *n, 1.0) for part in (x[4:], _all(candidate, 2)) for j, n in enumerate(part)]
    net.weighted(name("add", 4 * step + 2), walks.column, 2, terms)
    new = net.identity(name("tanh", step), name("add", 4 * step + 2), np.tanh)
    if net.bias_is_input:
        rest = net.add(name("rsub", step), walks.column, [(update, -1.0)], np.ones(2))
    else:
        rest = net.identity(name("rsub", step), update, lambda v: 1 - v)
    renewed = net.split(
        name("mul", 3 * step + 1), [_all(new, 2), _all(rest, 2)], walks.shares(1, 2)
    )
    if state is None:
        state = net.input(f"{scope}:select", np.zeros(2))
    kept = net.split(
        name("mul", 3 * step + 2), [_all(state, 2), _all(update, 2)], walks.shares(0, 2)
    )
    net.add(hidden, walks.column, [(renewed, 1.0), (kept, 1.0)])


class RNN(nn.Module):
    """A plain recurrent layer in both directions, then one more step by a cell."""

    inputs = ((2, 2),)

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, 1, batch_first=True, bidirectional=True, nonlinearity="relu")
        self.cell = nn.RNNCell(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x[:, 0], self.rnn(x)[0][:, 1])

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        number = 0
        for suffix, order in (("", (0, 1)), ("_reverse", (1, 0))):
            w_hh, b_hh = _pair(self.rnn, "hh_l0" + suffix)
            into = "rnn:linear" + (f"@{number}" if number else "")
            _by_position(net, into, walks, "input", 2, _pair(self.rnn, "ih_l0" + suffix))
            state = None
            for step, t in enumerate(order):
                total = 2 * (suffix != "") + step
                added = "rnn:add" + (f"@{total}" if total else "")
                if state is None:
                    _plus(net, added, walks, [(into, t)], b_hh)
                else:
                    linear = f"rnn:linear@{number + 2}"
                    net.linear(linear, walks.column, state, w_hh, b_hh)
                    terms = [(0, linear, 0, 1.0), (0, into, t, 1.0)]
                    net.weighted(added, walks.column, 1, terms)
                state = net.relu(f"rnn.h_l0{suffix}[{t}]", added)
            number += 3
        net.pick(":select@1", [("rnn.h_l0[1]", 0), ("rnn.h_l0_reverse[1]", 0)])
        net.pick(":select", _all("input", 2))
        net.linear("cell:linear", walks.column, ":select", *_pair(self.cell, "ih"))
        net.linear("cell:linear@1", walks.column, ":select@1", *_pair(self.cell, "hh"))
        net.add("cell:add", walks.column, [("cell:linear@1", 1.0), ("cell:linear", 1.0)])
        net.identity("cell", "cell:add", np.tanh)


# -- norms and softmax ---------------------------------------------------------------------------


class Norms(nn.Module):
    """Group, instance and layer norm over the last axis, RMS norm."""

    inputs = ((1, 3),)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group = nn.Conv1d(1, 2, 2), nn.GroupNorm(1, 2)
        self.instance, self.layer = nn.InstanceNorm1d(2, affine=True), nn.LayerNorm(2)
        self.rms, self.head = nn.RMSNorm(2), nn.Linear(4, 2)
        _randomize(self.group, self.instance, self.layer, self.rms)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rms(self.group(self.conv(x)))
        h = self.layer(h) + self.instance(h)
        return self.head(h.flatten(1))

    def describe(self, x: list[np.ndarray], net: o.Oracle, walks: Walks) -> None:
        net.input("input", x[0])
        w, b = _parameters(self.conv)
        terms = [(2 * c + t, "input", t + k, w[c, 0, k]) for c, t, k in np.ndindex(2, 2, 2)]
        net.weighted("conv", walks.column, 4, terms, np.repeat(b, 2))

        def norm(layer: str, x: str, groups: list[list[int]], by_channel: bool) -> None:
            gain, bias = _parameters(getattr(self, layer))
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
        gain = np.tile(_numpy(self.rms.weight), 2)
        eps = np.finfo(np.float64).eps

        def scaled(v: np.ndarray) -> np.ndarray:
            square = np.repeat((v.reshape(2, 2) ** 2).mean(1), 2)
            return gain * v / np.sqrt(square + eps)

        net.identity("rms", "group", scaled)
        norm("layer", "rms", [[0, 1], [2, 3]], by_channel=False)
        norm("instance", "rms", [[0, 1], [2, 3]], by_channel=True)
        net.add(":add", walks.column, [("layer", 1.0), ("instance", 1.0)])
        net.linear("head", walks.column, ":add", *_parameters(self.head))


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
        net.linear("head", walks.column, "input", *_parameters(self.head))
        net.softmax(":softmax", walks.softmax_column, "head", [[0, 2, 4], [1, 3, 5]])
        net.identity(":flatten", ":softmax")


# -- matrix products -----------------------------------------------------------------------------


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
        net.linear("a", walks.column, "x", *_parameters(self.a))
        net.linear("b", walks.column, "y", *_parameters(self.b))
        alphas = walks.shares(0, 0)
        sites = list(np.ndindex(2, 2, 2))
        terms = [(2 * i + j, ("a", 2 * i + k), ("b", 2 * j + k)) for i, j, k in sites]
        net.product(":einsum", walks.column, 4, terms, alphas)
        terms = [(2 * i + j, (":einsum", 2 * i + k), ("a", 2 * k + j)) for i, j, k in sites]
        net.product(":baddbmm", walks.column, 4, terms, alphas)
        added = 0.5 * _numpy(self.added).ravel()
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
        net.pick(":select", _all(":matmul", 2))


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
            _numpy(t) for t in (self.w, self.b, self.left, self.right, self.mixed, self.vector)
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


# -- moving neurons about ------------------------------------------------------------------------


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
        net.linear("lift", walks.column, "input", *_parameters(self.lift))

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
        net.linear("head", walks.column, ":cat", *_parameters(self.head))


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
        net.linear("lift", walks.column, "input", *_parameters(self.lift))
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
        net.linear("head", walks.column, ":scatter_reduce", *_parameters(self.head))


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
        net.linear("lift", walks.column, "input", *_parameters(self.lift))
        net.pick(":pad", [("lift", i) for i in (1, 0, 1, 2, 3, 2)])
        net.fill(":pad@1", [None, *_all(":pad", 3)], 0.5)
        h = net.identity(":reshape", ":pad@1")
        kept = [(h, i) if open_ else None for i, open_ in enumerate(self.open_)]
        net.fill(":masked_fill", kept, 0.7)
        net.fill(":where", kept, 0.25)
        net.fill(":tril", [(h, 0), None, (h, 2), (h, 3)], 0.0)
        both = [(":masked_fill" if o_ else ":tril", i) for i, o_ in enumerate(self.open_)]
        net.pick(":where@1", both)
        net.cat(":cat", ":masked_fill", ":where", ":tril", ":where@1")
        net.linear("head", walks.column, ":cat", *_parameters(self.head))


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
        w, b = _parameters(self.up)
        terms = [
            (5 * c + 3 * t + k, "input", 2 * i + t, w[i, c, k])
            for c, i, t, k in np.ndindex(2, 2, 2, 2)
        ]
        net.weighted("up", walks.column, 10, terms, np.repeat(b, 5))
        net.adopt("up", "gaps")
        near = [("up", 5 * c + i) for c in (0, 1) for i in (0, 2)]
        net.pick(":upsample_nearest1d", near)
        w, _ = _parameters(self.two)
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
        first, second = _all(rolled, 10), _all(":gather", 6)
        net.pick(":cat", [*first[:5], *second[:3], *first[5:], *second[3:]])
        net.linear("head", walks.column, ":cat", *_parameters(self.head))


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
        net.linear("head", walks.column, ":upsample_bilinear2d", *_parameters(self.head))


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
        _by_position(net, "w", walks, "input", 3, self.w)
        for name in ("source", "sink"):
            _by_position(net, name, walks, "w", 3, getattr(self, name))
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
        net.linear("head", walks.column, ":index_add@1", *_parameters(self.head))


# -- tokens --------------------------------------------------------------------------------------


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
        net.input("embed", _numpy(self.embed.weight)[x[0]])
        net.input("extra", x[1])
        net.constant(":expand", _numpy(self.token).ravel())
        net.cat(":cat", ":expand", "embed")
        position = _numpy(self.position).ravel()
        _plus(net, ":add", walks, _all(":cat", 6), position)
        net.cat(":cat@1", ":add", "extra")
        net.linear("head", walks.column, ":cat@1", *_parameters(self.head))


NETWORKS = {
    net.__name__: net
    for net in (
        Attention, CausalAttention, MaskedAttention, AddedMaskAttention, WrittenAttention,
        GroupedQueryAttention, Multihead, Gates, LSTMCell, LSTM, GRUCell, GRU, RNN, Norms,
        Classifier, Products, Linears, Scatter, ScatterMax, Fills, Upsampling, Interpolation,
        GraphAttention, Tokens,
    )
}  # fmt: skip


@dataclass
class Case:
    """One network with one input, mostly of batch 2, and an oracle for each sample."""

    model: nn.Module
    inputs: list[Tensor]
    oracles: list[o.Oracle]


@cache
def built(network: str, seed: int) -> tuple[nn.Module, list[Tensor], np.ndarray]:
    """A network, inputs and its outputs; the same objects every time."""
    torch.manual_seed(seed)
    model = NETWORKS[network]().double().eval()
    batch = getattr(model, "batch", 2)
    inputs = [
        torch.randint(5, (batch, *shape[1:]))
        if shape[0] == "int"
        else torch.randn(batch, *shape).double()
        for shape in model.inputs
    ]
    with torch.no_grad():
        return model, inputs, model(*inputs).flatten(1).numpy()


def make(network: str, walks: Walks, seed: int = 0) -> Case:
    model, inputs, expected = built(network, seed)
    oracles = []
    for sample in range(len(expected)):
        net = o.Oracle(walks.bias == "input")
        model.describe([x[sample].numpy() for x in inputs], net, walks)
        oracles.append(net)
    found = np.stack([net.values[net.output] for net in oracles])
    np.testing.assert_allclose(found, expected, atol=1e-12)  # the description is right
    return Case(model, inputs, oracles)


# -- describing ----------------------------------------------------------------------------------


def _all(name: str, size: int) -> list[Neuron]:
    return [(name, i) for i in range(size)]


def _by_position(
    net: o.Oracle,
    name: str,
    walks: Walks,
    x: str,
    positions: int,
    layer: nn.Module | tuple[np.ndarray, np.ndarray | None],
) -> None:
    """A linear layer at each of several positions."""
    w, b = _parameters(layer) if isinstance(layer, nn.Module) else layer
    outs, ins = w.shape
    terms = [
        (t * outs + j, x, t * ins + i, w[j, i]) for t, j, i in np.ndindex(positions, outs, ins)
    ]
    bias = None if b is None else np.tile(b, positions)
    net.weighted(name, walks.column, positions * outs, terms, bias)


def _plus(net: o.Oracle, name: str, walks: Walks, x: list[Neuron], constant: np.ndarray) -> None:
    """Neurons plus a constant: an identity, or with a bias as another parent."""
    if net.bias_is_input:
        terms = [(j, *neuron, 1.0) for j, neuron in enumerate(x)]
        net.weighted(name, walks.column, len(x), terms, constant)
    else:
        net.elementwise(name, x, lambda v: v + constant)


def _pair(layer: nn.Module, which: str) -> tuple[np.ndarray, np.ndarray]:
    return _numpy(getattr(layer, f"weight_{which}")), _numpy(getattr(layer, f"bias_{which}"))


def _parameters(layer: nn.Module) -> tuple[np.ndarray, np.ndarray | None]:
    bias = layer.bias
    return _numpy(layer.weight), None if bias is None else _numpy(bias)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def _randomize(*layers: nn.Module) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
