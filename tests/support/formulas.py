"""Random formulas over random sets of a network, and on which walks of its oracle they hold."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import nrm

Neuron = tuple[str, int]
Walks = list[tuple[Any, float]]
Holds = Callable[[Sequence[bool]], bool]


def random_set(
    rng: Any, R: Any, net: Any, layers: int = 1, share: float = 0.5
) -> tuple[Any, set[Neuron]]:
    """A random set over some layers, about a share of each: for nrm, and the neurons it has."""
    names = [name for name in net.values if not name.endswith(".bias")]
    united, picked = None, set()
    for name in rng.choice(names, min(layers, len(names)), replace=False):
        shape = R.graph.variable(name).shape[1:]
        bits = rng.random(int(np.prod(shape))) < share
        bits[rng.integers(len(bits))] = True
        one = nrm.mask(name, torch.tensor(bits).view(shape))
        united = one if united is None else united | one
        picked |= {(str(name), int(i)) for i in np.flatnonzero(bits)}
    return united, picked


def random_formula(rng: Any, sets: Sequence[Any], depth: int = 3) -> tuple[Any, Holds]:
    """A random formula, and whether it holds given which sets are visited."""
    if depth == 0 or rng.random() < 0.2:
        k = int(rng.integers(len(sets)))
        return sets[k], lambda visits: visits[k]
    a, holds_a = random_formula(rng, sets, depth - 1)
    kind = rng.choice(["not", "and", "or", "xor", "implies"])
    if kind == "not":
        return ~a, lambda visits: not holds_a(visits)
    b, holds_b = random_formula(rng, sets, depth - 1)
    if kind == "implies":
        joined = a >> b if rng.random() < 0.5 else a.implies(b)
        return joined, lambda visits: not holds_a(visits) or holds_b(visits)
    join = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[kind]
    return join(a, b), lambda visits: join(holds_a(visits), holds_b(visits))


def those(walks: Walks, picked: Sequence[set[Neuron]], holds: Holds) -> Walks:
    """The walks on which a formula holds."""
    return [(v, r) for v, r in walks if holds([bool(v & chosen) for chosen in picked])]
