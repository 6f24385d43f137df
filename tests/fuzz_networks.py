"""Random small networks: each a torch module, and neuron by neuron an oracle.

A network is a list of steps, each a module whose name is the address of what it computes. A step
describes itself: what moves neurons about is traced by numbers that it moves, what adds them up
is probed by unit vectors. `BLOCKS` draw steps (see `fuzz_blocks`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import oracle as o
import torch
from torch import Tensor, nn

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

    def __str__(self) -> str:
        shared = f"  (module {self.module_name})" if self.module_name != self.name else ""
        return f"{self.name} = {self.text}({', '.join(self.reads)}){shared}"


@dataclass
class Described(o.Oracle):
    """An oracle that knows shapes, what is exact, and zeros that are written and not computed.

    Attributes:
        zeros: neurons that are written as zeros; `alone` those that have no other parents.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    exact: dict[str, bool] = field(default_factory=dict)
    zeros: set[o.Neuron] = field(default_factory=set)
    alone: set[o.Neuron] = field(default_factory=set)
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
                if size > 0 and total <= EPS * size and not (
                    self.exact.get(name, False) and total == 0
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


@dataclass
class Network:
    """The steps, and inputs by name: values `[BATCH, ...]`; integers are embedded."""

    inputs: dict[str, Tensor]
    steps: list[Step]

    @property
    def output(self) -> str:
        return self.steps[-1].name

    def __str__(self) -> str:
        shapes = (f"{name}{tuple(x.shape[1:])}" for name, x in self.inputs.items())
        return "\n".join([f"inputs {', '.join(shapes)}", *map(str, self.steps)])

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
            name: place[0] + (f"@{k}" if k else "")
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
        return Network(inputs or self.inputs, kept)

    def model(self) -> nn.Module:
        """The torch module, with copies of the weights."""
        return copy.deepcopy(Model(self.steps, list(self.inputs))).eval()

    def describe(
        self,
        sample: int,
        bias_is_input: bool,
        alphas: Callable[[Sequence[int]], list[float]],
        softmax_rule: bool,
    ) -> Described:
        """The oracle of one sample; every weighted sum under LRP-0 so far."""
        net = Described(bias_is_input)
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

    def folded(self, step: Step) -> Step | None:
        """The batch norm that the package takes into a layer: one that alone reads its channels."""
        readers = [other for other in self.steps if step.name in other.reads]
        if len(readers) != 1 or not isinstance(readers[0].module, nn.BatchNorm1d | nn.BatchNorm2d):
            return None
        if isinstance(step.module, nn.Linear):
            return readers[0] if len(self.shape(step.name)) == 1 else None
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


class Model(nn.Module):
    """The steps one after the other."""

    def __init__(self, steps: Sequence[Step], inputs: Sequence[str]) -> None:
        super().__init__()
        self.plan = [(step.name, step.module_name, step.reads) for step in steps]
        self.given = list(inputs)
        for step in steps:
            if step.name == step.module_name:
                self.add_module(step.name, step.module)

    def forward(
        self, x: Tensor | None = None, y: Tensor | None = None, t: Tensor | None = None
    ) -> Tensor:
        values = {"x": x, "y": y, "t": t}
        for name, module, reads in self.plan:
            values[name] = getattr(self, module)(*(values[read] for read in reads))
        return values[self.plan[-1][0]]


# -- how steps describe themselves ---------------------------------------------------------------


def routed(net: Described, step: Step, filler: float | None = None) -> None:
    """What moves neurons: numbers in their place say where they went.

    Arguments:
        filler: the constant that stands in neurons without a parent.
    """
    numbered, place, count = [], [("", 0)], 0
    for read in step.reads:
        size = len(net.values[read])
        numbers = torch.arange(count + 1, count + size + 1, dtype=torch.float64)
        numbered.append(numbers.view(1, *net.shapes[read]))
        place += [(read, i) for i in range(size)]
        count += size
    with torch.no_grad():
        found = step.module(*numbered).flatten()
    if filler is not None:
        ones = step.module(*(torch.ones_like(n) for n in numbered)).flatten()
        twos = step.module(*(2 * torch.ones_like(n) for n in numbered)).flatten()
        found = torch.where(ones == twos, 0.0, found)
    chosen = [place[round(float(number))] for number in found]
    pick(net, step, chosen, filler)


def pick(
    net: Described, step: Step, chosen: list[o.Neuron], filler: float | None = None
) -> None:
    """Neuron j is the neuron `chosen[j]`; one called `""` is the filler."""
    if filler is None:
        net.pick(step.name, chosen)
    else:
        net.fill(step.name, [neuron if neuron[0] else None for neuron in chosen], filler)
    for j, neuron in enumerate(chosen):
        if neuron in net.zeros or (not neuron[0] and filler == 0):
            net.zeros.add((step.name, j))


def elementwise(net: Described, step: Step) -> None:
    """A function of one parent per neuron."""
    with torch.no_grad():
        values = step.module(net.shaped(step.reads[0])).numpy().ravel()
    net.identity(step.name, step.reads[0], lambda v: values)
    net.zeros |= {
        (step.name, j) for j, v in enumerate(values) if v == 0 and (step.reads[0], j) in net.zeros
    }


def winners(net: Described, step: Step) -> None:
    """A maximum: the neuron where its derivative is."""
    x = net.shaped(step.reads[0]).requires_grad_()
    y = step.module(x).flatten()
    chosen = []
    for value in y:
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        chosen.append((step.reads[0], int(gradient.flatten().argmax())))
    net.pick(step.name, chosen)


def summed(net: Described, step: Step) -> None:
    """Sums with fixed weights of all operands, a constant among them: probed by unit vectors.

    Connections are where a module with all weights one has any.
    """
    module = step.module
    weights, bias = probe(net, step, module)
    kept = {name: p.data.clone() for name, p in module.named_parameters() if name != "bias"}
    for name in kept:
        module.get_parameter(name).data.fill_(1.0)
    connected = probe(net, step, module)[0] != 0
    for name, parameter in kept.items():
        module.get_parameter(name).data.copy_(parameter)
    if step.norm is not None:
        with torch.no_grad():
            one, zero = torch.ones(1, *net.shapes[step.name]).double(), torch.zeros(1)
            shift = step.norm(one * zero).numpy().ravel()
            scale = step.norm(one).numpy().ravel() - shift
        weights, bias = weights * scale[:, None], bias * scale + shift
    neurons = [(read, i) for read in step.reads for i in range(len(net.values[read]))]
    connections = [
        (j, *neurons[i], float(weights[j, i]))
        for j in range(len(weights))
        for i in np.flatnonzero(connected[j])
    ]
    has_bias = getattr(module, "bias", None) is not None or step.norm is not None
    net.connect(step.name, connections, len(weights), bias if has_bias else None)


def probe(net: Described, step: Step, module: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and the constant of an affine function."""
    sizes = [len(net.values[read]) for read in step.reads]
    total = sum(sizes)
    unit = torch.cat([torch.zeros(1, total), torch.eye(total)]).double()
    parts = unit.split(sizes, 1)
    with torch.no_grad():
        given = [
            part.reshape(total + 1, *net.shapes[read])
            for part, read in zip(parts, step.reads, strict=True)
        ]
        found = module(*given).flatten(1)
    return (found[1:] - found[:1]).T.numpy(), found[0].numpy()


def added(signs: tuple[float, ...]) -> Describe:
    """A sum of tensors, which broadcast; also a tensor and itself."""

    def describe(net: Described, step: Step) -> None:
        shape = net.shapes[step.name]
        connections = []
        for read, sign in zip(step.reads, signs, strict=True):
            numbers = np.arange(len(net.values[read])).reshape(net.shapes[read])
            where = np.broadcast_to(numbers, shape).ravel()
            connections += [(j, read, int(i), sign) for j, i in enumerate(where)]
        net.connect(step.name, connections, int(np.prod(shape)), None)
        real = {j for j, read, i, _ in connections if (read, i) not in net.zeros}
        net.zeros |= {(step.name, j) for j in range(int(np.prod(shape))) if j not in real}

    return describe


plus, minus = added((1.0, 1.0)), added((1.0, -1.0))


def shifted(scale: float, constant: np.ndarray) -> Describe:
    """`scale * x + constant`: a sum with one operand, whose constant is a bias."""

    def describe(net: Described, step: Step) -> None:
        x = step.reads[0]
        spread = np.broadcast_to(constant, net.shapes[step.name]).ravel()
        if not net.bias_is_input:
            net.identity(step.name, x, lambda v: scale * v + spread)
        else:
            net.add(step.name, o.zero, [(x, scale)], spread)

    return describe


def batch_norm(net: Described, step: Step) -> None:
    """A scale and a shift of each channel, that no layer before has taken in."""
    if step.norm is step.module:  # folded: the layer before computes it
        net.identity(step.name, step.reads[0])
        return
    weights, shift = probe(net, step, step.module)
    if net.bias_is_input:
        x = step.reads[0]
        connections = [(j, x, j, float(weights[j, j])) for j in range(len(weights))]
        net.connect(step.name, connections, len(weights), shift)
    else:
        elementwise(net, step)


def multiplied(gates: tuple[int, int]) -> Describe:
    """An elementwise product of two operands, which broadcast."""

    def describe(net: Described, step: Step) -> None:
        shape, factors = net.shapes[step.name], []
        for read in step.reads:
            numbers = np.arange(len(net.values[read])).reshape(net.shapes[read])
            factors.append([(read, int(i)) for i in np.broadcast_to(numbers, shape).ravel()])
        net.split(step.name, factors, net.alphas(gates))

    return describe


def matrix_product(gates: tuple[int, int], transposed: bool = False) -> Describe:
    """`a @ b`, or `a @ b.T`, without stacked axes beside the batch."""

    def describe(net: Described, step: Step) -> None:
        (a, b), (rows, inner) = step.reads, net.shapes[step.reads[0]]
        first, second = net.shapes[b]
        columns = first if transposed else second
        terms = [
            (
                r * columns + c,
                (a, r * inner + k),
                (b, c * second + k if transposed else k * second + c),
            )
            for r, c, k in np.ndindex(rows, columns, inner)
        ]
        net.product(step.name, o.zero, rows * columns, terms, net.alphas(gates))

    return describe


def normalized(net: Described, step: Step) -> None:
    """A layer norm or group norm."""
    module, x = step.module, step.reads[0]
    size, shape = len(net.values[x]), net.shapes[x]
    if isinstance(module, nn.LayerNorm):
        groups = np.arange(size).reshape(-1, shape[-1])
        spread = [None if p is None else np.resize(p.detach().numpy(), size) for p in _affine(module)]
    else:
        assert isinstance(module, nn.GroupNorm)
        groups = np.arange(size).reshape(module.num_groups, -1)
        each = size // shape[0]
        spread = [None if p is None else np.repeat(p.detach().numpy(), each) for p in _affine(module)]
    gain = np.ones(size) if spread[0] is None else spread[0]
    net.normalize(step.name, o.zero, x, groups.tolist(), gain, spread[1], module.eps)


def _affine(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return module.weight, module.bias


def softmax(net: Described, step: Step) -> None:
    """Over the last axis: an identity, or a Taylor expansion."""
    x = step.reads[0]
    size = len(net.values[x])
    groups = np.arange(size).reshape(-1, net.shapes[x][-1]).tolist()
    net.softmax(step.name, o.zero if net.softmax_rule else None, x, groups)


def attended(scale: float, causal: bool) -> Describe:
    """Scaled dot-product attention of queries, keys and values; variables on the way are hidden."""

    def describe(net: Described, step: Step) -> None:
        (q, k, v), name = step.reads, step.name
        (rows, inner), (keys, _), (_, outer) = (net.shapes[read] for read in step.reads)
        net.identity(f"{name}~q", q, lambda x: scale * x)
        terms = [
            (r * keys + c, (f"{name}~q", r * inner + i), (k, c * inner + i))
            for r, c, i in np.ndindex(rows, keys, inner)
        ]
        net.product(f"{name}~scores", o.zero, rows * keys, terms, net.alphas((0, 0)))
        scores = f"{name}~scores"
        if causal:
            chosen = [
                (scores, r * keys + c) if c <= r else None for r, c in np.ndindex(rows, keys)
            ]
            scores = net.fill(f"{name}~masked", chosen, -np.inf)
        groups = np.arange(rows * keys).reshape(rows, keys).tolist()
        rule = o.zero if net.softmax_rule else None
        weights = net.softmax(f"{name}~softmax", rule, scores, groups)
        terms = [
            (r * outer + i, (weights, r * keys + c), (v, c * outer + i))
            for r, c, i in np.ndindex(rows, keys, outer)
        ]
        net.product(name, o.zero, rows * outer, terms, net.alphas((3, 0)))

    return describe


def half_gated(net: Described, step: Step) -> None:
    """`F.glu` over the last axis: a value times the sigmoid of the other half."""
    numbers = np.arange(len(net.values[step.reads[0]])).reshape(net.shapes[step.reads[0]])
    value, gate = (
        [(step.reads[0], int(i)) for i in part.ravel()] for part in np.split(numbers, 2, -1)
    )
    net.elementwise(f"{step.name}~gate", gate, lambda x: 1 / (1 + np.exp(-x)))
    gates = [(f"{step.name}~gate", j) for j in range(len(gate))]
    net.split(step.name, [value, gates], net.alphas((0, 2)))


def beside(net: Described, step: Step) -> None:
    """A learned vector in front of others: a leaf."""
    constant = step.module.c0.detach().numpy().ravel()  # type: ignore[union-attr]
    leaf = net.constant(f"{step.name}~learned", constant)
    x = step.reads[0]
    net.pick(
        step.name,
        [(leaf, i) for i in range(len(constant))] + [(x, i) for i in range(len(net.values[x]))],
    )


def embedded(net: Described, step: Step) -> None:
    """Vectors that integers are looked up in: a leaf."""
    tokens = torch.from_numpy(net.values[step.reads[0]].astype(int)).view(1, -1)
    with torch.no_grad():
        net.input(step.name, step.module(tokens).numpy())


def _short(values: np.ndarray) -> bool:
    """Whether values are fractions that single precision holds, with room to multiply."""
    scaled = values.astype(np.float64) * 2**10
    return bool((scaled == np.round(scaled)).all() and (np.abs(scaled) < 2**20).all())
