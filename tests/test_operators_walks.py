"""Attention, gates, recurrent cells, norms and the rest, against all walks, in fp64 to 1e-10."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import oracle as o
from support.architectures import Walks, built, make
from support.networks import RULES
from torch import nn

import nrm
from nrm import composites, rules
from nrm.composites import Everywhere
from nrm.errors import UnsupportedOperatorError

pytestmark = pytest.mark.usefixtures("captured_once")

ATTENTION = [
    Walks("zero", "value", "input"),
    Walks("gamma", "value", "drop"),
    Walks("zero", "uniform", "input", softmax="taylor"),
    Walks("gamma", "uniform", "drop", softmax="taylor"),
    Walks("flat", "uniform", "input", softmax="taylor"),
    Walks("flat", "uniform", "drop"),
    Walks("zplus", "shares", "input", softmax="taylor"),
    Walks("zero", "order", "drop"),
]
PRODUCTS = [
    Walks(rule, alpha, bias)
    for rule, alpha, bias in [
        ("zero", "value", "drop"),
        ("zero", "value", "input"),
        ("gamma", "value", "input"),
        ("flat", "value", "drop"),
        ("zero", "uniform", "input"),
        ("flat", "uniform", "input"),
        ("gamma", "shares", "drop"),
        ("zplus", "shares", "input"),
        ("zero", "order", "drop"),
        ("alpha2beta1", "order", "input"),
    ]
]
FEW_SUMS = [
    Walks(rule, bias=bias) for rule in ("zero", "gamma", "flat") for bias in ("drop", "input")
]
OTHER_SUMS = [
    Walks(rule, bias=("drop", "input")[number // 2 % 2])
    for number, rule in enumerate(sorted(set(RULES) - {"zero", "gamma", "flat"}))
]
SUMS = [*FEW_SUMS, *OTHER_SUMS]
CASES = {
    **dict.fromkeys(
        (
            "Attention",
            "CausalAttention",
            "MaskedAttention",
            "AddedMaskAttention",
            "WrittenAttention",
            "GroupedQueryAttention",
            "Multihead",
        ),
        ATTENTION,
    ),
    **dict.fromkeys(
        ("Gates", "LSTMCell", "LSTM", "GRUCell", "GRU", "GraphAttention", "Products"), PRODUCTS
    ),
    "RNN": FEW_SUMS,
    "Norms": SUMS,
    "Classifier": SUMS,
    "Linears": SUMS,
    "Scatter": SUMS,
    "ScatterMax": FEW_SUMS,
    "Fills": FEW_SUMS,
    "Upsampling": [*FEW_SUMS, Walks("zplus")],
    "Interpolation": SUMS,
    "Tokens": FEW_SUMS,
}


def _some(place: int, network: str) -> list[Walks]:
    """Some of the ways for a network, the others for those next to it, where there are many.

    Of ways to share a product every third; of sums the three rules that differ most, each with
    another treatment of biases than on the next network, and every other one of the other rules.
    """
    cases = CASES[network]
    if cases in (ATTENTION, PRODUCTS):
        return cases[place % 3 :: 3]
    few = [w for number, w in enumerate(FEW_SUMS) if (number + number // 2 + place) % 2]
    others = OTHER_SUMS[place % 2 :: 2] if cases is SUMS else []
    if network == "Classifier":
        few = [*FEW_SUMS[:1], *(Walks(w.rule, bias=w.bias, softmax="taylor") for w in few)]
        others = [Walks(w.rule, bias=w.bias, softmax="taylor") for w in others]
    if network == "Norms":
        others += [Walks("gamma", bias=bias, norm="identity") for bias in ("drop", "input")]
    return few + others + cases[len(SUMS if cases is SUMS else FEW_SUMS) :]


def _check(found, expected, size=1.0):
    found = np.asarray(found)
    np.testing.assert_allclose(found, expected, atol=1e-10 * max(1.0, size), rtol=0)


def _of_sample(R, name, tensor, sample):
    """One sample of a tensor shaped like a variable, flat."""
    samples = R.graph.variable(name).canonical(tensor[None])[0]
    return samples[sample if len(samples) > 1 else 0].flatten()


def _random_set(R, rng, net, names):
    """A random set of one or two variables: for nrm, and as neurons for the oracle."""
    united, picked = None, set()
    for name in names:
        size = len(net.values[name])
        chosen = rng.choice(size, rng.integers(1, size + 1), replace=False)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[chosen] = True
        variable = R.graph.variable(name)
        one = nrm.mask(name, mask.view(variable.neuron_shape(R.forward_pass.shape(variable))))
        united = one if united is None else united | one
        picked |= {(name, int(i)) for i in chosen}
    return united, picked


@pytest.mark.parametrize(
    ("network", "walks"),
    [
        pytest.param(network, walks, id=f"{network}-{walks}")
        for place, network in enumerate(CASES)
        for walks in _some(place, network)
    ],
)
def test_queries_equal_the_sum_over_walks(network, walks):
    case = make(network, walks)
    R = nrm.Explainer(case.model, walks.composite, bias=walks.bias, head="keep")(
        *case.inputs, target=1
    )
    found = [net.walks(1) for net in case.oracles]
    sizes = [sum(abs(r) for _, r in w) for w in found]
    net, rng = case.oracles[0], np.random.default_rng(0)
    visited = net.visited()
    leaves = [leaf for leaf in net.leaves if leaf in visited]
    names = [name for name in net.values if name in visited and not name.endswith(".bias")]
    assert {v.name for v in R.graph.variables} >= visited
    for leaf in {v.name for v in R.graph.leaves} - visited:
        _check(R(leaf), 0.0)

    marginals = R.marginals(layers=names)
    for name in names:  # the marginal of every variable, the share of the whole of it, of a part
        marginal, whole = marginals[name], R(name)
        chosen, picked = _random_set(R, rng, net, [name])
        below = R.heatmap(chosen, at=leaves[0])
        for sample, w in enumerate(found):
            expected = o.marginal(w, name, len(net.values[name]))
            _check(_of_sample(R, name, marginal, sample), expected, sizes[sample])
            _check(whole[sample], expected.sum(), sizes[sample])
            expected = o.marginal(w, leaves[0], len(net.values[leaves[0]]), picked)
            _check(_of_sample(R, leaves[0], below, sample), expected, sizes[sample])
    taken = {leaf: R(leaf) for leaf in leaves}
    for sample, w in enumerate(found):
        for leaf in leaves:
            expected = sum(r for visited, r in w for name, _ in visited if name == leaf)
            _check(taken[leaf][sample], expected, sizes[sample])
        _check(sum(taken.values())[sample], 1.0, sizes[sample])  # together they take everything

    for _ in range(3):  # joint, conditional, marginal, for sets anywhere
        drawn = [
            _random_set(R, rng, net, rng.choice(names, rng.integers(1, 3), replace=False))
            for _ in range(rng.integers(1, 4))
        ]
        sets, picked = [s for s, _ in drawn], [p for _, p in drawn]
        together, heat = R(*sets), R.heatmap(*sets, at=leaves[0])
        avoiding = R.marginals(~sets[0], layers=names)  # forward messages through every operator
        conditional = R(sets[0], given=sets[1:] or None)
        for sample, w in enumerate(found):
            joint = o.relevance(w, *picked)
            _check(together[sample], joint, sizes[sample])
            expected = o.marginal(w, leaves[0], len(net.values[leaves[0]]), *picked)
            _check(_of_sample(R, leaves[0], heat, sample), expected, sizes[sample])
            others = [(v, r) for v, r in w if not v & picked[0]]
            for name in names:
                expected = o.marginal(others, name, len(net.values[name]))
                _check(_of_sample(R, name, avoiding[name], sample), expected, sizes[sample])
            known = o.relevance(w, *picked[1:]) if picked[1:] else 1.0
            if abs(known) > 1e-6:
                _check(float(conditional[sample]) * known, joint, 100 * sizes[sample])


@pytest.mark.parametrize("network", CASES)
def test_totals_are_one_under_occlusion_and_by_gradients(network):
    """On every architecture: the rules of section 3.5.3, whose walks test_rules_occlusion and
    test_rules_gradients follow."""
    model, inputs, _ = built(network, 0)
    biases = ("drop", "input") if list(CASES).index(network) % 2 else ("input", "drop")
    for composite, bias in (
        (composites.Occlusion(), "drop"),
        (composites.Occlusion(), "input"),
        (composites.LocalLinear(), biases[0]),
        (composites.IntegratedGradients(0.1, 2), biases[1]),
    ):
        try:
            R = nrm.Explainer(model, composite, bias=bias)(*inputs, target=0)
        except UnsupportedOperatorError as refusal:
            assert "one by one" in str(refusal)  # noqa: PT017 - occlusion may refuse some
            assert isinstance(composite.default, rules.Occlusion)
            continue
        assert R.diagnostics().worst_cut_deviation < 1e-9
        assert all(torch.isfinite(R.marginal(leaf.name)).all() for leaf in R.graph.leaves)


class _Bags(nn.Module):
    """Two bags, of which the second has one token twice; the token 0 is padding."""

    def __init__(self, mode):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(5, 2, mode=mode, padding_idx=0), nn.Linear(2, 2)

    def forward(self, tokens):
        return self.head(self.bag(tokens))


@pytest.mark.parametrize("rule", ["zero", "gamma", "flat"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_embeddings(mode, rule):
    """The embeddings of all tokens are one variable, in which the bags of the batch follow."""
    torch.manual_seed(0)
    model, tokens = _Bags(mode).double().eval(), torch.tensor([[1, 2, 0], [4, 3, 3]])
    explainer = nrm.Explainer(model, Everywhere(RULES[rule][0]), bias="drop")
    for bag in (0, 1):
        R = explainer(tokens, target=1)
        net = o.Oracle(bias_is_input=False)
        embedded = model.bag.weight.detach().numpy()[tokens[bag]]
        used = tokens[bag].numpy() != 0
        net.input("embedded", embedded)
        counted = net.identity("scaled", "embedded")
        net.values[counted] = net.values[counted] * np.repeat(used, 2)
        terms = [
            (c, "scaled", 2 * t + c, 1 / used.sum() if mode == "mean" else 1.0)
            for t in range(3)
            for c in (0, 1)
            if used[t]  # padding is no parent
        ]
        net.weighted("bag", RULES[rule][1], 2, terms)
        weight, bias = (p.detach().numpy() for p in (model.head.weight, model.head.bias))
        net.linear("head", RULES[rule][1], "bag", weight, bias)
        expected = o.marginal(net.walks(1), "embedded", 6).reshape(3, 2)
        found = R.marginal(R.graph.inputs[0].name)
        _check(found[3 * bag : 3 * bag + 3], expected, np.abs(expected).sum())


def test_tokens_of_a_transformer_and_its_class_token_share_all():
    model, inputs, _ = built("Tokens", 0)
    R = nrm.Explainer(model, rules.Zero(), bias="drop")(*inputs, target=0)
    tokens = R.tokens()
    assert tokens.shape == (2, 2)
    _check(tokens, R.marginal("embed").sum(-1))
    _check(tokens.sum(1) + R(":expand") + R("extra"), 1.0, float(tokens.abs().max()))


# -- laws of products ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["value", "uniform", "shares", "order"])
def test_factors_take_what_the_product_has(alpha):
    """At the deepest product, what is at its factors is what was at the product."""
    model, inputs, _ = built("Gates", 0)
    walks = Walks("gamma", alpha)
    R = nrm.Explainer(model, walks.composite, bias="drop")(*inputs, target=0)
    gate, value = walks.shares(1, 0)
    product = R.marginal(":mul@1")
    _check(R.marginal("up"), value * product)
    if gate:
        _check(R.marginal(":silu"), gate * product)
        _check(R.marginal(":silu") + R.marginal("up"), product)
        _check(R(":silu", ":mul@1"), gate * R(":mul@1"))


class _Similarity(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x, y):
        return torch.einsum("btc,bsc->bts", self.q(x), self.k(y)).flatten(1)


@pytest.mark.parametrize("rule", ["zero", "zplus", "flat"])
def test_queries_and_keys_share_evenly(rule):
    """Under Uniform each factor of q k^T takes half, and within it the rule decides."""
    torch.manual_seed(0)
    model = _Similarity().double().eval()
    x, y = torch.randn(2, 2, 3).double(), torch.randn(2, 2, 3).double()
    walks = Walks(rule, "uniform")
    R = nrm.Explainer(model, walks.composite, bias="drop")(x, y, target=1)
    q, k = R.marginal("q"), R.marginal("k")
    _check(q.flatten(1).sum(1), 0.5)
    _check(k.flatten(1).sum(1), 0.5)
    parts = (model.q(x)[:, 0] * model.k(y)[:, 1]).detach()
    parts = {"zero": parts, "zplus": parts.clamp(min=0), "flat": torch.ones_like(parts)}[rule]
    expected = 0.5 * parts / parts.sum(1, keepdim=True)
    _check(q[:, 0], expected, float(expected.abs().max()))
    _check(k[:, 1], expected, float(expected.abs().max()))
    _check(q[:, 1], 0.0)


class _ConstantGate(nn.Module):
    """The layers of `Gates`, with the gates of one input as constants."""

    def __init__(self, model, x):
        super().__init__()
        self.model = model
        with torch.no_grad():
            self.register_buffer("first", model.a(x).sigmoid())
            h = x * self.first
            self.register_buffer("second", nn.functional.silu(model.gate(h)))
            h = model.down(self.second * model.up(h))
            self.register_buffer("third", h[:, 2:].sigmoid())

    def forward(self, x):
        h = self.model.down(self.second * self.model.up(x * self.first))
        return h[:, :2] * self.third


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("rule", ["epsilon", "gamma", "flat"])
def test_a_gate_that_takes_nothing_is_a_constant_weight(rule, bias):
    model, inputs, _ = built("Gates", 0)
    x = inputs[0][:1]
    composite = Walks(rule).composite
    R = nrm.Explainer(model, composite, bias=bias)(x, target=1)
    constant = _ConstantGate(model, x).eval()
    S = nrm.Explainer(constant, composite, bias=bias)(x, target=1)
    _check(R.heatmap(), S.heatmap(), float(S.heatmap().abs().sum()))


@pytest.mark.parametrize("network", ["Gates", "GRUCell", "Multihead", "WrittenAttention"])
def test_derivatives_and_messages_agree(network):
    """LRP-0 that counts biases, with a stabiliser that does nothing, takes the long way."""
    model, inputs, _ = built(network, 0)
    for alpha in ("value", "uniform"):
        for softmax in ("identity", "taylor"):
            measures = []
            for rule in ("zero", "epsilon"):
                composite = Walks(rule, alpha, softmax=softmax).composite
                measures.append(nrm.Explainer(model, composite, bias="input")(*inputs, target=0))
            fast, slow = measures
            for v in slow.graph.variables:
                expected = slow.marginal(v.name)
                _check(fast.marginal(v.name), expected, float(expected.abs().sum()))


# -- the first-order fallback --------------------------------------------------------------------


class _Odd(nn.Module):
    """Operators that have no row."""

    def __init__(self, function):
        super().__init__()
        self.function, self.lift, self.head = function, nn.Linear(3, 4), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.function(self.lift(x).unflatten(1, (2, 2))))


@pytest.mark.parametrize(
    "function", [lambda h: torch.logsumexp(h, 1), lambda h: torch.prod(h, 1), torch.linalg.det]
)
def test_first_order_fallback(function):
    """`T~_ij = x_i df_j/dx_i`, with the Jacobian from autograd."""
    if function is torch.linalg.det:

        def function(h):
            return torch.linalg.det(h).unsqueeze(-1).expand(-1, 2)

    torch.manual_seed(0)
    model, x = _Odd(function).double().eval(), torch.randn(2, 3).double()
    fallback = nrm.operators.LocalLinear()
    R = nrm.Explainer(model, rules.Zero(), bias="drop", fallback=fallback)(x, target=1)
    for sample in (0, 1):
        h = model.lift(x[sample : sample + 1]).unflatten(1, (2, 2)).detach()
        jacobian = torch.autograd.functional.jacobian(function, h)[0, :, 0].flatten(1)
        contributions = jacobian * h.flatten()
        above = model.head.weight[1].detach() * function(h)[0]
        shares = contributions / contributions.sum(1, keepdim=True)
        expected = above / above.sum() @ shares
        _check(R.marginal("lift")[sample], expected, float(expected.abs().sum()))
    _check(sum(R(v.name) for v in R.graph.leaves), 1.0, float(R.heatmap().abs().sum()))


# -- many messages at once -----------------------------------------------------------------------

PAIRS = {
    "CausalAttention": ("head", "k"),
    "Multihead": (":flatten", "a:linear"),
    "Gates": ("glu", "gate"),
    "LSTM": ("rnn.c_l0[1]", "rnn.c_l0[0]"),
    "GRU": ("rnn.h_l0[1]", "rnn:linear"),
    "Norms": ("layer", "conv"),
    "Classifier": (":softmax", "head"),
    "Products": (":matmul", "a"),
    "Scatter": (":scatter_reduce", "lift"),
    "Fills": (":masked_fill", "lift"),
    "Upsampling": (":gather", "up"),
    "Interpolation": (":upsample_bilinear2d", "input"),
    "GraphAttention": ("head", "w"),
    "Tokens": ("head", ":cat"),
}


@pytest.mark.parametrize("network", PAIRS)
def test_many_messages_at_once_equal_one_by_one(network):
    model, inputs, _ = built(network, 0)
    upper, lower = PAIRS[network]
    composite = Walks("gamma", "uniform", softmax="taylor").composite
    for bias in ("drop", "input"):
        R = nrm.Explainer(model, composite, bias=bias, head="keep")(*inputs, target=1)
        pairs = R.joint(upper, lower)
        assert pairs.abs().sum() > 0
        for c in range(pairs.shape[1]):
            one = R.channels(lower, nrm.channels(upper, c))
            _check(pairs[:, c], one, float(one.abs().sum()))
