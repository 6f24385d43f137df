"""Steps drawn at random: products, norms, attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.fuzz import describing as d
from support.fuzz.builder import Builder, filled_in
from support.fuzz.networks import Described, Step


def product(b: Builder) -> str | None:
    x = b.find(lambda s: True)
    assert x is not None
    shape = b.shape(x)
    y = x if b.chance(0.1) else b.find(lambda s: s == shape)
    assert y is not None
    ranks = (b.rank(x), b.rank(y))
    if None in ranks:
        return None
    rank = None if x == y else 0
    return b.add("mul", torch.mul, (x, y), d.multiplied((ranks[0] or 0, ranks[1] or 0)), rank=rank)


def gated(b: Builder) -> str | None:
    """A value, and a sigmoid or tanh of a layer."""
    x = b.find(lambda s: 1 <= len(s) <= 2)
    if x is None or b.rank(x) != 0:
        return None
    layer = filled_in(b, nn.Linear(b.shape(x)[-1], b.shape(x)[-1]))
    a = b.add(repr(layer), layer, x, d.summed, kind="linear")
    text, rank = b.one_of([("sigmoid", 2), ("tanh", 1)])
    g = b.add(text, getattr(torch, text), a, d.elementwise, exact=False, rank=rank)
    return b.add("mul", torch.mul, (g, x), d.multiplied((rank, 0)))


def quotient(b: Builder) -> str | None:
    """The numerator takes all."""
    x = b.find(lambda s: True)
    assert x is not None
    shape = b.shape(x)
    y = b.find(lambda s: s == shape)
    assert y is not None

    def describe(net: Described, step: Step) -> None:
        with torch.no_grad():
            values = step.module(*(net.shaped(read) for read in step.reads)).numpy().ravel()
        net.quotient(step.name, step.reads, values)

    return b.add("x / (1 + |y|)", _over, (x, y), describe, exact=False, rank=None)


def _over(x: Tensor, y: Tensor) -> Tensor:
    return x / (1 + y.abs())


def norm(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 1 and s[-1] >= 2)
    if x is None:
        return None
    layer: nn.Module
    if len(b.shape(x)) >= 2 and b.chance(0.3):
        channels = b.shape(x)[0]
        layer = nn.GroupNorm(b.one_of([1, channels]), channels)
    else:
        layer = nn.LayerNorm(b.shape(x)[-1], elementwise_affine=b.chance(0.8))
    return b.add(repr(layer), filled_in(b, layer), x, d.normalized, exact=False)


def matrices(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) == 2)
    if x is None or b.rank(x) is None:
        return None
    inner = b.shape(x)[1]
    y = b.find(lambda s: len(s) == 2 and (s[0] == inner or s[1] == inner))
    if y is None or b.rank(y) is None:
        return None
    ranks = (b.rank(x) or 0, b.rank(y) or 0)
    if b.shape(y)[0] == inner:
        return b.add("matmul", torch.matmul, (x, y), d.matrix_product(ranks), rank=None)
    return b.add(
        "einsum ij,kj",
        lambda p, q: torch.einsum("bij,bkj->bik", p, q),
        (x, y),
        d.matrix_product(ranks, True),
        rank=None,
    )


def attention(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) == 2 and s[0] <= 3 and s[1] <= 3)
    if x is None:
        return None
    parts = []
    for _ in range(3):
        layer = filled_in(b, nn.Linear(b.shape(x)[1], 2, b.chance(0.5)))
        part = b.add(repr(layer), layer, x, d.summed, kind="linear")
        parts.append(part)
    q, k, v = parts
    turned = b.transparent("transpose(1, 2)", lambda u: u.transpose(1, 2), k)
    scores = b.add("matmul", torch.matmul, (q, turned), d.matrix_product((0, 0)))
    scaled = b.add("/ 2", lambda u: u / 2, scores, d.elementwise)
    weights = b.add(
        "softmax(-1)",
        lambda u: u.softmax(-1),
        scaled,
        d.softmax,
        kind="softmax",
        exact=False,
        rank=3,
    )
    b.close(turned, scores, scaled)
    return b.add("matmul", torch.matmul, (weights, v), d.matrix_product((3, 0)))


def fused_attention(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) == 2 and s[0] <= 3 and s[1] <= 3)
    if x is None or b.rank(x) != 0:
        return None
    inner, parts = b.shape(x)[1], []
    for _ in range(3):
        layer = filled_in(b, nn.Linear(inner, inner, b.chance(0.5)))
        plain = b.chance(0.25)
        parts.append(x if plain else b.add(repr(layer), layer, x, d.summed, kind="linear"))
    causal = b.chance(0.4)
    return b.add(
        "attention, causal" if causal else "attention",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.5),
        parts,
        d.attended(0.5, causal),
        exact=False,
    )


def half_gated(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 1 and s[-1] % 2 == 0)
    if x is None or b.rank(x) != 0:
        return None
    return b.add("glu", F.glu, x, d.half_gated, exact=False)


def learned(b: Builder) -> str | None:
    """A class token."""
    x = b.find(lambda s: len(s) == 2)
    if x is None:
        return None
    token = b.numbers(1, 1, b.shape(x)[1])

    def put(v: Tensor, c: Tensor) -> Tensor:
        return torch.cat([c.expand(v.shape[0], -1, -1), v], 1)

    return b.add("token beside", put, x, d.beside, token, rank=None)


def sideways(b: Builder) -> str | None:
    """The batch in the second axis for a while, as in sequence models."""
    x = b.find(lambda s: len(s) == 2)
    if x is None:
        return None
    over = b.add("transpose(0, 1)", _turned, x, d.routed, batch_axis=1)
    if b.chance(0.5):
        done = b.add("relu", torch.relu, over, d.elementwise, batch_axis=1)
    else:
        layer = filled_in(b, nn.Linear(b.shape(x)[1], 2, b.chance(0.5)))
        done = b.add(repr(layer), layer, over, d.summed, kind="linear", batch_axis=1)
    b.close(over, done)
    return b.add("transpose(0, 1)", _turned, done, d.routed, rank=None)


def _turned(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def alone_softmax(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 1 and s[-1] >= 2)
    if x is None:
        return None
    return b.add(
        "softmax(-1)", lambda u: u.softmax(-1), x, d.softmax, kind="softmax", exact=False, rank=3
    )
