"""Formulas as deep and as long as a loop makes them."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm.formulas import Formula, Member, NeuronSet

DEEP = 2 * sys.getrecursionlimit()

A, B, C = nrm.neurons("0", 1), nrm.neurons("2", 2), nrm.neurons("2", 0, 3)


@pytest.fixture(scope="module")
def R() -> nrm.Measure:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    return nrm.Explainer(model.double().eval(), nrm.rules.Flat())(
        torch.rand(2, 4).double(), target=0
    )


def flat_share(happens: Mapping[tuple[bool, bool, bool], bool]) -> float:
    """Under `Flat` all neurons of a layer are alike: 1/6 visit a, 1/5 b and 2/5 c."""
    total = 0.0
    for (a, b, c), holds in happens.items():
        below = (1 if b else 2) / 5  # of the five, two are neither b nor c
        if holds and not (b and c):
            total += (1 / 6 if a else 5 / 6) * below
    return total


def table(holds: object) -> dict[tuple[bool, bool, bool], bool]:
    cases = [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)]
    return {case: bool(holds(*case)) for case in cases}  # type: ignore[operator]


def nested(depth: int) -> Formula:
    """`~(~(a & c) & b) ...`: no two levels can be joined."""
    found: Formula = A
    for level in range(depth):
        found = ~(found & (B if level % 2 else C))
    return found


def nested_holds(a: bool, b: bool, c: bool) -> bool:
    found = a
    for level in range(DEEP):
        found = not (found and (b if level % 2 else c))
    return found


def test_a_deep_formula_is_answered(R: nrm.Measure) -> None:
    deep = nested(DEEP)
    share = torch.full((2,), flat_share(table(nested_holds)), dtype=torch.float64)
    assert 0 < float(share[0]) < 1
    torch.testing.assert_close(R(deep), share)
    torch.testing.assert_close(R.heatmap(deep).sum(1), share)
    torch.testing.assert_close(R.marginal("0", deep).sum(1), share)
    torch.testing.assert_close(R(A, given=deep), R(A & deep) / share)
    torch.testing.assert_close(R.outcomes(deep)[(True,)], share)
    assert R.plan(deep).events == (A, C, B)


def test_not_not_not(R: nrm.Measure) -> None:
    found: Formula = A
    for _ in range(DEEP + 1):
        found = ~found
    torch.testing.assert_close(R(found), 1 - R(A))


def test_long_sums_of_sets(R: nrm.Measure) -> None:
    odd: Formula = A
    some: Formula = A
    every: Formula = A
    for place in range(5000):
        odd = odd ^ (A, B, C)[place % 3]  # a 1668 times, b 1667, c 1666
        some = some | (~B, C)[place % 2]
        every = every & (A, B)[place % 2]
    torch.testing.assert_close(R(odd), R(B))
    torch.testing.assert_close(R(some), 1 - R(B) + R(A, B))
    torch.testing.assert_close(R(every), R(A, B))


def test_long_conjunctions_of_many_sets() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 1500), nn.ReLU(), nn.Linear(1500, 1)).double().eval()
    R = nrm.Explainer(model, nrm.rules.Flat())(torch.rand(1, 3).double())
    every: Formula = nrm.neurons("0", 0)
    for neuron in range(1, 1500):
        every = every & nrm.neurons("0", neuron)
    assert float(R(every)) == 0  # no walk visits two neurons of a layer
    none: Formula = ~nrm.neurons("0", 0)
    for neuron in range(1, 150):
        none = none & ~nrm.neurons("0", neuron)
    torch.testing.assert_close(R(none), torch.tensor([0.9]).double())


def test_equality_and_hashes() -> None:
    one, two = nested(DEEP), nested(DEEP)
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two}) == 1
    assert one != nested(DEEP + 1)
    assert one != ~one
    assert one != "another thing"
    assert (A & B) != (A | B)
    assert (A & B) != (B & A)  # the same walks, written otherwise
    assert A != ~A
    assert ~A != A


def test_deep_formulas_are_shown() -> None:
    assert repr(nested(2)) == "~(~(neurons('0', 1) & neurons('2', 0, 3)) & neurons('2', 2))"
    text = repr(nested(DEEP))
    assert text.startswith("~(~(~(")
    assert text.count("neurons") == DEEP + 1


def test_shared_parts_are_looked_at_once(R: nrm.Measure) -> None:
    """Written out this formula has 2^60 parts."""
    found: Formula = A
    for level in range(60):
        found = (found ^ (found & B)) if level % 2 else ((found | C) ^ found)
    expected = {}
    for a, b, c in table(lambda *_: True):
        holds = a
        for level in range(60):
            holds = (holds != (holds and b)) if level % 2 else ((holds or c) != holds)
        expected[a, b, c] = holds
    share = torch.full((2,), flat_share(expected), dtype=torch.float64)
    torch.testing.assert_close(R(found), share)
    assert repr(found).endswith("…")


def everywhere(variable: object, shape: torch.Size) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def test_deep_formulas_are_copied_and_saved(R: nrm.Measure) -> None:
    deep = nested(DEEP)
    copied = copy.deepcopy(deep)
    assert copied == deep
    torch.testing.assert_close(R(copied), R(deep))
    one, two = (NeuronSet((Member(layer, everywhere, layer),)) for layer in ("0", "2"))
    found: Formula = one
    for _ in range(DEEP):
        found = ~(found & two)
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert hash(again) == hash(found)
    assert again.events == (one, two)
