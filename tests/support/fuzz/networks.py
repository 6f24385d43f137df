"""Random small networks: each a torch module, and neuron by neuron an oracle.

A network is a list of steps, each a module whose name is the address of what it computes, and
each with a function that describes it to the oracle (`fuzz.describing`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from support import oracle as o

BATCH = 3
Connection = tuple[int, str, int, float]
EPS = 1e-9
"""Sums that cancel to this, relative to their summands, may be zero or not, by rounding."""


class Call(nn.Module):
    """A function as a module, so that its result has a name."""

    def __init__(self, function: Callable[..., Tensor], *constants: Tensor) -> None:
        super().__init__()
        self.function = function
        for k, constant in enumerate(constants):
            self.register_parameter(f"c{k}", nn.Parameter(constant))
        self.count = len(constants)

    def forward(self, *operands: Tensor) -> Tensor:
        return self.function(*operands, *(getattr(self, f"c{k}") for k in range(self.count)))


Describe = Callable[["Described", "Step"], None]


@dataclass
class Step:
    """One call of a module.

    Attributes:
        reads: the variables, by name, that it is given.
        kind: what composites tell operations apart by: conv, linear, softmax; else empty.
        exact: whether it computes dyadic fractions exactly.
        rank: how much its result is a gate (1: tanh, 2: sigmoid, 3: softmax); `None`: unclear.
        module_name: whose module it calls: another step's, where a module is shared.
        batch_axis: where its result has the samples.
        folds: a scale and shift by constants, that a layer of which it is the only reader takes in.
        norm: of such a layer and of that itself, the module taken in.
        same: whether it may give its operand itself, so that the two are one variable.
    """

    name: str
    module_name: str
    text: str
    module: nn.Module
    reads: tuple[str, ...]
    describe: Describe
    kind: str = ""
    exact: bool = True
    rank: int | None = 0
    norm: nn.Module | None = None
    same: bool = False
    batch_axis: int = 0
    folds: bool = False

    def __str__(self) -> str:
        shared = f"  (module {self.module_name})" if self.module_name != self.name else ""
        return f"{self.name} = {self.text}({', '.join(self.reads)}){shared}"


@dataclass
class Described(o.Oracle):
    """An oracle that knows shapes, what is exact, and zeros that are written and not computed.

    Attributes:
        zeros: neurons that are written as zeros; `alone` those that have no other parents.
        filled: what was read where a constant stands for some neurons, or all.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    exact: dict[str, bool] = field(default_factory=dict)
    zeros: set[o.Neuron] = field(default_factory=set)
    alone: set[o.Neuron] = field(default_factory=set)
    filled: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stabilizers: dict[str, float] = field(default_factory=dict)
    alphas: Callable[[Sequence[int]], list[float]] = lambda gates: [0.5, 0.5]
    softmax_rule: bool = False

    def shaped(self, name: str) -> Tensor:
        """The values, with a batch axis."""
        return torch.from_numpy(self.values[name].copy()).view(1, *self.shapes[name])

    def connect(
        self, name: str, connections: Sequence[Connection], size: int, bias: np.ndarray | None
    ) -> None:
        """A weighted sum; zeros that are written are no parents beside others."""
        real = [c for c in connections if (c[1], c[2]) not in self.zeros]
        reached = {c[0] for c in real}
        if bias is not None and self.bias_is_input:
            reached = set(range(size))
        alone = [c for c in connections if c[0] not in reached]
        self.alone |= {(name, c[0]) for c in alone}
        self.weighted(name, o.zero, size, sorted(real + alone, key=lambda c: c[0]), bias)

    def quotient(self, name: str, reads: tuple[str, ...], values: np.ndarray) -> str:
        """What divides takes nothing."""
        return self.identity(name, reads[0], lambda v: values)

    def largest(self, name: str, chosen: list[o.Neuron]) -> str:
        """A maximum: neuron j is that of `chosen[j]`."""
        return self.pick(name, chosen)

    def column(self, neuron: o.Neuron, normalized: bool) -> list[tuple[o.Neuron, float]]:
        if neuron in self.alone:
            parents = self.parents[neuron]
            return [(p.neuron, 1 / len(parents) if normalized else 0.0) for p in parents]
        floor = self.stabilizers.get(neuron[0], 0.0)
        rule = self.rules[neuron[0]]
        if normalized and floor and rule is not None and not isinstance(rule, o.Occlusion):
            parents = self.parents[neuron]
            if abs(sum(rule(parents))) <= floor:
                return [(p.neuron, 1 / len(parents)) for p in parents]
        return super().column(neuron, normalized)

    def is_blank(self, neuron: o.Neuron) -> bool:
        return neuron in self.zeros or neuron in self.blank

    def doubtful(self) -> bool:
        """Whether rounding decides something: a sum that nearly cancels, and not exactly."""
        for (name, _), parents in self.parents.items():
            rule = self.rules[name]
            if rule is None or isinstance(rule, o.Occlusion):
                continue
            for terms in (o.zero(parents), rule(parents)):
                total, size = abs(sum(terms)), sum(map(abs, terms))
                if 0 < total <= 10 * self.stabilizers.get(name, 0.0):
                    return True
                if (
                    size > 0
                    and total <= EPS * size
                    and not (self.exact.get(name, False) and total == 0)
                ):
                    return True
        return False

    def condition(self) -> float:
        """How much the summands of a column exceed their sum, at most."""
        worst = 1.0
        for (name, _), parents in self.parents.items():
            rule = self.rules[name]
            if rule is None or isinstance(rule, o.Occlusion):
                continue
            for terms in (o.zero(parents), rule(parents)):
                total = abs(sum(terms))
                if total > 0:
                    worst = max(worst, sum(map(abs, terms)) / total)
        return worst


Net = TypeVar("Net", bound=Described)


@dataclass
class Network:
    """The steps, and inputs by name: values `[BATCH, ...]`; integers are embedded.

    Attributes:
        head: a function of the outputs that the package looks through; empty without one.
    """

    inputs: dict[str, Tensor]
    steps: list[Step]
    head: str = ""

    @property
    def output(self) -> str:
        return self.steps[-1].name

    def __str__(self) -> str:
        shapes = (f"{name}{tuple(x.shape[1:])}" for name, x in self.inputs.items())
        head = [f"head {self.head}"] * bool(self.head)
        return "\n".join([f"inputs {', '.join(shapes)}", *map(str, self.steps), *head])

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """Of every variable, `[BATCH, ...]`."""
        return run(self.steps, self.inputs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a variable, without the batch."""
        axis = next((step.batch_axis for step in self.steps if step.name == name), 0)
        return shape_of(self.values[name], axis)

    @property
    def leaves(self) -> dict[str, str]:
        """The address of every real input."""
        real = [name for name, x in self.inputs.items() if x.is_floating_point()]
        return {name: "input" if len(self.inputs) == 1 else name for name in real}

    def address(self, name: str) -> str:
        """What the package calls a variable, or a leaf that enters there."""
        plain, dot, leaf = name.partition(".")
        return self.leaves.get(plain, plain) + dot + leaf

    def without(self, name: str, instead: str) -> Network:
        """Without a step, another variable in its place; and without what nothing reads then."""
        steps = [
            replace(step, reads=tuple(instead if read == name else read for read in step.reads))
            for step in self.steps
            if step.name != name
        ]
        needed, kept = {steps[-1].name}, []
        for step in reversed(steps):
            if step.name in needed:
                needed.update(step.reads)
                kept.append(step)
        kept.reverse()
        calls: dict[str, list[str]] = {}
        for step in kept:  # a module's calls are numbered
            calls.setdefault(step.module_name, []).append(step.name)
        names = {
            name: place[0].partition("@")[0] + (f"@{k}" if k else "")
            for place in calls.values()
            for k, name in enumerate(place)
        }
        kept = [
            replace(
                step,
                name=names[step.name],
                module_name=names[calls[step.module_name][0]],
                reads=tuple(names.get(read, read) for read in step.reads),
            )
            for step in kept
        ]
        used = {read for step in kept for read in step.reads}
        inputs = {n: x for n, x in self.inputs.items() if n in used}
        return Network(inputs or self.inputs, kept, self.head)

    def model(self) -> nn.Module:
        """The torch module, with copies of the weights."""
        return copy.deepcopy(Model(self.steps, self.head)).eval()

    def describe(
        self,
        sample: int,
        bias_is_input: bool,
        alphas: Callable[[Sequence[int]], list[float]],
        softmax_rule: bool,
        kind: type[Net],
    ) -> Net:
        """The oracle of one sample; every weighted sum under LRP-0 so far."""
        net = kind(bias_is_input)
        net.alphas, net.softmax_rule = alphas, softmax_rule
        for name, x in self.inputs.items():
            value = x[sample : sample + 1]
            if x.is_floating_point():
                net.input(name, value.numpy())
            else:
                net.values[name] = value.numpy().ravel()
            net.shapes[name], net.exact[name] = tuple(value.shape[1:]), _short(value.numpy())
        net.shapes.update({name: self.shape(name) for name in self.values})
        taken_in: set[str] = set()
        for step in self.steps:
            norm = self.folded(step)
            if norm is not None:
                taken_in.add(norm.name)
                step = replace(step, norm=norm.module)
            elif step.name in taken_in:
                step = replace(step, norm=step.module)
            step.describe(net, step)
            exact = step.exact and all(net.exact[read] for read in step.reads)
            net.exact[step.name] = exact and _short(net.values[step.name])
        net.output = self.output
        return net

    def rewritten(self, name: str) -> bool:
        """Whether the package computes something else there, as a layer that takes in a norm."""
        return any(step.name == name and self.folded(step) for step in self.steps)

    def folded(self, step: Step) -> Step | None:
        """What the package takes into a layer: a batch norm that alone reads its channels, or the
        same written out."""
        readers = [other for other in self.steps if step.name in other.reads]
        if len(readers) != 1 or not readers[0].folds:
            return None
        if isinstance(step.module, nn.Linear):
            by_channel = isinstance(readers[0].module, Call) or len(self.shape(step.name)) == 1
            return readers[0] if by_channel else None
        return readers[0] if isinstance(step.module, nn.Conv1d | nn.Conv2d) else None


def shape_of(value: Tensor, batch_axis: int) -> tuple[int, ...]:
    """Without the batch."""
    return tuple(value.shape[:batch_axis] + value.shape[batch_axis + 1 :])


def run(steps: Sequence[Step], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The value of every variable; nothing is overwritten."""
    values = dict(inputs)
    with torch.no_grad():
        for step in steps:
            values[step.name] = step.module(*(values[read].clone() for read in step.reads))
    return values


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda v: v,
    "softmax": lambda v: v.softmax(-1),
    "log_softmax": lambda v: v.log_softmax(-1),
    "sigmoid": torch.sigmoid,
}


class Model(nn.Module):
    """The steps one after the other."""

    def __init__(self, steps: Sequence[Step], head: str) -> None:
        super().__init__()
        self.head = HEADS[head]
        self.plan = [(step.name, step.module_name, step.reads) for step in steps]
        for step in steps:
            if step.name == step.module_name:
                self.add_module(step.name, step.module)

    def forward(
        self, x: Tensor | None = None, y: Tensor | None = None, t: Tensor | None = None
    ) -> Tensor:
        values = {"x": x, "y": y, "t": t}
        for name, module, reads in self.plan:
            values[name] = getattr(self, module)(*(values[read] for read in reads))
        return self.head(values[self.plan[-1][0]])


def _short(values: np.ndarray) -> bool:
    """Whether values are fractions that single precision holds, with room to multiply."""
    scaled = values.astype(np.float64) * 2**10
    return bool((scaled == np.round(scaled)).all() and (np.abs(scaled) < 2**20).all())
