"""Steps drawn at random: what has one parent for each neuron, and what moves neurons about."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.fuzz import describing as d
from support.fuzz.builder import Builder, filled_in

_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool, int | None]] = {
    "tanh": (torch.tanh, False, 1),
    "sigmoid": (torch.sigmoid, False, 2),
    "gelu": (F.gelu, False, None),
    "silu": (F.silu, False, None),
    "softplus": (F.softplus, False, None),
    "leaky_relu": (lambda v: F.leaky_relu(v, 0.25), True, None),
    "hardtanh": (F.hardtanh, True, None),
}


def activation(b: Builder) -> str | None:
    x = b.find(lambda s: True, blank=True)
    assert x is not None
    if b.chance(0.5):
        return b.add("relu", torch.relu, x, d.elementwise, rank=None)
    if b.chance(0.2):
        return b.add("abs", torch.abs, x, d.elementwise, rank=b.rank(x))
    text = b.one_of(list(_FUNCTIONS))
    function, exact, rank = _FUNCTIONS[text]
    return b.add(text, function, x, d.elementwise, exact=exact, rank=rank)


def in_place(b: Builder) -> str | None:
    fresh = [s.name for s in b.steps if s.kind in ("linear", "conv") and b.unread(s.name)]
    x = b.one_of([name for name in fresh if name in b.scope] or [""])
    if not x:
        return None
    found = b.add("relu_", torch.relu_, x, d.elementwise, rank=None)
    b.close(x)
    return found


def unchanged(b: Builder) -> str | None:
    x = b.find(lambda s: True)
    assert x is not None
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "double and back": lambda v: v.double().to(v.dtype),
        "dropout": lambda v: F.dropout(v, 0.5, training=False),
        "contiguous clone": lambda v: v.clone(),
    }
    text = b.one_of(list(ways))
    same = text == "double and back"
    return b.add(text, ways[text], x, d.elementwise, rank=b.rank(x), same=same)


def batch_norm(b: Builder) -> str | None:
    """In evaluation mode; after a layer it is taken into that."""
    x = b.find(lambda s: len(s) in (1, 2, 3))
    if x is None or any(step.folds for step in [b.step(x)] if step):
        return None
    channels = b.shape(x)[0]
    layer = (nn.BatchNorm1d if len(b.shape(x)) < 3 else nn.BatchNorm2d)(channels, eps=0.0)
    filled_in(b, layer)
    layer.running_mean = b.numbers(channels)
    layer.running_var = torch.from_numpy(b.rng.choice([0.25, 1.0, 4.0], channels))
    if b.chance(0.6):
        b.close(x)
    return b.add(repr(layer), layer, x, d.batch_norm, rank=None, folds=True)


def scaled(b: Builder) -> str | None:
    """A layer, and a batch norm written out or a change of sign, which are taken into it."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    fresh = [s.name for s in b.steps if isinstance(s.module, layers) and b.unread(s.name)]
    x = b.one_of([name for name in fresh if name in b.scope] or [""])
    step = b.step(x)
    if step is None or step.batch_axis:
        return None
    shape = (
        b.shape(x)[-1:]
        if step.kind == "linear"
        else (b.shape(x)[0],) + (1,) * (len(b.shape(x)) - 1)
    )
    c = b.numbers(*shape, zero=False)
    b.close(x)
    text, function = b.one_of(
        [
            ("* by channel", torch.mul),
            ("+ by channel", torch.add),
            ("by channel -", lambda v, c: c - v),
            ("/ by channel", torch.div),
        ]
    )
    return b.add(text, function, x, d.batch_norm, c, exact="/" not in text, rank=None, folds=True)


# -- moving neurons ------------------------------------------------------------------------------


def moved(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 1, blank=True)
    if x is None:
        return None
    shape = b.shape(x)
    axis = int(b.rng.integers(1, len(shape) + 1))
    size, count = shape[axis - 1], len(shape)
    half = max(1, size // 2)
    index = torch.from_numpy(b.rng.integers(0, size, 3))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        f"flip({axis})": lambda v: v.flip(axis),
        f"roll(1, {axis})": lambda v: v.roll(1, axis),
        f"narrow({axis}, 0, {half})": lambda v: v.narrow(axis, 0, half),
        f"index_select({axis}, {index.tolist()})": lambda v: v.index_select(axis, index),
        f"unsqueeze({axis})": lambda v: v.unsqueeze(axis),
        f"repeat_interleave(2, {axis})": lambda v: v.repeat_interleave(2, axis),
        "flatten": lambda v: v.flatten(1),
    }
    if size > 1:
        ways[f"chunk(2, {axis})[1]"] = lambda v: v.chunk(2, axis)[1]
        ways[f"split(1, {axis})[1]"] = lambda v: v.split(1, axis)[1]
        ways[f"step slice of {axis}"] = lambda v: v.movedim(axis, -1)[..., ::2].movedim(-1, axis)
    if count > 1:
        ways[f"select({axis}, -1)"] = lambda v: v.select(axis, -1)
        ways[f"unbind({axis})[0]"] = lambda v: v.unbind(axis)[0]
        ways["transpose(1, -1)"] = lambda v: v.transpose(1, -1)
    if size == 1:
        ways[f"squeeze({axis})"] = lambda v: v.squeeze(axis)
        ways[f"expand 2 along {axis}"] = lambda v: v.expand(
            *v.shape[:axis], 2, *v.shape[axis + 1 :]
        )
    if size == 4:
        ways[f"unflatten({axis}, (2, 2))"] = lambda v: v.unflatten(axis, (2, 2))
    if count == 1:
        del ways["flatten"]
        ways.pop(f"unsqueeze({axis})")
        ways["unsqueeze(1)"] = lambda v: v.unsqueeze(1)
        ways["unsqueeze(2)"] = lambda v: v.unsqueeze(2)
    text = b.one_of(list(ways))
    return b.transparent(text, ways[text], x)


def joined(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 1, blank=True)
    if x is None:
        return None
    shape = b.shape(x)
    axis = int(b.rng.integers(1, len(shape) + 1))
    if b.chance(0.2):
        same = b.find(lambda s: s == shape, blank=True)
        assert same is not None
        return b.add(
            f"stack({axis})", lambda *vs: torch.stack(vs, axis), (x, same), d.routed, rank=None
        )
    rest = shape[: axis - 1] + shape[axis:]
    parts = [x]
    for _ in range(int(b.rng.integers(1, 3))):
        other = (
            x
            if b.chance(0.1)
            else b.find(
                lambda s: len(s) == len(shape) and s[: axis - 1] + s[axis:] == rest, blank=True
            )
        )
        assert other is not None
        parts.append(other)
    return b.add(f"cat({axis})", lambda *vs: torch.cat(vs, axis), parts, d.routed, rank=None)


def grown(b: Builder) -> str | None:
    """A dense block: a layer of one feature, and what it reads beside it."""
    x = b.find(lambda s: len(s) == 1 and s[0] <= 4)
    if x is None:
        return None
    for _ in range(2):
        layer = filled_in(b, nn.Linear(b.shape(x)[0], 1, b.chance(0.3)))
        new = b.add(repr(layer), layer, x, d.summed, kind="linear")
        x = b.add("cat(1)", lambda *vs: torch.cat(vs, 1), (x, new), d.routed, rank=None)
    return x


def filled(b: Builder) -> str | None:
    """A constant in the place of some neurons: a lead."""
    x = b.find(lambda s: len(s) >= 1)
    if x is None:
        return None
    if b.chance(0.5):
        return b.add(
            "pad(1, 0) with 0.5",
            lambda v: F.pad(v, (1, 0), value=0.5),
            x,
            partial(d.routed, filler=0.5),
            rank=b.rank(x),
        )
    chosen = torch.from_numpy(b.rng.random(b.shape(x)) < 0.3)
    return b.add(
        f"masked_fill({chosen.int().tolist()}, 0.5)",
        lambda v: v.masked_fill(chosen, 0.5),
        x,
        partial(d.routed, filler=0.5),
        rank=b.rank(x),
    )


def largest(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 2 and s[-1] >= 2)
    if x is None:
        return None
    ways: list[tuple[str, Callable[[Tensor], Tensor]]] = [("max(-1)", lambda v: v.max(-1).values)]
    if len(b.shape(x)) == 2:
        ways.append(("max_pool1d(2, 1)", lambda v: F.max_pool1d(v, 2, 1)))
    elif b.shape(x)[1] >= 2 and len(b.shape(x)) == 3:
        ways.append(("max_pool2d(2)", lambda v: F.max_pool2d(v, 2)))
    text, function = b.one_of(ways)
    return b.add(text, function, x, d.winners, rank=None)
