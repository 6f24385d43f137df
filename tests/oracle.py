"""A brute-force oracle: enumerates every walk of a small network and multiplies its relevances.

It shares nothing with the package. A network is described neuron by neuron with dense weights,
rules are written out for one neuron at a time from their textbook formulas, and a query is a sum
over an explicit list of walks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

Neuron = tuple[str, int]
"""Address of a variable and flat index of one of its neurons."""


@dataclass
class Parent:
    neuron: Neuron
    value: float
    weight: float
    constant: bool = False


ColumnRule = Callable[[list[Parent]], list[float]]
"""The unnormalised contributions T~_ij of the parents of one neuron."""


def zero(parents: list[Parent]) -> list[float]:
    return [p.value * p.weight for p in parents]


def plain_gamma(gamma: float) -> ColumnRule:
    return lambda parents: [p.value * (p.weight + gamma * max(p.weight, 0)) for p in parents]


def sign_aware_gamma(gamma: float) -> ColumnRule:
    def rule(parents: list[Parent]) -> list[float]:
        z = [p.value * p.weight for p in parents]
        sign = -1.0 if sum(z) < 0 else 1.0
        return [sign * c + gamma * max(sign * c, 0) for c in z]

    return rule


def zplus(parents: list[Parent]) -> list[float]:
    return [max(p.value * p.weight, 0.0) for p in parents]


def alpha_beta(alpha: float, beta: float) -> ColumnRule:
    def rule(parents: list[Parent]) -> list[float]:
        z = [p.value * p.weight for p in parents]
        positive = sum(max(c, 0) for c in z)
        negative = sum(min(c, 0) for c in z)
        return [
            (alpha * max(c, 0) / positive if positive > 0 else 0.0)
            - (beta * min(c, 0) / negative if negative < 0 else 0.0)
            for c in z
        ]

    return rule


def flat(parents: list[Parent]) -> list[float]:
    return [1.0 for _ in parents]


def wsquare(parents: list[Parent]) -> list[float]:
    return [p.weight**2 for p in parents]


def zbox(low: float, high: float) -> ColumnRule:
    return lambda parents: [
        0.0 if p.constant else p.value * p.weight - low * max(p.weight, 0) - high * min(p.weight, 0)
        for p in parents
    ]


@dataclass
class Oracle:
    """A network as lists of parents, grown layer by layer from the inputs."""

    bias_is_input: bool
    values: dict[str, np.ndarray] = field(default_factory=dict)
    parents: dict[Neuron, list[Parent]] = field(default_factory=dict)
    rules: dict[str, ColumnRule | None] = field(default_factory=dict)
    leaves: list[str] = field(default_factory=list)
    output: str = ""

    # -- describing a network --------------------------------------------------------------------

    def input(self, name: str, values: np.ndarray) -> str:
        self.values[name] = values.ravel()
        self.leaves.append(name)
        return name

    def weighted(
        self,
        name: str,
        rule: ColumnRule,
        size: int,
        connections: Iterable[tuple[int, str, int, float]],
        bias: np.ndarray | None = None,
    ) -> str:
        """`connections`: (output neuron, parent variable, parent neuron, weight)."""
        out = np.zeros(size)
        for j in range(size):
            self.parents[name, j] = []
        for j, variable, i, weight in connections:
            value = float(self.values[variable][i])
            self.parents[name, j].append(Parent((variable, i), value, float(weight)))
            out[j] += value * weight
        if bias is not None:
            out = out + bias
            if self.bias_is_input:
                for j in range(size):
                    leaf = (f"{name}.bias", j)
                    self.parents[name, j].append(Parent(leaf, 1.0, float(bias[j]), True))
                self.leaves.append(f"{name}.bias")
        self.values[name], self.rules[name] = out, rule
        self.output = name
        return name

    def linear(
        self, name: str, rule: ColumnRule, x: str, w: np.ndarray, bias: np.ndarray | None
    ) -> str:
        connections = [(j, x, i, w[j, i]) for j in range(w.shape[0]) for i in range(w.shape[1])]
        return self.weighted(name, rule, w.shape[0], connections, bias)

    def conv2d(
        self,
        name: str,
        rule: ColumnRule,
        x: str,
        shape: tuple[int, int, int],
        w: np.ndarray,
        bias: np.ndarray | None,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
    ) -> tuple[str, tuple[int, int, int]]:
        """A convolution written out; `shape` is channels, height, width."""
        _, height, width = shape
        outs, per_group, kh, kw = w.shape
        h = (height + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
        v = (width + 2 * padding - dilation * (kw - 1) - 1) // stride + 1
        connections = []
        for o, y, u in np.ndindex(outs, h, v):
            group = o // (outs // groups)
            for c, ky, ku in np.ndindex(per_group, kh, kw):
                row = y * stride - padding + ky * dilation
                column = u * stride - padding + ku * dilation
                if 0 <= row < height and 0 <= column < width:
                    i = np.ravel_multi_index((group * per_group + c, row, column), shape)
                    j = np.ravel_multi_index((o, y, u), (outs, h, v))
                    connections.append((int(j), x, int(i), w[o, c, ky, ku]))
        spread = None if bias is None else np.repeat(bias, h * v)
        return self.weighted(name, rule, outs * h * v, connections, spread), (outs, h, v)

    def identity(
        self, name: str, x: str, function: Callable[[np.ndarray], np.ndarray] = lambda v: v
    ) -> str:
        self.values[name] = function(self.values[x])
        for i in range(len(self.values[x])):
            self.parents[name, i] = [Parent((x, i), 1.0, 1.0)]
        self.rules[name] = None
        self.output = name
        return name

    def pick(self, name: str, chosen: list[Neuron]) -> str:
        """A routing: output neuron j has the one parent `chosen[j]`."""
        self.values[name] = np.array([self.values[v][i] for v, i in chosen])
        for j, neuron in enumerate(chosen):
            self.parents[name, j] = [Parent(neuron, 1.0, 1.0)]
        self.rules[name] = None
        self.output = name
        return name

    def relu(self, name: str, x: str) -> str:
        return self.identity(name, x, lambda v: np.maximum(v, 0))

    def cat(self, name: str, *xs: str) -> str:
        return self.pick(name, [(x, i) for x in xs for i in range(len(self.values[x]))])

    def max_pool(self, name: str, x: str, shape: tuple[int, int, int], size: int) -> str:
        c, height, width = shape
        grid = np.arange(c * height * width).reshape(shape)
        chosen = []
        for k, y, u in np.ndindex(c, height // size, width // size):
            window = grid[k, y * size : (y + 1) * size, u * size : (u + 1) * size].ravel()
            chosen.append((x, int(window[np.argmax(self.values[x][window])])))
        return self.pick(name, chosen)

    def add(
        self,
        name: str,
        rule: ColumnRule,
        terms: list[tuple[str, float]],
        bias: np.ndarray | None = None,
    ) -> str:
        size = len(self.values[terms[0][0]])
        connections = [(j, x, j, sign) for j in range(size) for x, sign in terms]
        return self.weighted(name, rule, size, connections, bias)

    # -- walks -----------------------------------------------------------------------------------

    def column(self, neuron: Neuron, normalized: bool) -> list[tuple[Neuron, float]]:
        parents = self.parents[neuron]
        rule = self.rules[neuron[0]]
        if rule is None:
            return [(parents[0].neuron, 1.0)]
        contributions = rule(parents)
        total = sum(contributions)
        if not normalized:
            return [(p.neuron, c) for p, c in zip(parents, contributions, strict=True)]
        if abs(total) <= 1e-300:
            return [(p.neuron, 1 / len(parents)) for p in parents]
        return [(p.neuron, c / total) for p, c in zip(parents, contributions, strict=True)]

    def walks(self, target: int, normalized: bool = True) -> list[tuple[frozenset[Neuron], float]]:
        """Every walk from the target to a leaf: the neurons it visits, and its relevance."""
        start = 1.0 if normalized else float(self.values[self.output][target])
        found: list[tuple[frozenset[Neuron], float]] = []
        columns: dict[Neuron, list[tuple[Neuron, float]]] = {}

        def follow(neuron: Neuron, visited: tuple[Neuron, ...], relevance: float) -> None:
            visited = (*visited, neuron)
            if neuron[0] in self.leaves:
                found.append((frozenset(visited), relevance))
                return
            if neuron not in columns:
                columns[neuron] = self.column(neuron, normalized)
            for parent, share in columns[neuron]:
                follow(parent, visited, relevance * share)

        follow((self.output, target), (), start)
        return found


def relevance(walks: list[tuple[frozenset[Neuron], float]], *sets: set[Neuron]) -> float:
    """The sum over the walks that visit every set."""
    return sum(r for visited, r in walks if all(visited & chosen for chosen in sets))


def marginal(
    walks: list[tuple[frozenset[Neuron], float]], name: str, size: int, *sets: set[Neuron]
) -> np.ndarray:
    """The relevance of every neuron of a variable, jointly with sets."""
    total = np.zeros(size)
    for visited, r in walks:
        if all(visited & chosen for chosen in sets):
            for variable, i in visited:
                if variable == name:
                    total[i] += r
    return total
