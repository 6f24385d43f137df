"""The laws of the measure, over random networks, rules and sets (section 3.2)."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.networks import NETWORKS, make
from torch import nn

import nrm
from nrm import rules
from nrm.composites import Everywhere

pytestmark = pytest.mark.usefixtures("captured_once")

RULES = ["zero", "gamma", "zplus", "alpha2beta1", "flat", "wsquare"]


@cache
def _measure(network, rule, bias, seed):
    case = make(network, rule, bias == "input", seed)
    return nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=seed % 2)


measures = st.builds(
    _measure,
    st.sampled_from(sorted(NETWORKS)),
    st.sampled_from(RULES),
    st.sampled_from(["drop", "input"]),
    st.integers(0, 1),
)


def _set(draw, R, name):
    shape = R.marginal(name).shape[1:]
    size = shape.numel()
    bits = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    return nrm.mask(name, torch.tensor(bits).view(shape)), torch.tensor(bits).view(shape)


@st.composite
def sets_of(draw, R, many=2):
    """Random sets, each over one or two random variables."""
    names = [v.name for v in R.graph.variables]
    chosen = []
    for _ in range(many):
        one, _ = _set(draw, R, draw(st.sampled_from(names)))
        if draw(st.booleans()):
            one = one | _set(draw, R, draw(st.sampled_from(names)))[0]
        chosen.append(one)
    return chosen


def close(found, expected, R):
    scale = float(R.diagnostics().total_variation.max())
    assert torch.allclose(found, expected, atol=1e-10 * max(1.0, scale), rtol=1e-10), (
        found - expected
    )


laws = settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@laws
@given(st.data(), measures)
def test_every_cut_has_relevance_one(data, R):
    """Eq. 5."""
    for variable in R.graph.cuts:
        close(R(variable.name), torch.ones(2).double(), R)
    for cut in R.diagnostics().cuts:
        assert cut.deviation < 1e-10


@laws
@given(st.data(), measures)
def test_additive_over_disjoint_sets(data, R):
    """Eq. 6, and the marginal as the relevance of single neurons."""
    name = data.draw(st.sampled_from([v.name for v in R.graph.variables]))
    _, bits = _set(data.draw, R, name)
    other = ~bits
    marginal = R.marginal(name)
    close(R(nrm.mask(name, bits)), (marginal * bits).flatten(1).sum(1), R)
    if other.any():
        close(R(nrm.mask(name, bits)) + R(nrm.mask(name, other)), R(name), R)


@laws
@given(st.data(), measures)
def test_marginalisation(data, R):
    """Eq. 8: a joint relevance summed over all neurons of a cut is that of the rest."""
    (chosen,) = data.draw(sets_of(R, 1))
    cut = data.draw(st.sampled_from(R.graph.cuts)).name
    close(R(chosen, cut), R(chosen), R)
    leaves = [leaf.name for leaf in R.graph.leaves]
    close(sum(R(chosen, leaf) for leaf in leaves), R(chosen), R)


@laws
@given(st.data(), measures)
def test_conditional_and_multiplication(data, R):
    """Eq. 11: R(A, B) = R(A | B) R(B), and 0 where R(B) = 0."""
    a, b = data.draw(sets_of(R))
    known, conditional = R(b), R(a, given=b)
    close(conditional * known, torch.where(known == 0, 0.0, R(a, b)), R)
    assert (conditional[known == 0] == 0).all()


@laws
@given(st.data(), measures)
def test_complement(data, R):
    """R(not S) = 1 - R(S) over a cut."""
    cut = data.draw(st.sampled_from(R.graph.cuts)).name
    chosen, bits = _set(data.draw, R, cut)
    if not bits.all():
        close(R(nrm.mask(cut, ~bits)), 1 - R(chosen), R)


@laws
@given(st.data(), measures)
def test_addition(data, R):
    """R(A or B) = R(A) + R(B) - R(A, B), wherever A and B lie."""
    a, b = data.draw(sets_of(R))
    close(R(a | b), R(a) + R(b) - R(a, b), R)


@laws
@given(st.data(), measures)
def test_joint_does_not_depend_on_the_order_given(data, R):
    a, b, c = data.draw(sets_of(R, 3))
    close(R(a, b, c), R(c, a, b), R)


@laws
@given(st.data(), measures)
def test_message_passing_stops_where_the_answer_is(data, R):
    """Theorem 1: the sum at the lowest set equals the sum over the leaves below it."""
    a, b = data.draw(sets_of(R))
    leaves = [leaf.name for leaf in R.graph.leaves]
    close(R(a, b), sum(R(a, b, leaf) for leaf in leaves), R)


@st.composite
def formulas_of(draw, R, many):
    """Random formulas over two random sets."""
    sets = draw(sets_of(R, 2))
    chosen = []
    for _ in range(many):
        a, b = draw(st.sampled_from(sets)), draw(st.sampled_from(sets))
        kinds = [a, ~a, a & b, a | ~b, a ^ b, a >> b, ~(a & ~b)]
        chosen.append(draw(st.sampled_from(kinds)))
    return chosen


@laws
@given(st.data(), measures)
def test_de_morgan(data, R):
    a, b = data.draw(formulas_of(R, 2))
    close(R(~(a & b)), R(~a | ~b), R)
    close(R(~(a | b)), R(~a & ~b), R)
    close(R(~a), 1 - R(a), R)


@laws
@given(st.data(), measures)
def test_distributivity(data, R):
    a, b, c = data.draw(formulas_of(R, 3))
    close(R(a & (b | c)), R((a & b) | (a & c)), R)
    close(R(a | (b & c)), R((a | b) & (a | c)), R)
    close(R(a >> b), R(~(a & ~b)), R)
    close(R(a ^ b), R(a | b) - R(a & b), R)


@laws
@given(st.data(), measures)
def test_inclusion_and_exclusion(data, R):
    a, b, c = data.draw(sets_of(R, 3))
    expected = R(a) + R(b) + R(c) - R(a, b) - R(a, c) - R(b, c) + R(a, b, c)
    close(R(a | b | c), expected, R)
    close(R((a & ~~b) | (b ^ c) | c), R(b | c), R)


@laws
@given(st.data(), measures)
def test_total_law(data, R):
    """`R(A) = sum over the parts b of a cut of R(A | b) R(b)`."""
    (a,) = data.draw(formulas_of(R, 1))
    cut = data.draw(st.sampled_from(R.graph.cuts)).name
    chosen, bits = _set(data.draw, R, cut)
    parts = [chosen] if bits.all() else [chosen, nrm.mask(cut, ~bits)]
    if not all(bool((R(part).abs() > 1e-6).all()) for part in parts):
        return  # 0 where R(b) = 0, so that nothing of R(A, b) is left
    close(sum(R(a, given=part) * R(part) for part in parts), R(a), R)


@laws
@given(st.data(), measures)
def test_bayes(data, R):
    """`R(A | B) R(B) = R(B | A) R(A)`."""
    a, b = data.draw(formulas_of(R, 2))
    known = R(a), R(b)
    if not all(bool((r.abs() > 1e-6).all()) for r in known):
        return
    close(R(a, given=b) * known[1], R(b, given=a) * known[0], R)


@laws
@given(st.data(), measures)
def test_forward_equals_backward(data, R):
    """Every cut sums to the query, with messages from both sides meeting there."""
    (a,) = data.draw(formulas_of(R, 1))
    layers = R.marginals(a)
    for variable in R.graph.cuts:
        close(layers[variable.name].flatten(1).sum(1), R(a), R)


@laws
@given(st.data(), measures)
def test_outcomes_add_up(data, R):
    """Harsanyi dividends of a family add up to one, and to each of its sets."""
    sets = data.draw(sets_of(R, 3))
    found = R.outcomes(*sets)
    close(sum(found.values()), torch.ones(2).double(), R)
    for k, chosen in enumerate(sets):
        close(sum(r for held, r in found.items() if held[k]), R(chosen), R)


@laws
@given(st.data(), measures)
def test_additive_relevance_is_additive(data, R):
    """Def. 3: over disjoint neurons, of whatever layers."""
    names = sorted({name for v in R.graph.variables for name in (v.name, *v.aliases)})
    name, other = data.draw(st.lists(st.sampled_from(names), min_size=2))[:2]
    chosen, bits = _set(data.draw, R, name)
    if R.graph.variable(name) is not R.graph.variable(other):
        close(R.additive(chosen, other), R.additive(chosen) + R.additive(other), R)
    if not bits.all():
        rest = nrm.mask(name, ~bits)
        close(R.additive(chosen | rest), R.additive(chosen) + R.additive(rest), R)


class _ConstantColumns(nn.Module):
    """All columns of T~ sum to 3 under w2: each neuron's squared weights do."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.double()  # first: sums that are equal in single precision differ in double
        for layer in (self.a, self.b):
            layer.weight.data *= (3 / layer.weight.data.square().sum(1, keepdim=True)).sqrt()

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("seed", range(3))
def test_original_walk_relevance_is_proportional_where_columns_are_constant(seed):
    """Theorem 2, first part."""
    model = _ConstantColumns(seed).eval()
    x = torch.randn(2, 3).double()
    R = nrm.Explainer(model, Everywhere(rules.WSquare()))(x, target=1)
    sets = [nrm.neurons("a", 0, 2), nrm.neurons("input", 1)]
    for chosen in ([sets[0]], [sets[1]], sets):
        torch.testing.assert_close(R(*chosen, normalized=False), R(*chosen) * R.scale * 9)


def test_original_walk_relevance_is_not_proportional_elsewhere():
    """Theorem 2, second part: with unequal columns no one scale fits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    R = nrm.Explainer(model.double().eval(), Everywhere(rules.WSquare()))(
        torch.randn(2, 3).double(), target=1
    )
    ratios = R.heatmap(normalized=False) / R.heatmap()
    assert (ratios.amax(1) - ratios.amin(1)).abs().min() > 1e-3 * ratios.abs().max()
