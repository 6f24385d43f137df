"""Two runs of a random network, described to the oracle as walks of their differences.

Weighted sums have the differences of their parents for values. Products, softmax, norms and maxima
have slopes that are written out here for one neuron at a time (docs/references.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from support import oracle as o
from support.fuzz.networks import EPS, Described, Network
from support.fuzz.walks import Walks

Contributions = list[tuple[o.Neuron, float]]
Slopes = Callable[["Run", "Run", str, int], Contributions]
"""What the parents of neuron j contribute: at the input, at the reference."""


@dataclass
class Run(Described):
    """One of the two runs, which notes what goes by slopes.

    Attributes:
        slopes: by variable.
    """

    slopes: dict[str, Slopes] = field(default_factory=dict)

    def value(self, neuron: o.Neuron) -> float:
        return float(self.values[neuron[0]][neuron[1]])

    def split(self, name: str, factors: list[list[o.Neuron]], alphas: list[float]) -> str:
        self.slopes[name] = _product
        return super().split(name, factors, [0.5, 0.5])

    def product(self, name, rule, size, terms, alphas):  # type: ignore[no-untyped-def]
        self.slopes[name] = _products
        return super().product(name, rule, size, terms, [0.5, 0.5])

    def quotient(self, name: str, reads: tuple[str, ...], values: np.ndarray) -> str:
        self.slopes[name] = _quotient
        self.add(name, o.zero, [(read, 1.0) for read in reads])
        self.values[name] = values
        return name

    def normalize(self, name, rule, x, groups, gain, bias, eps=1e-5):  # type: ignore[no-untyped-def]
        self.slopes[name] = _Normalized({j: g for g in groups for j in g}, x, gain, eps)
        return super().normalize(name, rule, x, groups, gain, bias, eps)

    def softmax(self, name, rule, x, groups):  # type: ignore[no-untyped-def]
        self.slopes[name] = _Softmax({j: g for g in groups for j in g}, x)
        return super().softmax(name, o.zero, x, groups)

    def largest(self, name: str, chosen: list[o.Neuron]) -> str:
        self.slopes[name] = _largest
        return super().largest(name, chosen)


@dataclass
class Differences(Described):
    """The walks of the differences between two runs.

    Attributes:
        shares: what the parents contribute to neurons that go by slopes.
        cancelled: by how much values exceed their differences, at most.
    """

    shares: dict[o.Neuron, Contributions] = field(default_factory=dict)
    cancelled: float = 1.0

    @classmethod
    def between(cls, here: Run, there: Run) -> Differences:
        known = {f.name: getattr(here, f.name) for f in fields(Described)}
        found = cls(**known)
        found.values = {name: _change(there.values[name], x) for name, x in here.values.items()}
        for name, moves in found.values.items():
            moved = (moves != 0) & np.isfinite(here.values[name])
            ratio = np.abs(here.values[name][moved] / moves[moved])
            found.cancelled = max(found.cancelled, *ratio, 1.0)
        for (name, j), parents in here.parents.items():
            if name in here.slopes:
                size = len(here.values[name])
                found.shares[name, j] = _merged(here.slopes[name](here, there, name, j))
                if f"{name}.flat" not in found.leaves:
                    found.leaves = [*found.leaves, f"{name}.flat"]
                    found.values[f"{name}.flat"] = np.zeros(size)
                some = found.shares[name, j]
                found.parents[name, j] = [o.Parent(n, c, 1.0) for n, c in some]
                found.parents[name, j].append(o.Parent((f"{name}.flat", j), 0.0, 1.0))
            else:
                found.parents[name, j] = [
                    replace(p, value=here.value(p.neuron) - there.value(p.neuron)) for p in parents
                ]
        return found

    def column(self, neuron: o.Neuron, normalized: bool) -> Contributions:
        if neuron not in self.shares:
            return super().column(neuron, normalized)
        some = self.shares[neuron]
        if not normalized:
            return some
        rise = float(self.values[neuron[0]][neuron[1]])
        if rise == 0:  # the same in both
            return [((f"{neuron[0]}.flat", neuron[1]), 1.0)]
        return [(n, c / rise) for n, c in some]

    def doubtful(self) -> bool:
        for name, j in self.shares:
            rise = abs(float(self.values[name][j]))
            size = sum(abs(c) for _, c in self.shares[name, j])
            if (rise == 0) != (size <= EPS) or 0 < rise <= EPS * max(size, 1.0):
                return True
        if any(0 < v <= EPS for values in self.values.values() for v in np.abs(values)):
            return True
        rest = replace(
            self, parents={n: p for n, p in self.parents.items() if n not in self.shares}
        )
        return Described.doubtful(rest)

    def condition(self) -> float:
        worst = max(Described.condition(self), self.cancelled)
        for name, j in self.shares:
            rise = abs(float(self.values[name][j]))
            if rise > 0:
                worst = max(worst, sum(abs(c) for _, c in self.shares[name, j]) / rise)
        return worst


def described(
    network: Network, walks: Walks, reference: dict[str, Tensor], sample: int
) -> Differences:
    """The oracle of one sample; biases contribute nothing, and every factor is a parent."""
    walks = replace(walks, bias="drop", alpha="order", taylor=True)
    given = {name: reference[name] for name in network.inputs}
    other = Network(given, network.steps, network.head)
    here, there = (walks.describe(each, sample, Run) for each in (network, other))
    return Differences.between(here, there)


def draw(network: Network, rng: np.random.Generator) -> dict[str, Tensor]:
    """Other inputs, many of whose numbers are the same."""
    found = {}
    for name, x in network.inputs.items():
        other = x[torch.from_numpy(rng.permutation(len(x)))]
        if not x.is_floating_point():
            other = torch.from_numpy(rng.integers(0, 4, x.shape))
        elif rng.random() < 0.3:
            other = torch.zeros_like(x)
        elif rng.random() < 0.5:
            other = torch.from_numpy(rng.normal(size=x.shape))
        same = torch.from_numpy(rng.random(x.shape) < rng.choice([0.0, 0.3]))
        found[name] = torch.where(same, x, other)
    return found


# -- slopes, one neuron at a time ------------------------------------------------------------------


def _change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(after == before, 0.0, after - before)


def _merged(some: Contributions) -> Contributions:
    found: dict[o.Neuron, float] = {}
    for neuron, value in some:
        found[neuron] = found.get(neuron, 0.0) + value
    return list(found.items())


def _pair(here: Run, there: Run, a: o.Neuron, b: o.Neuron) -> Iterator[tuple[o.Neuron, float]]:
    """`D(ab) = (b + b') / 2 Da + (a + a') / 2 Db`."""
    for one, other in ((a, b), (b, a)):
        mean = (here.value(other) + there.value(other)) / 2
        yield one, mean * (here.value(one) - there.value(one))


def _product(here: Run, there: Run, name: str, j: int) -> Contributions:
    first, second = (p.neuron for p in here.parents[name, j])
    return list(_pair(here, there, first, second))


def _products(here: Run, there: Run, name: str, j: int) -> Contributions:
    neurons = [p.neuron for p in here.parents[name, j]]
    return [
        one
        for a, b in zip(neurons[::2], neurons[1::2], strict=True)
        for one in _pair(here, there, a, b)
    ]


def _quotient(here: Run, there: Run, name: str, j: int) -> Contributions:
    """`x / (1 + |y|)`: a product with the reciprocal."""
    x, y = (p.neuron for p in here.parents[name, j])
    over = [1 / (1 + abs(run.value(y))) for run in (here, there)]
    mean = (here.value(x) + there.value(x)) / 2
    return [
        (x, sum(over) / 2 * (here.value(x) - there.value(x))),
        (y, mean * (over[0] - over[1])),
    ]


@dataclass
class _Normalized:
    """`(x - mean) r gain`, `r = v ** -1/2`: the product rule, with `Dv = mean((c + c') Dc)`."""

    groups: dict[int, list[int]]
    x: str
    gain: np.ndarray
    eps: float

    def __call__(self, here: Run, there: Run, name: str, j: int) -> Contributions:
        group = self.groups[j]
        x, y = (run.values[self.x][group] for run in (here, there))
        c, d = x - x.mean(), y - y.mean()
        r, s = (1 / np.sqrt((v**2).mean() + self.eps) for v in (c, d))
        slope = -((r * s) ** 2) / (1 / r + 1 / s) / (r * s)  # of r by v
        k, n = group.index(j), len(group)
        found = []
        for i, neuron in enumerate(group):
            move = x[i] - y[i]
            centred = np.full(n, -1 / n)
            centred[i] += 1
            by_value = (r + s) / 2 * centred[k]
            by_scale = (c[k] + d[k]) / 2 * slope * ((c + d) * centred).mean()
            found.append(((self.x, neuron), float(self.gain[j] * (by_value + by_scale) * move)))
        return found


@dataclass
class _Softmax:
    """`Ds_i = L_i (Dx_i - Dz)`, with the logarithmic mean `L`, `Dz = sum L_k Dx_k / sum L_k`."""

    groups: dict[int, list[int]]
    x: str

    def __call__(self, here: Run, there: Run, name: str, j: int) -> Contributions:
        group = self.groups[j]
        s, t = (run.values[name][group] for run in (here, there))
        moves = _change(there.values[self.x][group], here.values[self.x][group])
        means = np.array([_log_mean(a, b) for a, b in zip(s, t, strict=True)])
        k = group.index(j)
        return [
            ((self.x, neuron), float(means[k] * ((i == k) - means[i] / means.sum()) * moves[i]))
            for i, neuron in enumerate(group)
        ]


def _log_mean(a: float, b: float) -> float:
    if a == 0 or b == 0:
        return 0.0
    if abs(a - b) <= 1e-7 * a:
        return (a + b) / 2
    return float((a - b) / (np.log(a) - np.log(b)))


def _largest(here: Run, there: Run, name: str, j: int) -> Contributions:
    """Both winners share, by where they change places."""
    now, then = (run.parents[name, j][0].neuron for run in (here, there))
    a, a_then = here.value(now), there.value(now)
    b, b_then = here.value(then), there.value(then)
    gap = (a - b) + (b_then - a_then)
    share = (b_then - a_then) / gap if gap else 0.0
    return [(now, (1 - share) * (a - a_then)), (then, share * (b - b_then))]
