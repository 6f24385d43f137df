"""Steps drawn at random: layers, averages, sums, constants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.fuzz import describing as d
from support.fuzz.builder import Builder, filled_in


def linear(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 1, blank=True)
    if x is None:
        return None
    last = b.shape(x)[-1]
    layer = filled_in(
        b, nn.Linear(last, last if b.chance(0.4) else int(b.rng.integers(1, 4)), b.chance(0.7))
    )
    return b.add(repr(layer), layer, x, d.summed, kind="linear")


def shared(b: Builder) -> str | None:
    """A layer once more."""
    layers = [s for s in b.steps if isinstance(s.module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    if not layers:
        return None
    again = b.one_of(layers)
    like = b.shape(again.reads[0])
    x = b.find(
        lambda s: (
            len(s) == len(like)
            and (s[-1:] if again.kind == "linear" else s[:1])
            == (like[-1:] if again.kind == "linear" else like[:1])
        )
    )
    if x is None or (again.kind == "conv" and b.shape(x) != like):
        return None
    return b.add(again.text, again.module, x, d.summed, kind=again.kind, shared=again.module_name)


def conv(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) in (2, 3) and min(s[1:]) >= 2, blank=True)
    if x is None:
        return None
    channels, axes = b.shape(x)[0], len(b.shape(x)) - 1
    groups = channels if channels > 1 and b.chance(0.3) else 1
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    layer = kind(
        channels,
        groups * int(b.rng.integers(1, 3 if groups == 1 else 2)),
        b.one_of([1, 2, 2, 3]) if min(b.shape(x)[1:]) > 2 else b.one_of([1, 2]),
        stride=b.one_of([1, 1, 2]),
        padding=0,
        groups=groups,
        bias=b.chance(0.6),
    )
    if layer.kernel_size[0] > 1 and b.chance(0.5):
        layer.padding = (1,) * axes
        layer._reversed_padding_repeated_twice = [1, 1] * axes
    return b.add(repr(layer), filled_in(b, layer), x, d.summed, kind="conv")


def transposed(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) == 2 and s[1] <= 3, blank=True)
    if x is None:
        return None
    layer = filled_in(
        b, nn.ConvTranspose1d(b.shape(x)[0], 2, 2, stride=b.one_of([1, 2]), bias=b.chance(0.5))
    )
    return b.add(repr(layer), layer, x, d.summed, kind="conv")


def padded(b: Builder) -> str | None:
    """Zeros that are written."""
    x = b.find(lambda s: len(s) >= 1, blank=True)
    if x is None:
        return None
    axes = len(b.shape(x))
    if b.chance(0.3):
        blank = torch.from_numpy(b.rng.random(b.shape(x)) < 0.3)
        found = b.add(
            f"masked_fill({blank.int().tolist()}, 0)",
            lambda v: v.masked_fill(blank, 0.0),
            x,
            partial(d.routed, filler=0.0),
            rank=b.rank(x),
        )
    else:
        sides = [int(b.rng.integers(0, 2)) for _ in range(2 * max(1, axes - 1))]
        found = b.add(
            f"pad{sides}",
            lambda v: F.pad(v, sides),
            x,
            partial(d.routed, filler=0.0),
            rank=b.rank(x),
        )
    b.blank.add(found)
    if axes in (2, 3) and min(b.shape(found)[1:]) >= 2 and b.chance(0.7):
        kind = nn.Conv1d if axes == 2 else nn.Conv2d
        layer = kind(b.shape(x)[0], int(b.rng.integers(1, 3)), 2, bias=b.chance(0.5))
        return b.add(repr(layer), filled_in(b, layer), found, d.summed, kind="conv")
    return found


def average(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 2, blank=True)
    if x is None:
        return None
    shape = b.shape(x)
    axis, kept = int(b.rng.integers(1, len(shape) + 1)), b.chance(0.5)
    halves = shape[axis - 1] in (1, 2, 4)
    ways: list[tuple[str, Callable[..., Tensor], bool]] = [
        (f"mean({axis}, {kept})", lambda v: v.mean(axis, keepdim=kept), halves),
        (f"sum({axis}, {kept})", lambda v: v.sum(axis, keepdim=kept), True),
        (f"cumsum({axis})", lambda v: v.cumsum(axis), True),
    ]
    if len(shape) == 2 and shape[1] >= 2:
        ways.append(("avg_pool1d(2, 1)", lambda v: F.avg_pool1d(v, 2, 1), True))
        ways.append(
            ("linear interpolation", lambda v: F.interpolate(v, size=3, mode="linear"), False)
        )
    if len(shape) == 3 and min(shape[1:]) >= 2:
        ways.append(("avg_pool2d(2)", lambda v: F.avg_pool2d(v, 2), True))
        ways.append(("adaptive_avg_pool2d(1)", lambda v: F.adaptive_avg_pool2d(v, 1), False))
    text, function, exact = b.one_of(ways)
    return b.add(text, function, x, d.summed, exact=exact)


def matrix(b: Builder) -> str | None:
    """A constant matrix on either side."""
    x = b.find(lambda s: len(s) == 2, blank=True)
    if x is None:
        return None
    rows, columns = b.shape(x)
    if b.chance(0.5):
        left = b.numbers(2, rows)
        return b.add("A @", lambda v, a: a @ v, x, d.summed, left, kind="linear")
    right = b.numbers(columns, 2)
    return b.add("@ A", lambda v, a: v @ a, x, d.summed, right, kind="linear")


# -- sums ----------------------------------------------------------------------------------------


def add(b: Builder) -> str | None:
    x = b.find(lambda s: True, blank=True)
    assert x is not None
    same = b.shape(x)
    y = x if b.chance(0.1) else b.find(lambda s: s == same, blank=True)
    assert y is not None
    rank = None if x == y else 0
    if b.chance(0.3):
        return b.add("sub", torch.sub, (x, y), d.minus, rank=rank) if x != y else None
    if b.chance(0.2):
        return b.add(
            "add alpha=2",
            lambda p, q: torch.add(p, q, alpha=2),
            (x, y),
            d.added((1.0, 2.0)),
            rank=rank,
        )
    return b.add("add", torch.add, (x, y), d.plus, rank=rank)


def broadcast(b: Builder) -> str | None:
    """A sum or product with what is stretched along some axes."""
    x = b.find(lambda s: len(s) >= 2)
    if x is None:
        return None
    shape = b.shape(x)
    small = b.find(
        lambda s: (
            len(s) == len(shape)
            and s != shape
            and all(p in (1, q) for p, q in zip(s, shape, strict=True))
        )
    )
    if small is None:
        axis = int(b.rng.integers(1, len(shape) + 1))
        if shape[axis - 1] == 1:
            return None
        small = b.transparent(f"narrow({axis}, 0, 1)", lambda v: v.narrow(axis, 0, 1), x)
    ranks = (b.rank(x), b.rank(small))
    if None not in ranks and b.chance(0.4):
        return b.add("mul", torch.mul, (small, x), d.multiplied((ranks[1] or 0, ranks[0] or 0)))
    return b.add("add", torch.add, (small, x), d.plus)


def constant(b: Builder) -> str | None:
    x = b.find(lambda s: True)
    assert x is not None
    if b.layer(x):
        return None  # it may be taken into the layer
    rank, last = b.rank(x), b.shape(x)[-1:] or (1,)
    way = int(b.rng.integers(5))
    if way == 0:
        c = float(b.numbers(1, zero=False))
        return b.add(f"+ {c}", lambda v: v + c, x, d.shifted(1.0, np.array(c)), rank=rank)
    if way == 1:
        values = b.numbers(*last)
        return b.add("+ c", torch.add, x, d.shifted(1.0, values.numpy()), values, rank=rank)
    if way == 2:
        values = b.numbers(*last)
        return b.add(
            "c -", lambda v, c: c - v, x, d.shifted(-1.0, values.numpy()), values, rank=rank
        )
    if way == 3:
        values = b.numbers(*last, zero=False)
        return b.add("* c", torch.mul, x, d.elementwise, values, rank=rank)
    return b.add("/ 4", lambda v: -v / 4, x, d.elementwise, rank=rank)
