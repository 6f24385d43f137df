"""How the steps of a random network describe themselves to the oracle, neuron by neuron.

What moves neurons about is traced by numbers that it moves, what adds them up is probed by unit
vectors, and the rest is written out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from support import oracle as o
from support.fuzz.networks import Describe, Described, Step


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


def pick(net: Described, step: Step, chosen: list[o.Neuron], filler: float | None = None) -> None:
    """Neuron j is the neuron `chosen[j]`; one called `""` is the filler."""
    if filler is None:
        net.pick(step.name, chosen)
    else:
        net.filled[step.name] = step.reads
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
    net.largest(step.name, chosen)


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
    has_bias = getattr(module, "bias", None) is not None or bool(bias.any())
    has_bias = has_bias or isinstance(step.norm, nn.BatchNorm1d | nn.BatchNorm2d)
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
        spread = [
            None if p is None else np.resize(p.detach().numpy(), size) for p in _affine(module)
        ]
    else:
        assert isinstance(module, nn.GroupNorm)
        groups = np.arange(size).reshape(module.num_groups, -1)
        each = size // shape[0]
        spread = [
            None if p is None else np.repeat(p.detach().numpy(), each) for p in _affine(module)
        ]
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
            chosen = [(scores, r * keys + c) if c <= r else None for r, c in np.ndindex(rows, keys)]
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
