"""Formulas as decision diagrams: as few messages as there are different things still open."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import pytest
import torch
from support import oracle as o
from support.formulas import random_set
from support.networks import NETWORKS, make
from torch import nn

import nrm
from nrm.automaton import FAILS, HOLDS, Automaton, Diagram, TooLargeError
from nrm.errors import QueryError
from nrm.formulas import Formula, NeuronSet
from nrm.rules import Flat

pytestmark = pytest.mark.usefixtures("captured_once")

# -- the diagram itself --------------------------------------------------------------------------


def chosen(diagram: Diagram, count: int) -> list[int]:
    """The functions "choice k is 1"."""
    return [diagram.chooses(k, 1) for k in range(count)]


def at_least(diagram: Diagram, functions: Sequence[int], least: int) -> int:
    """Where at least so many functions hold, by adding them up one after the other."""
    counted = [HOLDS, *[FAILS] * least]  # at least 0, 1, ... of those before
    for function in functions:
        more = [diagram.every((function, fewer)) for fewer in counted]
        counted = [HOLDS] + [
            diagram.some((now, then)) for now, then in zip(counted[1:], more, strict=False)
        ]
    return counted[least]


def value(diagram: Diagram, function: int, values: Sequence[int]) -> bool:
    for choice, way in enumerate(values):
        function = diagram.given(function, 1 << choice, way)
    assert function in (FAILS, HOLDS)
    return function == HOLDS


def test_functions_of_many_choices_are_small() -> None:
    diagram = Diagram([2] * 60)
    diagram.odd(chosen(diagram, 60))
    assert len(diagram) <= 2 + 60 + 2 * 2 * 60  # the choices, parities so far and their opposites
    diagram = Diagram([2] * 1000)  # deeper than Python calls itself
    every = diagram.every(chosen(diagram, 1000))
    assert len(diagram) == 2 + 1000 + 999
    assert diagram.given(every, (1 << 999) - 1, 1) == diagram.chooses(999, 1)
    assert diagram.given(every, 1 << 500, 0) == FAILS
    diagram = Diagram([2] * 30)
    at_least(diagram, chosen(diagram, 30), 3)
    assert len(diagram) <= 4 * 30 * 30


def test_functions_are_equal_exactly_if_their_numbers_are() -> None:
    diagram = Diagram([2] * 24)
    x = chosen(diagram, 24)
    forwards = reduce(lambda a, b: diagram.odd((a, b)), x)
    backwards = reduce(lambda a, b: diagram.odd((b, a)), x[::-1])
    assert forwards == backwards == diagram.odd(x)
    none = diagram.negation(diagram.some(x))
    assert none == diagram.every(map(diagram.negation, x))
    most = at_least(diagram, x, 13)
    assert most == diagram.negation(at_least(diagram, [diagram.negation(f) for f in x], 12))
    assert diagram.odd((most, most)) == FAILS
    assert diagram.some((most, diagram.negation(most))) == HOLDS


def test_functions_of_choices_of_many_values_against_their_tables() -> None:
    ways = [2, 3, 2, 4]
    rng = np.random.default_rng(0)
    everything = list(itertools.product(*map(range, ways)))
    for _ in range(20):
        diagram = Diagram(ways)
        known = [
            (diagram.chooses(k, v), [values[k] == v for values in everything])
            for k, count in enumerate(ways)
            for v in range(count)
        ]
        for _ in range(12):
            joined = rng.choice(["every", "some", "odd", "negation"])
            parts = [known[i] for i in rng.integers(len(known), size=3)]
            tables = np.array([table for _, table in parts])
            if joined == "negation":
                known.append((diagram.negation(parts[0][0]), list(~tables[0])))
                continue
            join = {"every": tables.all(0), "some": tables.any(0), "odd": tables.sum(0) % 2 == 1}
            known.append((getattr(diagram, joined)([f for f, _ in parts]), list(join[joined])))
        for function, table in known:
            assert [value(diagram, function, values) for values in everything] == table
        by_table: dict[tuple[bool, ...], set[int]] = {}
        for function, table in known:
            by_table.setdefault(tuple(map(bool, table)), set()).add(function)
        assert all(len(numbers) == 1 for numbers in by_table.values())


def test_a_diagram_that_becomes_too_large_is_refused() -> None:
    diagram = Diagram([2] * 40, size=10**6)
    x = chosen(diagram, 40)
    with pytest.raises(TooLargeError):  # 2^20 things to remember half-way
        diagram.some(diagram.every((x[k], x[20 + k])) for k in range(20))


# -- the messages that formulas take -------------------------------------------------------------

DEPTH, WIDTH = 20, 6


@pytest.fixture(scope="module")
def chain() -> nrm.Measure:
    """Twenty layers of six neurons, which are all alike under `Flat`."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
    model = nn.Sequential(*layers).double().eval()
    return nrm.Explainer(model, Flat())(torch.rand(2, WIDTH).double(), target=0)


def sets(per_layer: int, layers: int = DEPTH - 1) -> list[NeuronSet]:
    """Single neurons, so many of each layer but the last, from the output down."""
    return [nrm.neurons(str(k), i) for k in range(layers)[::-1] for i in range(per_layer)]


def visited(count: int, per_layer: int) -> np.ndarray:
    """How probable it is that a walk visits 0, 1, ... of the sets."""
    found = np.array([1.0])
    for _ in range(count // per_layer):
        found = np.convolve(found, [1 - per_layer / WIDTH, per_layer / WIDTH])
    return found


def counted(chosen: Sequence[Formula], least: int) -> Formula:
    """At least so many, as a loop writes it."""
    far: list[Formula | None] = [None] * least
    for one in chosen:
        for k in range(least)[::-1]:
            before = one if k == 0 else None if far[k - 1] is None else far[k - 1] & one
            if before is not None:
                far[k] = before if far[k] is None else far[k] | before
    found = far[-1]
    assert found is not None
    return found


@pytest.mark.parametrize("per_layer", [1, 2, 3])
def test_an_odd_number_of_many_sets_takes_two_messages(chain: nrm.Measure, per_layer: int) -> None:
    chosen = sets(per_layer)
    odd = reduce(operator.xor, chosen)
    assert len(odd.events) == 19 * per_layer
    plan = chain.plan(odd)
    assert plan.channels == 2
    assert sum(plan.messages.values()) == 2 * 18 + 1  # one before the first, none after the last
    share = visited(len(chosen), per_layer)[1::2].sum()
    torch.testing.assert_close(chain(odd), torch.full((2,), share).double())
    shuffled = [chosen[k] for k in np.random.default_rng(1).permutation(len(chosen))]
    assert chain.plan(reduce(operator.xor, shuffled)).messages == plan.messages


@pytest.mark.parametrize("least", [1, 2, 3, 5])
@pytest.mark.parametrize("per_layer", [1, 2])
def test_at_least_some_of_many_takes_as_many_messages(
    chain: nrm.Measure, per_layer: int, least: int
) -> None:
    chosen = sets(per_layer, 15)
    formula = counted(chosen, least)
    assert chain.plan(formula).channels == least  # and who has met so many is done
    share = visited(len(chosen), per_layer)[least:].sum()
    torch.testing.assert_close(chain(formula), torch.full((2,), share).double())


def test_most_of_many_sets(chain: nrm.Measure) -> None:
    chosen = sets(1)
    most = counted(chosen, 10)
    assert chain.plan(most).channels == 10
    torch.testing.assert_close(chain(most), torch.full((2,), visited(19, 1)[10:].sum()).double())


def test_chains_and_implications_take_one_or_two(chain: nrm.Measure) -> None:
    every = reduce(operator.and_, sets(1))
    assert chain.plan(every).channels == 1
    assert chain.plan(~every).channels == 1
    first = [nrm.neurons(str(k), 0, 1) for k in range(DEPTH - 1)[::-1]]
    second = [nrm.neurons(str(k), 2) for k in range(DEPTH - 1)[::-1]]
    implied: Formula = first[0] >> second[1]
    for a, b in zip(first[1:], second[2:], strict=False):
        implied = implied & (a >> b)
    assert len(implied.events) == 36
    assert chain.plan(implied).channels == 2  # whether the neuron before asks for something
    # Markov: (last not in a) and (last in a); from the latter only b, which is not in a, goes on.
    free, bound = 4 / 6, 2 / 6
    for _ in range(17):
        free, bound = free * 4 / 6 + bound * 1 / 6, free * 2 / 6
    share = free + bound / 6
    torch.testing.assert_close(chain(implied), torch.full((2,), share).double())


@pytest.mark.parametrize("written", ["by place", "by step"])
def test_sets_of_a_layer_that_exclude_each_other_make_no_states_of_their_own(
    chain: nrm.Measure, written: str
) -> None:
    """The walk stays at one place: as many states as places, not two to the power of them."""
    at = [[nrm.neurons(str(k), i) for i in range(WIDTH)] for k in range(10)[::-1]]
    if written == "by place":
        stays: Formula = reduce(
            operator.or_, [reduce(operator.and_, [row[i] for row in at]) for i in range(WIDTH)]
        )
    else:
        steps = [
            reduce(operator.or_, [a & b for a, b in zip(*two, strict=True)])
            for two in itertools.pairwise(at)
        ]
        stays = reduce(operator.and_, steps)
    assert len(stays.events) == 60
    assert chain.plan(stays).channels == WIDTH
    torch.testing.assert_close(chain(stays), torch.full((2,), WIDTH ** (1 - 10.0)).double())


@pytest.fixture(scope="module")
def overlapping() -> tuple[nrm.Measure, list[tuple[NeuronSet, NeuronSet]]]:
    """Two layers of thirty neurons, and 24 sets of each that overlap with their neighbours."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Linear(30, 30), nn.Linear(30, 2)).double().eval()
    R = nrm.Explainer(model, Flat())(torch.rand(1, 4).double(), target=0)
    return R, [(nrm.neurons("1", k, k + 1), nrm.neurons("0", k, k + 2)) for k in range(24)]


def test_pairs_of_sets_that_overlap_are_small_as_they_are_written(overlapping) -> None:
    """As walks meet them there would be 2^24 states to tell apart, which no walk makes."""
    R, pairs = overlapping
    formula = reduce(operator.or_, [a & b for a, b in pairs])
    held = [
        any(i in (k, k + 1) and j in (k, k + 2) for k in range(24))
        for i in range(30)
        for j in range(30)
    ]
    torch.testing.assert_close(R(formula), torch.tensor([sum(held) / 900]).double())
    assert R.plan(formula).channels <= 30


def test_what_cannot_be_small_is_refused(overlapping) -> None:
    R, pairs = overlapping
    odd = reduce(operator.xor, [a for a, _ in pairs])  # names all of a layer before the next
    with pytest.raises(QueryError, match="48 sets have too many states"):
        R(odd & reduce(operator.or_, [a & b for a, b in pairs]))


# -- values --------------------------------------------------------------------------------------

Holds = Callable[[Sequence[bool]], bool]


def random_formula(rng: np.random.Generator, atoms: Sequence[NeuronSet], size: int):
    """A random formula that names `size` sets, and whether it holds given which are visited."""
    known: list[tuple[Formula, Holds]] = []
    for k in rng.integers(len(atoms), size=size):
        known.append((atoms[k], lambda visits, k=k: visits[k]))
    while len(known) > 1:
        (f, p), (g, q) = (known.pop(int(rng.integers(len(known)))) for _ in range(2))
        kind = rng.choice(["and", "or", "xor", "implies", "not"])
        if kind == "not":
            known += [(~f, lambda v, p=p: not p(v)), (g, q)]
            if rng.random() < 0.5:
                continue
            (f, p), (g, q) = known.pop(), known.pop()
            kind = "xor"
        joined = {
            "and": (f & g, lambda v, p=p, q=q: p(v) and q(v)),
            "or": (f | g, lambda v, p=p, q=q: p(v) or q(v)),
            "xor": (f ^ g, lambda v, p=p, q=q: p(v) != q(v)),
            "implies": (f >> g, lambda v, p=p, q=q: not p(v) or q(v)),
        }
        known.append(joined[kind])
    return known[0]


@pytest.mark.parametrize("network", NETWORKS)
def test_random_formulas_against_all_walks(network: str) -> None:
    """Twelve random sets over one to three variables, and formulas that name twenty."""
    case = make(network, "gamma", True, seed=11)
    R = nrm.Explainer(case.model, case.composite, bias="input")(*case.inputs, target=1)
    rng = np.random.default_rng(12)
    net = case.oracles[0]
    sets = [random_set(rng, R, net, 1 + k % 3, 0.4) for k in range(12)]
    atoms, picked = [united for united, _ in sets], [inside for _, inside in sets]
    for _ in range(3):
        asked = [random_formula(rng, atoms, 20) for _ in range(2)]
        found = R.relevances(*(formula for formula, _ in asked))
        for sample, oracle in enumerate(case.oracles):
            walks = oracle.walks(1)
            size = max(1.0, sum(abs(r) for _, r in walks))
            for row, (_, holds) in zip(found, asked, strict=True):
                on = [r for v, r in walks if holds([bool(v & inside) for inside in picked])]
                assert abs(float(row[sample]) - sum(on)) < 1e-10 * size
    assert o.relevance(walks) == pytest.approx(1)


def test_states_are_one_if_they_say_the_same_of_what_may_still_happen(chain: nrm.Measure) -> None:
    """Whatever the formulas looked like before."""
    graph = chain.graph
    a, b, c = (nrm.neurons(str(k), 0) for k in (3, 2, 1))
    masks = {
        s: {graph.variable(layer): torch.eye(1, WIDTH).double()[None] for layer in s.layers}
        for s in (a, b, c)
    }
    automaton = Automaton(graph, [(a & b & c) | (~a & (c & b))], masks)
    start = automaton.start
    assert start is not None
    assert automaton.visit(start, graph.variable("3")) == [(start, None)]  # a makes no difference
