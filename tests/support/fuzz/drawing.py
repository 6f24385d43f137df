"""The random network of a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from support.fuzz import describing as d
from support.fuzz import moves, products, sums
from support.fuzz.builder import Builder, filled_in
from support.fuzz.networks import BATCH, HEADS, Network

BLOCKS: dict[Callable[[Builder], str | None], float] = {
    sums.linear: 4,
    sums.shared: 1.5,
    sums.conv: 3,
    sums.transposed: 0.5,
    sums.padded: 1.5,
    sums.average: 2,
    sums.matrix: 0.7,
    sums.add: 3,
    sums.broadcast: 1.5,
    sums.constant: 1.5,
    moves.activation: 4,
    moves.in_place: 0.7,
    moves.unchanged: 0.7,
    moves.batch_norm: 1,
    moves.scaled: 0.7,
    moves.moved: 3,
    moves.joined: 2.5,
    moves.grown: 0.7,
    moves.filled: 0.5,
    moves.largest: 0.7,
    products.product: 0.7,
    products.gated: 0.8,
    products.quotient: 0.4,
    products.norm: 0.8,
    products.matrices: 0.8,
    products.attention: 0.7,
    products.alone_softmax: 0.3,
    products.fused_attention: 0.7,
    products.half_gated: 0.4,
    products.learned: 0.4,
    products.sideways: 0.5,
}
_WEIGHTS = np.array(list(BLOCKS.values()))
_CHANCES = _WEIGHTS / _WEIGHTS.sum()
_LISTED = list(BLOCKS)


def draw(seed: int) -> Network:
    """The random network of a seed."""
    b = Builder(seed)
    b.input("x", *b.one_of([(3,), (4,), (2, 2), (2, 3), (3, 2), (1, 4), (2, 2, 2), (1, 3, 3)]))
    if b.chance(0.3):
        b.input("y", *b.one_of([b.shape("x"), (3,), (2, 3)]))
    if b.chance(0.15):
        _tokens(b)
    for _ in range(int(b.rng.integers(5, 13))):
        while not b.grow(_LISTED[int(b.rng.choice(len(BLOCKS), p=_CHANCES))]):
            pass
    b.highest = np.inf
    _head(b)
    head = b.one_of(["", "", "", *HEADS])
    return Network(b.inputs, b.steps, head)


def _head(b: Builder) -> None:
    """Everything that nothing reads, in two or three outputs: linear layers that are added up."""
    outputs = int(b.rng.integers(2, 4))
    loose = [name for name in b.scope if b.unread(name)]
    loose = [n for n in loose if n not in ("x", "y")] or loose
    total: str | None = None
    for name in loose:
        if len(b.shape(name)) != 1:
            flat = (lambda v: v.flatten(1)) if b.shape(name) else (lambda v: v.unsqueeze(1))
            name = b.add("flat", flat, name, d.routed)
        layer = filled_in(b, nn.Linear(b.shape(name)[0], outputs, bias=b.chance(0.5)))
        part = b.add(repr(layer), layer, name, d.summed, kind="linear")
        if total is not None:
            part = b.add("add", torch.add, (total, part), d.plus)
        total = part


def _tokens(b: Builder) -> None:
    b.inputs["t"] = b.values["t"] = torch.from_numpy(b.rng.integers(0, 4, (BATCH, 2)))
    layer = filled_in(b, nn.Embedding(4, 2))
    b.add("Embedding(4, 2)", layer, "t", d.embedded)
