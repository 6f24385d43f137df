"""Formulas, forward messages and weights against the enumeration of all walks, to 1e-10."""

from __future__ import annotations

import itertools
import operator

import numpy as np
import pytest
import torch
from support import oracle as o
from support.formulas import random_formula, random_set, those
from support.messages import messages_sent
from support.networks import NETWORKS, make
from support.pairs import in_pairs
from support.queries import check
from torch import nn

import nrm
from nrm.composites import Everywhere
from nrm.errors import NeuronSetError, QueryError
from nrm.rules import Gamma

pytestmark = pytest.mark.usefixtures("captured_once")

BIAS = ["drop", "input"]
RULES = ["zero", "gamma", "zplus", "alpha2beta1", "flat"]


@in_pairs("network, rule, bias", NETWORKS, RULES, BIAS)
def test_formulas(network, rule, bias):
    """Totals, conditionals, marginals of all layers, outcomes: sets anywhere, in any order."""
    case = make(network, rule, bias == "input", seed=5)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=1)
    walks = [net.walks(1) for net in case.oracles]
    net, rng = case.oracles[0], np.random.default_rng(7)
    for _ in range(3):
        pairs = [random_set(rng, R, net, int(rng.integers(1, 3))) for _ in range(3)]
        sets, picked = [s for s, _ in pairs], [p for _, p in pairs]
        formulas = [random_formula(rng, sets) for _ in range(3)]
        found = [R(f) for f, _ in formulas]
        together = R.relevances(*(f for f, _ in formulas))
        conditioned = R.relevances(formulas[0][0], formulas[1][0], given=formulas[2][0])
        torch.testing.assert_close(conditioned[1], R(formulas[1][0], given=formulas[2][0]))
        layers = R.marginals(formulas[0][0], formulas[1][0])
        assert list(layers) == [v.name for v in R.graph.variables]
        outcomes = R.outcomes(*sets)
        for sample, w in enumerate(walks):
            for k, (_, holds) in enumerate(formulas):
                expected = sum(r for _, r in those(w, picked, holds))
                check(found[k][sample], expected, w)
                check(together[k, sample], expected, w)
            known = float(together[2, sample])
            if abs(known) > 1e-6:
                both = [*those(those(w, picked, formulas[0][1]), picked, formulas[2][1])]
                check(conditioned[0, sample] * known, sum(r for _, r in both), w)
            both = those(those(w, picked, formulas[0][1]), picked, formulas[1][1])
            for name, found_there in layers.items():
                size = found_there[0].numel()
                check(found_there[sample].flatten(), o.marginal(both, name, size), w)
            for happened in itertools.product((False, True), repeat=3):
                exactly = those(w, picked, lambda visits, h=happened: tuple(visits) == h)
                relevance = outcomes.get(happened, torch.zeros(2))[sample]
                check(relevance, sum(r for _, r in exactly), w)


@pytest.mark.parametrize("bias", BIAS)
@pytest.mark.parametrize("network", NETWORKS)
def test_unnormalized_formulas_and_those_within_sets(network, bias):
    """Eq. 26, and walks that are cut off: nothing sums to one, so all go on to their ends."""
    case = make(network, "gamma", bias == "input", seed=6)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=0)
    net, rng = case.oracles[0], np.random.default_rng(8)
    for _ in range(3):
        pairs = [random_set(rng, R, net, int(rng.integers(1, 3))) for _ in range(3)]
        sets, picked = [s for s, _ in pairs], [p for _, p in pairs]
        formula, holds = random_formula(rng, sets)
        original = R.marginals(formula, normalized=False)
        inside = R.marginals(formula, within=sets[0])
        total = R(formula, normalized=False)
        total_inside = R(formula, within=sets[0])
        places = {name for name, _ in picked[0]}
        for sample, oracle in enumerate(case.oracles):
            walks = oracle.walks(0, normalized=False)
            on = those(walks, picked, holds)
            check(total[sample], sum(r for _, r in on), walks)
            for name, found in original.items():
                expected = o.marginal(on, name, found[0].numel())
                check(found[sample].flatten(), expected, walks)
            walks = oracle.walks(0)
            closed = {(v, i) for v in places for i in range(len(oracle.values[v]))} - picked[0]
            on = [(v, r) for v, r in those(walks, picked, holds) if not v & closed]
            check(total_inside[sample], sum(r for _, r in on), walks)
            for name, found in inside.items():
                expected = o.marginal(on, name, found[0].numel())
                check(found[sample].flatten(), expected, walks)


@in_pairs("network, rule, bias", NETWORKS, ["gamma", "alpha2beta1", "flat"], BIAS)
def test_forward_messages(network, rule, bias):
    """`R(S | j)` for all neurons j, from walks that begin at j."""
    case = make(network, rule, bias == "input", seed=7)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=1)
    net, rng = case.oracles[0], np.random.default_rng(9)
    for layers in (1, 2):
        chosen, picked = random_set(rng, R, net, layers)
        found = R.conditionals(chosen)
        assert "output" in R.graph.output.aliases
        assert R.graph.output.name in found
        for sample, oracle in enumerate(case.oracles):
            for name, message in found.items():
                for j, value in enumerate(message[sample].flatten().tolist()):
                    oracle.output = name
                    walks = oracle.walks(j)
                    check(value, o.relevance(walks, picked), walks)
            oracle.output = net.output


@pytest.mark.parametrize("network", NETWORKS)
def test_forward_equals_backward(network):
    """Forward messages at a cut, weighted by its relevance, are what backward messages say."""
    case = make(network, "gamma", True, seed=8)
    R = nrm.Explainer(case.model, case.composite, bias="input")(*case.inputs, target=1)
    rng = np.random.default_rng(10)
    for _ in range(5):
        chosen, _ = random_set(rng, R, case.oracles[0], 1)
        for name, message in R.conditionals(chosen).items():
            if R.graph.variable(name) in R.graph.cuts:
                total = (message * R.marginal(name)).flatten(1).sum(1)
                torch.testing.assert_close(total, R(chosen), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("bias", BIAS)
@pytest.mark.parametrize("network", NETWORKS)
def test_weighted_relevance(network, bias):
    """Eq. 33, for weights that are sums and products over the neurons visited."""
    case = make(network, "gamma", bias == "input", seed=9)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=1)
    net, rng = case.oracles[0], np.random.default_rng(11)
    for _ in range(3):
        names = rng.choice([n for n in net.values if not n.endswith(".bias")], 2, replace=False)
        weights = {
            str(n): torch.tensor(rng.normal(size=R.graph.variable(n).shape[1:])) for n in names
        }
        pairs = [random_set(rng, R, net) for _ in range(2)]
        formula, holds = random_formula(rng, [s for s, _ in pairs])
        found = {over: R.weighted(weights, formula, over=over) for over in ("sum", "product")}
        freely = R.weighted(weights, over="product", given=pairs[0][0])
        for sample, oracle in enumerate(case.oracles):
            walks = oracle.walks(1)

            def weight(visited, join, start, weights=weights):
                total = start
                for name, i in visited:
                    if name in weights:
                        total = join(total, float(weights[name].flatten()[i]))
                return total

            on = those(walks, [p for _, p in pairs], holds)
            check(found["sum"][sample], sum(weight(v, operator.add, 0.0) * r for v, r in on), walks)
            check(
                found["product"][sample],
                sum(weight(v, operator.mul, 1.0) * r for v, r in on),
                walks,
            )
            known = o.relevance(walks, pairs[0][1])
            expected = sum(weight(v, operator.mul, 1.0) * r for v, r in walks if v & pairs[0][1])
            if abs(known) > 1e-6:
                check(freely[sample] * known, expected, walks)


@pytest.mark.parametrize("network", NETWORKS)
def test_additive_relevance(network):
    """Def. 3: the share of a walk's neurons that lie in the set; additive over all neurons."""
    case = make(network, "gamma", True, seed=10)
    R = nrm.Explainer(case.model, case.composite, bias="input")(*case.inputs, target=1)
    net, rng = case.oracles[0], np.random.default_rng(12)
    sets = [random_set(rng, R, net, layers) for layers in (1, 2, 2)]
    depth = len(R.proper_form())
    for chosen, picked in sets:
        found, counted = R.additive(chosen), R.additive(chosen, layers=3)
        torch.testing.assert_close(found * depth, counted * 3)
        for sample, oracle in enumerate(case.oracles):
            walks = oracle.walks(1)
            expected = sum(len(visited & picked) * r for visited, r in walks) / depth
            check(found[sample], expected, walks)
    first, second = (f"{sets[0][0].layers[0]}", f"{R.graph.output.name}")
    if first != second:
        torch.testing.assert_close(
            R.additive(first, second), R.additive(first) + R.additive(second)
        )
        torch.testing.assert_close(R.additive(first, second), R.additive(second, first))
    everything = R.additive(*(v.name for v in R.graph.variables), layers=1)
    lengths = [sum(len(v) * r for v, r in oracle.walks(1)) for oracle in case.oracles]
    np.testing.assert_allclose(everything, lengths, rtol=1e-8)


# -- the price -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2)]
    model = nn.Sequential(*layers, nn.Flatten()).double().eval()
    return nrm.Explainer(model, Everywhere(Gamma(0.5)))(torch.rand(1, 3, 6, 6).double(), target=0)


def test_a_plan_says_what_is_sent(chain):
    """Sets above each other need fewer messages than `2^k`, and none below the lowest."""
    R = chain
    a, b, c = nrm.channels("3", 1), nrm.channels("1", 2), nrm.channels("input", 0)
    for formulas, channels in (
        ([a & b & c], 1),  # whoever misses one is dropped
        ([~a & ~b & ~c], 1),
        ([a | b | c], 1),  # whoever meets one is done
        ([a ^ b ^ c], 2),
        ([a, b, a & b, a | b, ~a, a ^ b], 2),
        ([a, b, c, a & b & c, a | b | c, a ^ b ^ c], 4),
        ([a & ~a], 0),
        ([a | ~a], 0),
    ):
        plan = R.plan(*formulas)
        assert plan.channels == channels, formulas
        if len(formulas) > 1:
            assert messages_sent(R, lambda f=formulas: R.relevances(*f)) == plan.messages
        else:
            assert messages_sent(R, lambda f=formulas: R(*f)) == plan.messages
    assert "2 sets in 2 channels (of 4)" in str(R.plan(a ^ b))
    assert "1" not in R.plan(a ^ b).messages  # decided there
    assert R(a | ~a).item() == 1
    assert R(a & ~a).item() == 0


def test_forward_backward_takes_two_passes(chain):
    """One message back and one forward give all layers jointly with a set in the middle."""
    R = chain
    chosen = nrm.channels("1", 2)
    counted = messages_sent(R, lambda: R.marginals(chosen))
    # Downstream of the set: not visited yet; upstream: visited. Forward messages are transposes.
    assert max(counted.values()) <= 2
    expected = {v.name: R(chosen, v.name) for v in R.graph.variables}
    for name, found in R.marginals(chosen).items():
        torch.testing.assert_close(found.flatten(1).sum(1), expected[name])


def test_one_message_and_one_for_each_state_say_the_same(chain):
    """Along a chain of sets, and with formulas beside it that need more states on the way."""
    R = chain
    sets = nrm.channels("3", 1), nrm.channels("1", 2) | nrm.channels("2", 0), nrm.channels("0", 1)
    formula = sets[0] & sets[1] & sets[2]
    several = [formula, sets[0] ^ sets[1], sets[1] ^ sets[2]]
    assert R.plan(formula).channels < R.plan(*several).channels
    torch.testing.assert_close(R.relevances(*several)[0], R(formula))
    torch.testing.assert_close(R(*sets), R(formula))
    for name in ("input", "0", "3", "5"):  # of all walks, those that do not visit all three
        rest = R.marginal(name) - R.marginal(name, ~formula)
        torch.testing.assert_close(R.marginal(name, *sets), rest)


# -- formulas themselves -------------------------------------------------------------------------


def test_formulas_read_as_they_are_written():
    a, b = nrm.channels("1", 0), nrm.neurons("2")
    assert str(~a & b) == "~channels('1', 0) & neurons('2')"
    assert str(~(a ^ "2")) == "~(channels('1', 0) ^ neurons('2'))"
    assert str("2" & a) == "neurons('2') & channels('1', 0)"
    assert str(a >> b) == str(a.implies("2")) == "~channels('1', 0) | neurons('2')"
    assert isinstance(a | b, nrm.NeuronSet)
    assert a == nrm.channels("1", 0) != nrm.channels("1", 0, axis=1)
    first = torch.tensor([True, False])
    assert nrm.mask("1", first) == nrm.mask("1", first.clone())
    assert nrm.mask("1", first) != nrm.mask("1", ~first)  # which look the same


def test_formulas_are_refused_where_sets_are_needed(chain):
    R = chain
    a, b = nrm.channels("1", 0), nrm.channels("3", 1)
    with pytest.raises(NeuronSetError, match="neither true nor false"):
        _ = a and b
    with pytest.raises(NeuronSetError, match="not the formula"):
        R(a, within=a & b)
    with pytest.raises(NeuronSetError, match="not the formula"):
        R.additive(~a)
    with pytest.raises(NeuronSetError, match="got int"):
        a & 3
    with pytest.raises(QueryError, match="lies between the output"):
        R.conditionals(b, layers=["1"])
    with pytest.raises(QueryError, match="over="):
        R.weighted({"1": torch.ones(4, 4, 4)}, over="mean")
    with pytest.raises(NeuronSetError, match="shape"):
        R.weighted({"1": torch.ones(4)})
    with pytest.raises(QueryError, match="finite"):
        R.weighted({"1": torch.full((4, 4, 4), torch.nan)})
    with pytest.raises(QueryError, match="named before"):
        R.weighted({"5": torch.ones(2), "output": torch.ones(2)})
    with pytest.raises(QueryError, match="no weights"):
        R.weighted({})


def test_six_formulas_at_once_on_squeezenet(torchvision_models):
    """No operation is passed more often than states are open there, and no more at all."""
    torch.manual_seed(0)
    model = torchvision_models.squeezenet1_0().eval()
    R = nrm.Explainer(model, Everywhere(Gamma(0.25)))(torch.rand(1, 3, 48, 48), target=3)
    for a, b, most in (
        # one above the other: whether the lower is visited is decided where it lies
        (nrm.channels("features.12.squeeze", *range(20)), nrm.channels("features.9", 7, 9), 2),
        # each in a branch and in a layer below: they interleave; who visits both is decided
        (
            nrm.channels("features.9.expand1x1", *range(99)) | nrm.channels("features.5", 3),
            nrm.channels("features.9.expand3x3", *range(99)) | nrm.channels("features.7", 4),
            3,
        ),
    ):
        six = [a, b, a & b, a | b, ~a, a ^ b]
        counted = messages_sent(R, lambda six=six: R.relevances(*six))
        plan = R.plan(*six)
        assert counted == plan.messages
        assert plan.channels == max(counted.values()) == most
        together = R.relevances(*six)
        torch.testing.assert_close(together, torch.stack([R(f) for f in six]), atol=1e-5, rtol=0)
        one_by_one = sum(sum(messages_sent(R, lambda f=f: R(f)).values()) for f in six)
        assert sum(counted.values()) < one_by_one


# -- what a review found -------------------------------------------------------------------------


def test_sets_do_not_change_when_callers_reuse_what_they_gave(chain):
    R, buffer, index = chain, torch.zeros(4, 4, 4, dtype=torch.bool), [0]
    first_index = nrm.patch("1", index, 0)
    found = []
    for channel in (0, 1):
        buffer.zero_()
        buffer[channel] = True
        found.append(nrm.mask("1", buffer))
    index[0] = 1
    assert found[0] != found[1]
    torch.testing.assert_close(R(found[0]), R(nrm.channels("1", 0)))
    torch.testing.assert_close(R(first_index), R(nrm.patch("1", 0, 0)))


def test_results_are_the_callers_to_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    for composite in (nrm.composites.CPLRP(), nrm.composites.GammaFlat()):
        x = torch.rand(1, 3).double()
        R = nrm.Explainer(model, composite, bias="input")(x, target=0)
        before = R.heatmap().clone(), R.activations("input").clone()
        for result in (R.output, R.activations("input"), R.activations("0"), R.heatmap()):
            result.mul_(3)
        for result in (R.marginal("output"), *R.marginals().values(), *R.biases().values()):
            result.zero_()
        torch.testing.assert_close((R.heatmap(), R.activations("input")), before)


def test_sets_that_exclude_each_other_make_few_states(chain):
    """Of k disjoint sets of a layer a walk visits at most one."""
    R = chain
    parts = [nrm.patch("1", row, column) for row in range(4) for column in range(4)]
    plan = R.plan(*parts)
    assert plan.channels == 1
    assert "1" not in plan.messages  # decided there
    torch.testing.assert_close(R.relevances(*parts), torch.stack([R(s) for s in parts]))
    pairs = [a & b for a in parts for b in (nrm.channels("3", c) for c in range(4))]
    assert R.plan(*pairs).channels == 4
    torch.testing.assert_close(R.relevances(*pairs), torch.stack([R(p) for p in pairs]))
    torch.testing.assert_close(
        R.conditionals(*parts[:2], layers="3")["3"].sum(), torch.zeros(()).double()
    )


def test_results_are_named_as_asked(chain):
    R, a = chain, nrm.channels("1", 2)
    assert set(R.marginals(a, layers=["output", "3"])) == {"output", "3"}
    assert set(R.marginals(layers="input")) == {"input"}
    assert set(R.conditionals(a, layers=["output"])) == {"output"}
    torch.testing.assert_close(R.conditionals(a, layers="output")["output"][:, :1], R(a)[:, None])


def test_additive_relevance_needs_sets_and_layers(chain):
    with pytest.raises(NeuronSetError, match="at least one"):
        chain.additive()
    with pytest.raises(QueryError, match="positive"):
        chain.additive("1", layers=0)
    with pytest.raises(QueryError, match="at least one"):
        chain.conditionals()


def test_many_heatmaps_at_once():
    """Conditions on the same layers travel together; others are none the worse for it."""
    for network, name in (("Concat", "gamma"), ("Residual", "zplus"), ("Conv", "zero")):
        case = make(network, name, True, seed=3)
        for composite in (case.composite, nrm.composites.CPLRP()):
            R = nrm.Explainer(case.model, composite, bias="input")(*case.inputs, target=1)
            rng = np.random.default_rng(3)
            net = case.oracles[0]
            names = [n for n in net.values if not n.endswith(".bias") and n != "input"]
            sets = [random_set(rng, R, net, 1)[0] for _ in range(6)]
            same = [nrm.neurons(names[1], *[(0,) * len(R.graph.variable(names[1]).shape[1:])])] * 2
            conditions = [
                *sets,
                *same,
                names[0],
                [sets[0], sets[1]],
                [sets[0] | sets[2], names[2]],
                ~sets[3],
                [],
                [same[0], names[-1]],
            ]
            done = []
            for memory in (2**28, 1):
                found = R.heatmaps(conditions, memory=memory, progress=done.append)
                for heatmap, condition in zip(found, conditions, strict=True):
                    listed = condition if isinstance(condition, list) else [condition]
                    torch.testing.assert_close(heatmap, R.heatmap(*listed))
            assert sum(done) == 2 * len(conditions)
    torch.testing.assert_close(R.heatmaps(sets[:2], at=names[0])[1], R.marginal(names[0], sets[1]))
    assert R.heatmaps([]).shape == (0, *R.heatmap().shape)


def test_conditions_that_ask_the_same_are_answered_once(chain):
    R = chain
    a, b = nrm.channels("1", 0), nrm.channels("3", 1)
    shape = R.activations("1")[0].shape
    same = [nrm.mask("1", torch.ones(shape).tril() > 0) for _ in range(2)]
    conditions = [a, [a, b], *same, [b, a], a, ~a, ~a]
    done = []
    counted = messages_sent(R, lambda: R.heatmaps(conditions, progress=done.append))
    assert counted["0"] == 3 + 1
    assert sum(done) == len(conditions)


def test_many_heatmaps_pass_what_lies_above_once(chain):
    R = chain
    counted = messages_sent(R, lambda: R.heatmaps([nrm.channels("3", c) for c in range(4)]))
    assert {counted[name] for name in ("5", "4")} == {1}
    assert {counted[name] for name in ("3", "2", "1", "0")} == {4}
