"""The steps that random networks are drawn from, and how they are put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import fuzz_networks as f
import numpy as np
import torch
from fuzz_networks import BATCH, Call, Describe, Network, Step
from torch import Tensor, nn
from torch.nn import functional as F

T = TypeVar("T")

LARGEST = 16
"""Neurons of a variable, for each sample."""


class Unfit(Exception):  # noqa: N818
    """A step that this network has no room for."""


class Builder:
    """A network that grows step by step.

    Attributes:
        dyadic: numbers are small fractions, often equal, often zero; otherwise they are random.
        scope: the variables that further steps may read.
        blank: those with zeros that are written.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.dyadic = self.rng.random() < 0.7
        self.steps: list[Step] = []
        self.inputs: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.scope: list[str] = []
        self.blank: set[str] = set()
        self.calls: dict[str, int] = {}
        self.highest = 256.0

    # -- numbers and choices ---------------------------------------------------------------------

    def numbers(self, *shape: int, zero: bool = True) -> Tensor:
        if not self.dyadic:
            return torch.from_numpy(np.asarray(self.rng.normal(size=shape)))
        choices = [-2.0, -1.0, -1.0, -0.5, 0.5, 1.0, 1.0, 2.0] + [0.0, 0.0] * zero
        return torch.from_numpy(np.asarray(self.rng.choice(choices, size=shape)))

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[int(self.rng.integers(len(choices)))]

    def shape(self, name: str) -> tuple[int, ...]:
        step = self.step(name)
        return f.shape_of(self.values[name], step.batch_axis if step else 0)

    def find(self, fits: Callable[[tuple[int, ...]], bool], blank: bool = False) -> str | None:
        """A variable of such a shape, rather a late one.

        Arguments:
            blank: it may have zeros that are written.
        """
        known = [name for name in self.scope if blank or name not in self.blank]
        fitting = [name for name in known if fits(self.shape(name))]
        if not fitting:
            return None
        return fitting[-1] if self.chance(0.5) else self.one_of(fitting)

    def layer(self, name: str) -> bool:
        """Whether it is a layer's result, scaled and shifted at most, which may be taken into it."""
        step = self.step(name)
        while step is not None and (step.kind == "" and step.describe is f.batch_norm):
            step = self.step(step.reads[0])
        return step is not None and step.kind in ("linear", "conv")

    def unread(self, name: str) -> bool:
        return not any(name in step.reads for step in self.steps)

    def step(self, name: str) -> Step | None:
        return next((step for step in self.steps if step.name == name), None)

    def rank(self, name: str) -> int | None:
        step = self.step(name)
        return 0 if step is None else step.rank

    # -- growing ---------------------------------------------------------------------------------

    def input(self, name: str, *shape: int) -> None:
        x = self.numbers(BATCH, *shape)
        self.inputs[name] = self.values[name] = x
        self.scope.append(name)

    def add(
        self,
        text: str,
        module: nn.Module | Callable[..., Tensor],
        reads: str | Sequence[str],
        describe: Describe,
        *constants: Tensor,
        kind: str = "",
        exact: bool = True,
        rank: int | None = 0,
        shared: str | None = None,
        same: bool = False,
        batch_axis: int = 0,
    ) -> str:
        """Append a step.

        Raises:
            Unfit: its result has too many neurons, or too large values.
        """
        if not isinstance(module, nn.Module):
            module = Call(module, *constants)
        reads = (reads,) if isinstance(reads, str) else tuple(reads)
        module = module.double().eval().requires_grad_(False)
        with torch.no_grad():
            value = module(*(self.values[read].clone() for read in reads))
        if value.numel() > LARGEST * BATCH or value.abs().max() > self.highest:
            raise Unfit
        fresh = f"s{len([s for s in self.steps if s.name == s.module_name])}"
        called = shared or fresh
        again = self.calls[called] = self.calls.get(called, -1) + 1
        name = called + (f"@{again}" if again else "")
        step = Step(name, called, text, module, reads, describe, kind, exact, rank)
        self.steps.append(replace(step, same=same, batch_axis=batch_axis))
        self.values[name] = value
        self.scope.append(name)
        self.blank.discard(name)
        if describe in _KEEPING and not self.blank.isdisjoint(reads):
            self.blank.add(name)
        return name

    def grow(self, block: Callable[[Builder], str | None]) -> bool:
        """Append a block, all of it or nothing."""
        known = (list(self.steps), list(self.scope), dict(self.calls), set(self.blank))
        try:
            if block(self) is not None:
                return True
        except Unfit:
            pass
        self.steps, self.scope, self.calls, self.blank = known
        return False

    def transparent(self, text: str, function: Callable[[Tensor], Tensor], x: str) -> str:
        """A step that moves the neurons of one variable."""
        return self.add(text, function, x, f.routed, rank=self.rank(x))

    def close(self, *names: str | None) -> None:
        for name in names:
            if name in self.scope:
                self.scope.remove(name)


_KEEPING = (f.routed, f.elementwise, f.plus, f.minus)
"""What keeps zeros that are written, at least some of them."""


def draw(seed: int) -> Network:
    """The random network of a seed."""
    b = Builder(seed)
    b.input("x", *b.one_of([(3,), (4,), (2, 2), (2, 3), (3, 2), (1, 4), (2, 2, 2), (1, 3, 3)]))
    if b.chance(0.3):
        b.input("y", *b.one_of([b.shape("x"), (3,), (2, 3)]))
    if b.chance(0.15):
        _tokens(b)
    for _ in range(int(b.rng.integers(5, 13))):
        while not b.grow(BLOCKS_LIST[int(b.rng.choice(len(BLOCKS), p=_CHANCES))]):
            pass
    b.highest = np.inf
    _head(b)
    return Network(b.inputs, b.steps)


def _head(b: Builder) -> None:
    """Everything that nothing reads, in two or three outputs: linear layers that are added up."""
    outputs = int(b.rng.integers(2, 4))
    loose = [name for name in b.scope if b.unread(name)]
    loose = [n for n in loose if n not in ("x", "y")] or loose
    total: str | None = None
    for name in loose:
        if len(b.shape(name)) != 1:
            flat = (lambda v: v.flatten(1)) if b.shape(name) else (lambda v: v.unsqueeze(1))
            name = b.add("flat", flat, name, f.routed)
        layer = _filled(b, nn.Linear(b.shape(name)[0], outputs, bias=b.chance(0.5)))
        part = b.add(repr(layer), layer, name, f.summed, kind="linear")
        if total is not None:
            part = b.add("add", torch.add, (total, part), f.plus)
        total = part


def _filled(b: Builder, layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        parameter.data = b.numbers(*parameter.shape)
    return layer


def _tokens(b: Builder) -> None:
    b.inputs["t"] = b.values["t"] = torch.from_numpy(b.rng.integers(0, 4, (BATCH, 2)))
    layer = _filled(b, nn.Embedding(4, 2))
    b.add("Embedding(4, 2)", layer, "t", f.embedded)


# -- weighted sums -------------------------------------------------------------------------------


def linear(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 1, blank=True)
    if x is None:
        return None
    last = b.shape(x)[-1]
    layer = _filled(b, nn.Linear(last, last if b.chance(0.4) else int(b.rng.integers(1, 4)), b.chance(0.7)))
    return b.add(repr(layer), layer, x, f.summed, kind="linear")


def shared(b: Builder) -> str | None:
    """A layer once more."""
    layers = [s for s in b.steps if isinstance(s.module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    if not layers:
        return None
    again = b.one_of(layers)
    like = b.shape(again.reads[0])
    x = b.find(lambda s: len(s) == len(like) and (s[-1:] if again.kind == "linear" else s[:1]) == (like[-1:] if again.kind == "linear" else like[:1]))
    if x is None or (again.kind == "conv" and b.shape(x) != like):
        return None
    return b.add(again.text, again.module, x, f.summed, kind=again.kind, shared=again.module_name)


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
    return b.add(repr(layer), _filled(b, layer), x, f.summed, kind="conv")


def transposed(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) == 2 and s[1] <= 3, blank=True)
    if x is None:
        return None
    layer = _filled(b, nn.ConvTranspose1d(b.shape(x)[0], 2, 2, stride=b.one_of([1, 2]), bias=b.chance(0.5)))
    return b.add(repr(layer), layer, x, f.summed, kind="conv")


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
            partial(f.routed, filler=0.0),
            rank=b.rank(x),
        )
    else:
        sides = [int(b.rng.integers(0, 2)) for _ in range(2 * max(1, axes - 1))]
        found = b.add(
            f"pad{sides}", lambda v: F.pad(v, sides), x, partial(f.routed, filler=0.0), rank=b.rank(x)
        )
    b.blank.add(found)
    if axes in (2, 3) and min(b.shape(found)[1:]) >= 2 and b.chance(0.7):
        kind = nn.Conv1d if axes == 2 else nn.Conv2d
        layer = kind(b.shape(x)[0], int(b.rng.integers(1, 3)), 2, bias=b.chance(0.5))
        return b.add(repr(layer), _filled(b, layer), found, f.summed, kind="conv")
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
        ways.append(("linear interpolation", lambda v: F.interpolate(v, size=3, mode="linear"), False))
    if len(shape) == 3 and min(shape[1:]) >= 2:
        ways.append(("avg_pool2d(2)", lambda v: F.avg_pool2d(v, 2), True))
        ways.append(("adaptive_avg_pool2d(1)", lambda v: F.adaptive_avg_pool2d(v, 1), False))
    text, function, exact = b.one_of(ways)
    return b.add(text, function, x, f.summed, exact=exact)


def matrix(b: Builder) -> str | None:
    """A constant matrix on either side."""
    x = b.find(lambda s: len(s) == 2, blank=True)
    if x is None:
        return None
    rows, columns = b.shape(x)
    if b.chance(0.5):
        left = b.numbers(2, rows)
        return b.add("A @", lambda v, a: a @ v, x, f.summed, left, kind="linear")
    right = b.numbers(columns, 2)
    return b.add("@ A", lambda v, a: v @ a, x, f.summed, right, kind="linear")


# -- sums ----------------------------------------------------------------------------------------


def add(b: Builder) -> str | None:
    x = b.find(lambda s: True, blank=True)
    assert x is not None
    same = b.shape(x)
    y = x if b.chance(0.1) else b.find(lambda s: s == same, blank=True)
    assert y is not None
    rank = None if x == y else 0
    if b.chance(0.3):
        return b.add("sub", torch.sub, (x, y), f.minus, rank=rank) if x != y else None
    if b.chance(0.2):
        return b.add("add alpha=2", lambda p, q: torch.add(p, q, alpha=2), (x, y), f.added((1.0, 2.0)), rank=rank)
    return b.add("add", torch.add, (x, y), f.plus, rank=rank)


def broadcast(b: Builder) -> str | None:
    """A sum or product with what is stretched along some axes."""
    x = b.find(lambda s: len(s) >= 2)
    if x is None:
        return None
    shape = b.shape(x)
    small = b.find(lambda s: len(s) == len(shape) and s != shape and all(p in (1, q) for p, q in zip(s, shape, strict=True)))
    if small is None:
        axis = int(b.rng.integers(1, len(shape) + 1))
        if shape[axis - 1] == 1:
            return None
        small = b.transparent(f"narrow({axis}, 0, 1)", lambda v: v.narrow(axis, 0, 1), x)
    ranks = (b.rank(x), b.rank(small))
    if None not in ranks and b.chance(0.4):
        return b.add("mul", torch.mul, (small, x), f.multiplied((ranks[1] or 0, ranks[0] or 0)))
    return b.add("add", torch.add, (small, x), f.plus)


def constant(b: Builder) -> str | None:
    x = b.find(lambda s: True)
    assert x is not None
    if b.layer(x):
        return None  # it may be taken into the layer
    rank, last = b.rank(x), b.shape(x)[-1:] or (1,)
    way = int(b.rng.integers(5))
    if way == 0:
        c = float(b.numbers(1, zero=False))
        return b.add(f"+ {c}", lambda v: v + c, x, f.shifted(1.0, np.array(c)), rank=rank)
    if way == 1:
        values = b.numbers(*last)
        return b.add("+ c", torch.add, x, f.shifted(1.0, values.numpy()), values, rank=rank)
    if way == 2:
        values = b.numbers(*last)
        return b.add("c -", lambda v, c: c - v, x, f.shifted(-1.0, values.numpy()), values, rank=rank)
    if way == 3:
        values = b.numbers(*last, zero=False)
        return b.add("* c", torch.mul, x, f.elementwise, values, rank=rank)
    return b.add("/ 4", lambda v: -v / 4, x, f.elementwise, rank=rank)


# -- one parent each -----------------------------------------------------------------------------

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
        return b.add("relu", torch.relu, x, f.elementwise, rank=None)
    if b.chance(0.2):
        return b.add("abs", torch.abs, x, f.elementwise, rank=b.rank(x))
    text = b.one_of(list(_FUNCTIONS))
    function, exact, rank = _FUNCTIONS[text]
    return b.add(text, function, x, f.elementwise, exact=exact, rank=rank)


def in_place(b: Builder) -> str | None:
    fresh = [s.name for s in b.steps if s.kind in ("linear", "conv") and b.unread(s.name)]
    x = b.one_of([name for name in fresh if name in b.scope] or [""])
    if not x:
        return None
    found = b.add("relu_", torch.relu_, x, f.elementwise, rank=None)
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
    return b.add(text, ways[text], x, f.elementwise, rank=b.rank(x), same=same)


def batch_norm(b: Builder) -> str | None:
    """In evaluation mode; after a layer it is taken into that."""
    x = b.find(lambda s: len(s) in (1, 2, 3))
    if x is None or any(step.describe is f.batch_norm for step in [b.step(x)] if step):
        return None
    channels = b.shape(x)[0]
    layer = (nn.BatchNorm1d if len(b.shape(x)) < 3 else nn.BatchNorm2d)(channels, eps=0.0)
    _filled(b, layer)
    layer.running_mean = b.numbers(channels)
    layer.running_var = torch.from_numpy(b.rng.choice([0.25, 1.0, 4.0], channels))
    if b.chance(0.6):
        b.close(x)
    return b.add(repr(layer), layer, x, f.batch_norm, rank=None)


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
        ways[f"expand 2 along {axis}"] = lambda v: v.expand(*v.shape[:axis], 2, *v.shape[axis + 1 :])
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
        return b.add(f"stack({axis})", lambda *vs: torch.stack(vs, axis), (x, same), f.routed, rank=None)
    rest = shape[: axis - 1] + shape[axis:]
    parts = [x]
    for _ in range(int(b.rng.integers(1, 3))):
        other = x if b.chance(0.1) else b.find(lambda s: len(s) == len(shape) and s[: axis - 1] + s[axis:] == rest, blank=True)
        assert other is not None
        parts.append(other)
    return b.add(f"cat({axis})", lambda *vs: torch.cat(vs, axis), parts, f.routed, rank=None)


def grown(b: Builder) -> str | None:
    """A dense block: a layer of one feature, and what it reads beside it."""
    x = b.find(lambda s: len(s) == 1 and s[0] <= 4)
    if x is None:
        return None
    for _ in range(2):
        layer = _filled(b, nn.Linear(b.shape(x)[0], 1, b.chance(0.3)))
        new = b.add(repr(layer), layer, x, f.summed, kind="linear")
        x = b.add("cat(1)", lambda *vs: torch.cat(vs, 1), (x, new), f.routed, rank=None)
    return x


def filled(b: Builder) -> str | None:
    """A constant in the place of some neurons: a leaf."""
    x = b.find(lambda s: len(s) >= 1)
    if x is None:
        return None
    if b.chance(0.5):
        return b.add("pad(1, 0) with 0.5", lambda v: F.pad(v, (1, 0), value=0.5), x, partial(f.routed, filler=0.5), rank=b.rank(x))
    chosen = torch.from_numpy(b.rng.random(b.shape(x)) < 0.3)
    return b.add(f"masked_fill({chosen.int().tolist()}, 0.5)", lambda v: v.masked_fill(chosen, 0.5), x, partial(f.routed, filler=0.5), rank=b.rank(x))


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
    return b.add(text, function, x, f.winners, rank=None)


# -- products, norms, attention ------------------------------------------------------------------


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
    return b.add("mul", torch.mul, (x, y), f.multiplied((ranks[0] or 0, ranks[1] or 0)), rank=rank)


def gated(b: Builder) -> str | None:
    """A value, and a sigmoid or tanh of a layer."""
    x = b.find(lambda s: 1 <= len(s) <= 2)
    if x is None or b.rank(x) != 0:
        return None
    layer = _filled(b, nn.Linear(b.shape(x)[-1], b.shape(x)[-1]))
    a = b.add(repr(layer), layer, x, f.summed, kind="linear")
    text, rank = b.one_of([("sigmoid", 2), ("tanh", 1)])
    g = b.add(text, getattr(torch, text), a, f.elementwise, exact=False, rank=rank)
    return b.add("mul", torch.mul, (g, x), f.multiplied((rank, 0)))


def quotient(b: Builder) -> str | None:
    """The numerator takes all."""
    x = b.find(lambda s: True)
    assert x is not None
    shape = b.shape(x)
    y = b.find(lambda s: s == shape)
    assert y is not None

    def describe(net: f.Described, step: Step) -> None:
        with torch.no_grad():
            values = step.module(*(net.shaped(read) for read in step.reads)).numpy().ravel()
        net.identity(step.name, step.reads[0], lambda v: values)

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
    return b.add(repr(layer), _filled(b, layer), x, f.normalized, exact=False)


def matrices(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) == 2)
    if x is None or b.rank(x) is None:
        return None
    rows, inner = b.shape(x)
    y = b.find(lambda s: len(s) == 2 and (s[0] == inner or s[1] == inner))
    if y is None or b.rank(y) is None:
        return None
    ranks = (b.rank(x) or 0, b.rank(y) or 0)
    if b.shape(y)[0] == inner:
        return b.add("matmul", torch.matmul, (x, y), f.matrix_product(ranks), rank=None)
    return b.add("einsum ij,kj", lambda p, q: torch.einsum("bij,bkj->bik", p, q), (x, y), f.matrix_product(ranks, True), rank=None)


def attention(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) == 2 and s[0] <= 3 and s[1] <= 3)
    if x is None:
        return None
    parts = []
    for _ in range(3):
        layer = _filled(b, nn.Linear(b.shape(x)[1], 2, b.chance(0.5)))
        part = b.add(repr(layer), layer, x, f.summed, kind="linear")
        parts.append(part)
    q, k, v = parts
    turned = b.transparent("transpose(1, 2)", lambda u: u.transpose(1, 2), k)
    scores = b.add("matmul", torch.matmul, (q, turned), f.matrix_product((0, 0)))
    scaled = b.add("/ 2", lambda u: u / 2, scores, f.elementwise)
    weights = b.add("softmax(-1)", lambda u: u.softmax(-1), scaled, f.softmax, kind="softmax", exact=False, rank=3)
    b.close(turned, scores, scaled)
    return b.add("matmul", torch.matmul, (weights, v), f.matrix_product((3, 0)))


def fused_attention(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) == 2 and s[0] <= 3 and s[1] <= 3)
    if x is None or b.rank(x) != 0:
        return None
    inner, parts = b.shape(x)[1], []
    for _ in range(3):
        layer = _filled(b, nn.Linear(inner, inner, b.chance(0.5)))
        plain = b.chance(0.25)
        parts.append(x if plain else b.add(repr(layer), layer, x, f.summed, kind="linear"))
    causal = b.chance(0.4)
    return b.add(
        "attention, causal" if causal else "attention",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.5),
        parts,
        f.attended(0.5, causal),
        exact=False,
    )


def half_gated(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 1 and s[-1] % 2 == 0)
    if x is None or b.rank(x) != 0:
        return None
    return b.add("glu", F.glu, x, f.half_gated, exact=False)


def learned(b: Builder) -> str | None:
    """A class token."""
    x = b.find(lambda s: len(s) == 2)
    if x is None:
        return None
    token = b.numbers(1, 1, b.shape(x)[1])

    def put(v: Tensor, c: Tensor) -> Tensor:
        return torch.cat([c.expand(v.shape[0], -1, -1), v], 1)

    return b.add("token beside", put, x, f.beside, token, rank=None)


def sideways(b: Builder) -> str | None:
    """The batch in the second axis for a while, as in sequence models."""
    x = b.find(lambda s: len(s) == 2)
    if x is None:
        return None
    over = b.add("transpose(0, 1)", _turned, x, f.routed, batch_axis=1)
    if b.chance(0.5):
        done = b.add("relu", torch.relu, over, f.elementwise, batch_axis=1)
    else:
        layer = _filled(b, nn.Linear(b.shape(x)[1], 2, b.chance(0.5)))
        done = b.add(repr(layer), layer, over, f.summed, kind="linear", batch_axis=1)
    b.close(over, done)
    return b.add("transpose(0, 1)", _turned, done, f.routed, rank=None)


def _turned(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def alone_softmax(b: Builder) -> str | None:
    x = b.find(lambda s: len(s) >= 1 and s[-1] >= 2)
    if x is None:
        return None
    return b.add("softmax(-1)", lambda u: u.softmax(-1), x, f.softmax, kind="softmax", exact=False, rank=3)


BLOCKS: dict[Callable[[Builder], str | None], float] = {
    linear: 4,
    shared: 1.5,
    conv: 3,
    transposed: 0.5,
    padded: 1.5,
    average: 2,
    matrix: 0.7,
    add: 3,
    broadcast: 1.5,
    constant: 1.5,
    activation: 4,
    in_place: 0.7,
    unchanged: 0.7,
    batch_norm: 1,
    moved: 3,
    joined: 2.5,
    grown: 0.7,
    filled: 0.5,
    largest: 0.7,
    product: 0.7,
    gated: 0.8,
    quotient: 0.4,
    norm: 0.8,
    matrices: 0.8,
    attention: 0.7,
    alone_softmax: 0.3,
    fused_attention: 0.7,
    half_gated: 0.4,
    learned: 0.4,
    sideways: 0.5,
}
_WEIGHTS = np.array(list(BLOCKS.values()))
_CHANCES = _WEIGHTS / _WEIGHTS.sum()
BLOCKS_LIST = list(BLOCKS)
