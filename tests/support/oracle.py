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


@dataclass
class Factor(Parent):
    """A parent in a product: its weight is the other factor's value times alpha."""

    alpha: float = 1.0


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


def fixed(parents: list[Parent]) -> list[float]:
    return [p.weight for p in parents]


@dataclass
class Occlusion:
    """`phi(z_j) - phi(z_j - z_ij)`: it needs z_j with its bias, and what follows it."""

    rest_to_bias: bool = False

    def lost(
        self, parents: list[Parent], z: float, phi: Callable[[np.ndarray], np.ndarray] | None
    ) -> list[float]:
        contributions = zero(parents)
        if phi is None:
            return contributions
        lost = [float(phi(np.array(z)) - phi(np.array(z - c))) for c in contributions]
        if self.rest_to_bias and parents[-1].neuron[0].endswith(".bias"):
            lost[-1] = float(phi(np.array(z))) - sum(lost[:-1])
        return lost


def by_alpha(rule: ColumnRule) -> ColumnRule:
    """Blocks alpha T~ (eq. 20) with one joint normalisation, where alpha is in the weights.

    Other rules are multiples of the weight.
    """

    def alpha(parent: Parent) -> float:
        return parent.alpha if isinstance(parent, Factor) else 1.0

    if rule is flat:
        return lambda parents: [alpha(p) for p in parents]
    if rule is wsquare:
        return lambda parents: [p.weight**2 / alpha(p) for p in parents]
    return rule


@dataclass
class Oracle:
    """A network as lists of parents, grown layer by layer from the inputs."""

    bias_is_input: bool
    values: dict[str, np.ndarray] = field(default_factory=dict)
    parents: dict[Neuron, list[Parent]] = field(default_factory=dict)
    rules: dict[str, ColumnRule | Occlusion | None] = field(default_factory=dict)
    activations: dict[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    leaves: list[str] = field(default_factory=list)
    output: str = ""
    blank: set[Neuron] = field(default_factory=set)
    """Explicit zeros, which are no parents beside real ones."""

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
        return self.activation(name, x, lambda v: np.maximum(v, 0))

    def activation(self, name: str, x: str, function: Callable[[np.ndarray], np.ndarray]) -> str:
        self.activations[name] = function
        return self.identity(name, x, function)

    def activation_after(self, name: str) -> Callable[[np.ndarray], np.ndarray] | None:
        """The activation, if that alone reads a variable."""
        readers = {n for (n, _), ps in self.parents.items() if name in {p.neuron[0] for p in ps}}
        return self.activations.get(readers.pop()) if len(readers) == 1 else None

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

    # -- products, norms and constants ------------------------------------------------------------

    def elementwise(
        self, name: str, chosen: list[Neuron], function: Callable[[np.ndarray], np.ndarray]
    ) -> str:
        """A function of one parent per neuron, neuron j that of `chosen[j]`."""
        self.pick(name, chosen)
        self.values[name] = function(self.values[name])
        return name

    def split(self, name: str, factors: list[list[Neuron]], alphas: list[float]) -> str:
        """An elementwise product: of neuron j, factor k takes `alphas[k]`, all of it or some."""
        values = [np.array([self.values[v][i] for v, i in factor]) for factor in factors]
        self.values[name] = np.prod(values, axis=0)
        for j in range(len(factors[0])):
            self.parents[name, j] = [
                Parent(factor[j], 1.0, alpha)
                for factor, alpha in zip(factors, alphas, strict=True)
                if alpha != 0
            ]
        self.rules[name] = fixed
        self.output = name
        return name

    def product(
        self,
        name: str,
        rule: ColumnRule,
        size: int,
        terms: Iterable[tuple[int, Neuron, Neuron]],
        alphas: list[float],
    ) -> str:
        """A sum of products: (output neuron, neuron of the first factor, of the second)."""
        values = np.zeros(size)
        for j in range(size):
            self.parents[name, j] = []
        for j, first, second in terms:
            a, b = (float(self.values[v][i]) for v, i in (first, second))
            values[j] += a * b
            for neuron, value, weight, alpha in (
                (first, a, b, alphas[0]),
                (second, b, a, alphas[1]),
            ):
                if alpha != 0:
                    self.parents[name, j].append(
                        Factor(neuron, value, alpha * weight, False, alpha)
                    )
        self.values[name], self.rules[name] = values, by_alpha(rule)
        self.output = name
        return name

    def normalize(
        self,
        name: str,
        rule: ColumnRule,
        x: str,
        groups: list[list[int]],
        gain: np.ndarray,
        bias: np.ndarray | None,
        eps: float = 1e-5,
    ) -> str:
        """A norm with its scale held constant: the neuron itself and the centring of its group."""
        values, connections = self.values[x], []
        for group in groups:
            deviation = values[group] - values[group].mean()
            scale = 1 / np.sqrt((deviation**2).mean() + eps)
            for j in group:
                connections.append((j, x, j, gain[j] * scale))
                connections += [(j, x, i, -gain[j] * scale / len(group)) for i in group]
        return self.weighted(name, rule, len(values), connections, bias)

    def softmax(self, name: str, rule: ColumnRule | None, x: str, groups: list[list[int]]) -> str:
        """A softmax: an identity, or (by a rule) its Taylor expansion at the logits."""
        logits = self.values[x]
        share = np.zeros(len(logits))
        for group in groups:
            powers = np.exp(logits[group] - logits[group].max())
            share[group] = powers / powers.sum()
        if rule is None:
            return self.identity(name, x, lambda v: share)
        finite = np.where(logits < -1e100, 0.0, logits)  # masked ones contribute nothing
        self.values[x], connections = finite, []
        rest = np.zeros(len(logits))
        for group in groups:
            for j in group:
                connections.append((j, x, j, share[j]))
                connections += [(j, x, i, -share[j] * share[i]) for i in group]
                rest[j] = share[j] * (1 - finite[j] + share[group] @ finite[group])
        self.weighted(name, rule, len(logits), connections, rest)
        self.values[x], self.values[name] = logits, share
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        """A constant that is some neuron's only parent: a leaf."""
        return self.input(name, values)

    def fill(self, name: str, chosen: list[Neuron | None], value: float) -> str:
        """A routing where neurons without a parent are a constant: the leaf `<name>.fill`."""
        leaf = self.constant(f"{name}.fill", np.full(len(chosen), value))
        if value == 0:
            self.blank |= {(leaf, j) for j in range(len(chosen))}
        return self.pick(name, [c or (leaf, j) for j, c in enumerate(chosen)])

    def adopt(self, name: str, leaf: str) -> str:
        """Give the leaf `<name>.<leaf>` to neurons without any parent, unless biases are theirs."""
        if f"{name}.bias" not in self.leaves:
            self.constant(f"{name}.{leaf}", np.zeros(len(self.values[name])))
            for j in range(len(self.values[name])):
                if not self.parents[name, j]:
                    self.parents[name, j] = [Parent((f"{name}.{leaf}", j), 1.0, 1.0, True)]
        return name

    def onto_zeros(self, name: str, reached: Iterable[int]) -> str:
        """Say that sums over indices are added to explicit zeros, which are left elsewhere."""
        size = len(self.values[name])
        self.blank |= {(f"{name}.bias", j) for j in range(size)}
        self.blank |= {(name, j) for j in set(range(size)) - set(reached)}
        return name

    def visited(self) -> set[str]:
        """The variables that walks from the output can visit, and every leaf that enters there."""
        found, waiting = {self.output}, [self.output]
        above: dict[str, set[str]] = {}
        for (name, _), parents in self.parents.items():
            above.setdefault(name, set()).update(p.neuron[0] for p in parents)
        while waiting:
            name = waiting.pop()
            entering = {leaf for leaf in self.leaves if leaf.rpartition(".")[0] == name}
            for parent in (above.get(name, set()) | entering) - found:
                found.add(parent)
                waiting.append(parent)
        return found

    def is_blank(self, neuron: Neuron) -> bool:
        """Whether a neuron is an explicit zero, or one that was moved."""
        while neuron not in self.blank and neuron in self.parents:
            if self.rules[neuron[0]] is not None:
                return False
            neuron = self.parents[neuron][0].neuron
        return neuron in self.blank

    # -- walks -----------------------------------------------------------------------------------

    def column(self, neuron: Neuron, normalized: bool) -> list[tuple[Neuron, float]]:
        parents = self.parents[neuron]
        rule = self.rules[neuron[0]]
        if rule is None:
            return [(parents[0].neuron, 1.0)]
        real = [p for p in parents if not self.is_blank(p.neuron)]
        if real and len(real) < len(parents):
            parents = real
        if isinstance(rule, Occlusion):
            z = float(self.values[neuron[0]][neuron[1]])
            contributions = rule.lost(parents, z, self.activation_after(neuron[0]))
        else:
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
