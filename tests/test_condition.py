"""A condition written once: taken by every query in one way, against the enumeration of walks."""

from __future__ import annotations

import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from support.messages import messages_sent
from support.networks import NETWORKS, Case, make
from torch import Tensor, nn

import nrm
from nrm import Condition
from nrm.errors import NeuronSetError, QueryError, UnknownLayerError

pytestmark = pytest.mark.usefixtures("captured_once")

Picked = set[tuple[str, int]]
Walks = list[tuple[frozenset[tuple[str, int]], float]]


class Asked:
    """Random sets on a network, and what all walks say of them."""

    def __init__(self, network: str, bias: str = "input", seed: int = 0) -> None:
        self.case: Case = make(network, "gamma", bias == "input", seed=seed)
        explainer = nrm.Explainer(self.case.model, self.case.composite, bias=bias)
        self.R = explainer(*self.case.inputs, target=1)
        self.rng = np.random.default_rng(seed)
        net = self.case.oracles[0]
        self.names = [name for name in net.values if not name.endswith(".bias")]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.R.graph.variable(name).shape[1:])

    def set(self, name: str | None = None) -> tuple[nrm.NeuronSet, Picked]:
        name = str(self.rng.choice(self.names)) if name is None else name
        bits = self.rng.random(int(np.prod(self.shape(name)))) < 0.6
        bits[self.rng.integers(len(bits))] = True
        chosen = nrm.mask(name, torch.tensor(bits).view(self.shape(name)))
        return chosen, {(name, int(i)) for i in np.flatnonzero(bits)}

    def weights(self, name: str) -> tuple[Tensor, np.ndarray]:
        values = self.rng.normal(size=self.shape(name))
        return torch.tensor(values), values.ravel()

    def walks(self, sample: int, normalized: bool = True) -> Walks:
        return self.case.oracles[sample].walks(1, normalized=normalized)

    def inside(self, walks: Walks, picked: Picked) -> Walks:
        """Those that visit no other neurons of the variables of a set."""
        (place,) = {name for name, _ in picked}
        return [(v, r) for v, r in walks if all(w in picked for w in v if w[0] == place)]

    def check(self, found: Tensor, expected: Callable[[int], object], normalized: bool = True):
        for sample in range(2):
            size = max(1.0, sum(abs(r) for _, r in self.walks(sample, normalized)))
            np.testing.assert_allclose(
                found[sample].numpy().ravel(), expected(sample), atol=1e-9 * size, rtol=0
            )


def on(walks: Walks, *picked: Picked) -> Walks:
    return [(v, r) for v, r in walks if all(v & chosen for chosen in picked)]


def total(walks: Walks) -> float:
    return sum(r for _, r in walks)


def at(walks: Walks, name: str, size: int) -> np.ndarray:
    """The relevance of every neuron of a variable."""
    found = np.zeros(size)
    for visited, r in walks:
        for variable, i in visited:
            if variable == name:
                found[i] += r
    return found


def share(joint: object, known: float) -> object:
    return np.asarray(joint) / known if known else np.zeros_like(joint)


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("network", NETWORKS)
def test_marginals_of_one_layer_unnormalized_and_within(network: str, bias: str) -> None:
    """At every layer, also those that are no leaf, where messages have to go on to the leaves."""
    asked = Asked(network, bias, seed=21)
    R = asked.R
    (a, in_a), (b, in_b) = asked.set(), asked.set()
    for name in asked.names:
        size = int(np.prod(asked.shape(name)))
        asked.check(
            R.marginal(name, a, normalized=False),
            lambda s, n=name, k=size: at(on(asked.walks(s, False), in_a), n, k),
            normalized=False,
        )
        asked.check(
            R.marginal(name, a, within=b),
            lambda s, n=name, k=size: at(asked.inside(on(asked.walks(s), in_a), in_b), n, k),
        )
        asked.check(
            R.marginal(name, ~a, within=b, normalized=False),
            lambda s, n=name, k=size: at(
                [(v, r) for v, r in asked.inside(asked.walks(s, False), in_b) if not v & in_a],
                n,
                k,
            ),
            normalized=False,
        )


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_query_takes_all_of_a_condition(network: str, normalized: bool) -> None:
    """Sets, given, within, normalized, weights; as arguments and as one condition."""
    asked = Asked(network, seed=31)
    R = asked.R
    (a, in_a), (b, in_b), (c, in_c) = asked.set(), asked.set(), asked.set()
    weighed = asked.names[1]
    weights, factors = asked.weights(weighed)
    how = {"given": b, "within": c, "normalized": normalized}
    condition = Condition(a, **how)
    heavy = Condition(a, weights={weighed: weights}, **how)

    def known(s: int) -> float:
        return total(on(asked.walks(s, normalized), in_b))

    def joint(s: int) -> Walks:
        return asked.inside(on(asked.walks(s, normalized), in_a, in_b), in_c)

    def product(walks: Walks) -> Walks:
        return [
            (v, r * np.prod([factors[i] for name, i in v if name == weighed])) for v, r in walks
        ]

    def check(found: Tensor, walks: Callable[[int], Walks], name: str | None = None) -> None:
        """Times what is given, since that may be as small as it likes."""
        size = 0 if name is None else int(np.prod(asked.shape(name)))
        factor = torch.tensor([known(s) for s in range(2)], dtype=torch.float64)
        factor = factor.view(-1, *[1] * (found.dim() - 1))
        asked.check(
            found * factor,
            lambda s: total(walks(s)) if name is None else at(walks(s), name, size),
            normalized,
        )

    for one in (
        R(a, **how),
        R(condition),
        R(Condition(a, given=b), within=c, normalized=normalized),
    ):
        check(one, joint)
    check(R(heavy), lambda s: product(joint(s)))
    check(R.weighted({weighed: weights}, condition, over="product"), lambda s: product(joint(s)))
    found = R.weighted({weighed: weights}, condition)
    check(
        found,
        lambda s: [
            (v, r * sum(factors[i] for name, i in v if name == weighed)) for v, r in joint(s)
        ],
    )
    counted, inside = asked.set()
    found = R.additive(counted, layers=1, given=[a, b], within=c, normalized=normalized)
    asked.check(
        found * R(a, b, normalized=normalized),
        lambda s: total([(v, r * len(v & inside)) for v, r in joint(s)]),
        normalized,
    )
    for name in asked.names:
        check(R.marginal(name, condition), joint, name)
        check(R.marginals(condition)[name], joint, name)
        check(R.marginal(name, heavy), lambda s: product(joint(s)), name)
        (heatmap,) = R.heatmaps([condition], at=name)
        check(heatmap, joint, name)
    entry = R.graph.inputs[0].name
    check(R.heatmap(condition, at=entry), joint, entry)
    several = R.relevances(a, condition, Condition(), ~c, given=b)
    torch.testing.assert_close(several[1], R(condition))
    torch.testing.assert_close(several[0], R(a, given=b))
    some = R(b) != 0  # results are 0 where that is
    torch.testing.assert_close(several[2], some.double())
    torch.testing.assert_close(several[3], torch.where(some, 1 - R(c, given=b), 0.0))
    together = R.relevances(a, ~a, **how)
    torch.testing.assert_close(together[0], R(condition))
    outcomes = R.outcomes(a, Condition(c, ~a), **how)
    check(outcomes.get((True, False), torch.zeros(2).double()), joint)
    torch.testing.assert_close(sum(outcomes.values()), R(**how))


@pytest.mark.parametrize("network", NETWORKS)
def test_conditionals_take_all_of_a_condition(network: str) -> None:
    """Walks that begin at j: what is given and how walks count mean the same there."""
    asked = Asked(network, seed=41)
    R = asked.R
    below = asked.names[: max(1, len(asked.names) // 2)]
    (a, in_a), (b, in_b) = (asked.set(str(asked.rng.choice(below))) for _ in range(2))
    c, in_c = asked.set(asked.names[0])
    given = R.conditionals(a, given=b)
    within = R.conditionals(a, within=c)
    original = R.conditionals(a, normalized=False)
    assert given.keys() <= within.keys() | {v.name for v in R.graph.variables}
    for sample, oracle in enumerate(asked.case.oracles):
        output = oracle.output
        for name in given:
            oracle.output = name
            for j in range(int(np.prod(asked.shape(name)))):
                walks = oracle.walks(j)
                size = max(1.0, sum(abs(r) for _, r in walks))
                known = total(on(walks, in_b))
                if abs(known) > 1e-6:
                    expected = total(on(walks, in_a, in_b))
                    found = float(given[name][sample].flatten()[j]) * known
                    assert abs(found - expected) < 1e-9 * size
                if name not in within:
                    continue
                found = float(within[name][sample].flatten()[j])
                expected = total(asked.inside(on(walks, in_a), in_c))
                assert abs(found - expected) < 1e-9 * size
                start = float(oracle.values[name][j])
                if start:
                    walks = oracle.walks(j, normalized=False)
                    found = float(original[name][sample].flatten()[j]) * start
                    size = max(1.0, sum(abs(r) for _, r in walks))
                    assert abs(found - total(on(walks, in_a))) < 1e-9 * size
        oracle.output = output


@pytest.fixture(scope="module")
def R() -> nrm.Measure:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.5), nn.Conv2d(4, 4, 3), nn.LeakyReLU(0.5)]
    layers.append(nn.Conv2d(4, 2, 2))
    model = nn.Sequential(*layers, nn.Flatten()).double().eval()
    composite = nrm.composites.Everywhere(nrm.rules.Zero())  # signed, so that shares are
    return nrm.Explainer(model, composite)(torch.rand(2, 3, 6, 6).double(), target=0)


def test_combinations_of_parts_given_a_condition(R: nrm.Measure) -> None:
    for k in range(4):  # some of these channels have a negative relevance
        given = nrm.channels("3", k)
        known = R(given)
        table = R.joint("1", "input", given=given)
        torch.testing.assert_close(
            table, R.joint("1", "input", Condition(given)) / known.view(-1, 1, 1)
        )
        i, j = 2, 1
        single = R(nrm.channels("1", i), nrm.channels("input", j), given=given)
        torch.testing.assert_close(table[:, i, j], single)
        for order, descending in (("largest", True), ("smallest", False)):
            for asked in ({"given": given}, {}):
                more = [] if asked else [Condition(given=given)]
                flows = R.top("1", "input", *more, k=4, order=order, sample=1, **asked)
                best = sorted(table[1].flatten().tolist(), reverse=descending)[:4]
                assert [flow.relevance for flow in flows] == pytest.approx(best)
                assert flows.gap == 0
    signs = {bool(R(nrm.channels("3", k))[1] < 0) for k in range(4)}
    assert signs == {True, False}
    joint = R.top("1", "input", Condition(nrm.channels("3", 1)), k=1)[0]
    torch.testing.assert_close(
        torch.tensor(joint.relevance).double(), R(*joint.sets, nrm.channels("3", 1))[0]
    )


def test_heatmaps_of_conditions_with_different_things_given(R: nrm.Measure) -> None:
    a, b, c = nrm.channels("1", 0), nrm.channels("3", 1), nrm.channels("3", 2)
    conditions = [
        a,
        Condition(a, given=b),
        Condition(a, given=c),
        [a, Condition(given=b)],
        Condition(a, within=b),
        Condition(a, normalized=False),
        Condition(~a, given=b),
    ]
    done: list[int] = []
    found = R.heatmaps(conditions, progress=done.append)
    assert sum(done) == len(conditions)
    expected = [
        R.heatmap(a),
        R.heatmap(a, given=b),
        R.heatmap(a, given=c),
        R.heatmap(a, given=b),
        R.heatmap(a, within=b),
        R.heatmap(a, normalized=False),
        R.heatmap(~a, given=b),
    ]
    torch.testing.assert_close(found, torch.stack(expected))
    all_given = R.heatmaps([a, ~a], given=c)
    torch.testing.assert_close(all_given[1], R.heatmap(~a, given=c))
    torch.testing.assert_close(R.heatmaps([a], normalized=False)[0], expected[5])


# -- the condition itself ------------------------------------------------------------------------


def test_what_is_given_is_worked_out_once_for_a_condition_that_is_kept(R: nrm.Measure) -> None:
    a, b = nrm.channels("1", 0), nrm.channels("3", 1)
    condition = Condition(a, given=b)
    first = Counter(messages_sent(R, lambda: R(condition)))
    again = Counter(messages_sent(R, lambda: R(condition)))
    assert first == again + Counter(messages_sent(R, lambda: R(b)))
    heatmaps = (lambda: R.heatmap(condition)), (lambda: R.heatmap(a, b))
    assert messages_sent(R, heatmaps[0]) == messages_sent(R, heatmaps[1])
    result = R(condition)
    result.zero_()  # the caller's own
    torch.testing.assert_close(R(condition), R(a, given=b))
    assert bool((R(condition) != 0).all())


def test_conditions_are_values() -> None:
    a, b = nrm.channels("1", 0), nrm.channels("3", 1)
    condition = Condition(a, "3", given=[b, ~a], within="1", normalized=False)
    assert condition == Condition(a, nrm.neurons("3"), given=(b, ~a), within=nrm.neurons("1"),
                                  normalized=False)  # fmt: skip
    assert hash(condition) == hash(pickle.loads(pickle.dumps(condition)))
    assert pickle.loads(pickle.dumps(condition)) == condition
    assert condition != Condition(a, "3", given=b, within="1", normalized=False)
    assert Condition(a, given=[]) == Condition(a) == Condition(Condition(a))
    with pytest.raises(FrozenInstanceError):
        condition.normalized = True  # type: ignore[misc]
    assert repr(condition) == (
        "Condition(channels('1', 0), neurons('3'), given=[channels('3', 1), ~channels('1', 0)], "
        "within=neurons('1'), normalized=False)"
    )
    weights = torch.ones(4)
    heavy = Condition(a, weights={"1": weights})
    weights.zero_()
    assert heavy.weights["1"].tolist() == [1] * 4
    assert heavy != Condition(a, weights={"1": torch.ones(4)})  # tensors are not compared
    assert heavy == Condition(heavy)
    assert Condition(heavy, b).weights.keys() == {"1"}


def test_conditions_join(R: nrm.Measure) -> None:
    a, b, c = nrm.channels("1", 0), nrm.channels("3", 1), nrm.channels("2", 2)
    for joined in (
        Condition(Condition(a, given=b), given=c, within="3"),
        Condition(a, Condition(given=[b, c], within="3")),
        Condition(a, given=[b, Condition(c)], within="3"),
    ):
        torch.testing.assert_close(R(joined), R(a, given=[b, c], within="3"))
    assert not Condition(a, Condition(normalized=False)).normalized


@pytest.mark.parametrize(
    ("made", "error", "match"),
    [
        (lambda a: Condition(3), NeuronSetError, "got int"),
        (lambda a: Condition(a, given=[a, None]), NeuronSetError, "got NoneType"),
        (lambda a: Condition(a, given=Condition(a, given=a)), QueryError, "only sets and formulas"),
        (lambda a: Condition(a, within=~a), NeuronSetError, "not the formula"),
        (lambda a: Condition(Condition(within="3"), within="1"), QueryError, "say it once"),
        (lambda a: Condition(weights={}), QueryError, "no weights"),
        (lambda a: Condition(weights={"1": 3}), QueryError, "real, finite"),
        (
            lambda a: Condition(Condition(weights={"1": torch.ones(4)}),
                                weights={"1": torch.ones(4)}),
            QueryError,
            "weigh it once",
        ),
    ],
)  # fmt: skip
def test_what_is_no_condition_is_refused(
    made: Callable[[nrm.NeuronSet], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        made(nrm.channels("1", 0))


def test_what_cannot_be_asked_so_is_refused(R: nrm.Measure) -> None:
    a = nrm.channels("3", 0)
    for condition in (Condition(a, within=a), Condition(a, normalized=False)):
        for ask in (lambda c: R.joint("1", "input", c), lambda c: R.top("1", "input", c)):
            with pytest.raises(QueryError, match="normalised relevance"):
                ask(condition)
    with pytest.raises(QueryError, match="only sets and formulas"):
        R.outcomes(Condition(a, given="1"))
    with pytest.raises(QueryError, match="a list of one"):
        R.heatmaps(Condition(a))
    with pytest.raises(QueryError, match="lies between"):
        R.joint("3", "2", given=nrm.channels("1", 0))


def said(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error))


@pytest.mark.parametrize(
    ("ask", "note"),
    [
        (lambda R, a: R(a, "nowhere", given="3"),
         "in R(channels('1', 0), neurons('nowhere'), given=neurons('3'))"),
        (lambda R, a: R.heatmap(a, within="nowhere"),
         "in R(channels('1', 0), within=neurons('nowhere'))"),
        (lambda R, a: R.marginal("nowhere", a, normalized=False),
         "in R(channels('1', 0), normalized=False)"),
        (lambda R, a: R.relevances(a, "nowhere"), "in R(channels('1', 0), neurons('nowhere'))"),
        (lambda R, a: R(a, 3), "in R(channels('1', 0), 3)"),
        (lambda R, a: R.joint("1", "nowhere", nrm.channels("3", 0)), "in R(channels('3', 0))"),
    ],
)  # fmt: skip
def test_errors_say_what_was_asked_and_stay_as_they_are(
    R: nrm.Measure, ask: Callable[[nrm.Measure, nrm.NeuronSet], object], note: str
) -> None:
    with pytest.raises((UnknownLayerError, NeuronSetError)) as caught:
        ask(R, nrm.channels("1", 0))
    assert said(caught.value).rstrip().endswith(note)
    first = str(caught.value)
    assert note not in first
    assert "nowhere" in first or "got int" in first


def test_long_formulas_are_cut_short_in_errors(R: nrm.Measure) -> None:
    long = nrm.channels("1", 0)
    for k in range(100):
        long = ~(long & nrm.channels("3", k % 4))  # type: ignore[assignment]
    with pytest.raises(UnknownLayerError) as caught:
        R(long, "nowhere")
    assert len(said(caught.value)) < 700


def spread(weights: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    return [weights[name] for name in names]


def test_weights_of_several_layers_multiply(R: nrm.Measure) -> None:
    torch.manual_seed(1)
    weights = {name: torch.rand(R.activations(name)[0].shape).double() for name in ("1", "3")}
    heavy = Condition(weights=weights)
    one, two = spread(weights, ("1", "3"))
    pairs = R.joint("3", "1", by="neuron").view(2, two.numel(), one.numel())
    expected = torch.einsum("bij,i,j->b", pairs, two.flatten(), one.flatten())
    torch.testing.assert_close(R(heavy), expected)
    torch.testing.assert_close(R.heatmap(heavy).flatten(1).sum(1), expected)
