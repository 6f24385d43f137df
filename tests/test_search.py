"""The most relevant flows, against listing all of them."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from support.listed import ORDERS, chains, check, explained, listed
from support.networks import NETWORKS
from support.pairs import in_pairs
from torch import nn

import nrm
from nrm import composites, rules
from nrm.composites import Everywhere
from nrm.errors import NeuronSetError, QueryError
from nrm.operators import LocalLinear

pytestmark = pytest.mark.usefixtures("captured_once")


@in_pairs(
    "network, rule, bias, by",
    NETWORKS,
    ["zero", "gamma", "plain-gamma", "zplus", "alpha2beta1", "flat"],
    ["drop", "input"],
    ["neuron", "channel"],
)
def test_the_search_finds_what_listing_all_walks_finds(network, rule, bias, by):
    R, walks = explained(network, rule, bias)
    size = max(1.0, sum(abs(relevance) for _, relevance in walks))
    for order, layers in zip(itertools.cycle(ORDERS), chains(R, 4)):  # of each length every order
        everything = listed(R, walks, layers, by)
        flows = R.top(*layers, k=6, by=by, order=order, sample=1)
        check(R, flows, everything, order, by, 6, size)


@pytest.mark.parametrize("rule", ["zero", "gamma", "zplus"])
@pytest.mark.parametrize("network", ["MLP", "Residual"])
def test_little_memory_changes_nothing(network, rule):
    R, _ = explained(network, rule, "input")
    layers = chains(R, 4)[-1]
    much, little = R.top(*layers, k=8, by="neuron"), R.top(*layers, k=8, by="neuron", memory=1)
    assert [f.relevance for f in much] == pytest.approx([f.relevance for f in little], abs=1e-12)


class Tower(nn.Module):
    """Convolutions with activations between them."""

    def __init__(self, *channels, steps=nn.ReLU):
        super().__init__()
        pairs = itertools.pairwise(channels)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.step, self.head = steps(), nn.Linear(channels[-1], 3)

    def forward(self, x):
        for conv in self.convs:
            x = self.step(conv(x))
        return self.head(x.mean((2, 3)))


@cache
def built(*channels):
    """A tower and its input, the same for all tests."""
    torch.manual_seed(0)
    return Tower(*channels).double().eval(), torch.randn(1, channels[0], 6, 6).double()


def tower(composite, *channels):
    model, x = built(*channels)
    return nrm.Explainer(model, composite)(x, target=1)


@cache
def linear_layers():
    """Four layers and an input."""
    torch.manual_seed(0)
    sizes = [(5, 9), (9, 8), (8, 7), (7, 2)]
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), nn.ReLU())][:-1]
    return nn.Sequential(*layers).double().eval(), torch.rand(1, 5).double()


LAYERS = ["convs.1", "convs.2", "convs.3"]


def all_of(R, layers):
    sizes = [R.channels(layer).shape[1] for layer in layers]
    return R.joint(*layers)[0], sizes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "rule", [rules.Zero(), rules.Gamma(0.25), rules.ZPlus(), rules.AlphaBeta(2.0, 1.0)], ids=repr
)
def test_channels_of_convolutions(rule, order):
    R = tower(Everywhere(rule), 2, 6, 8, 7, 9)
    table, _ = all_of(R, LAYERS)
    flows = R.top(*LAYERS, k=10, order=order)
    best = sorted(table.flatten().tolist(), key=ORDERS[order], reverse=True)[:10]
    assert flows.exact
    assert [f.relevance for f in flows] == pytest.approx(best, abs=1e-11)
    assert all(f.share == pytest.approx(f.relevance / float(R(*LAYERS))) for f in flows)


def test_bounds_spare_most_of_the_search_where_relevance_is_concentrated():
    """Nonnegative relevance, most of it in a few channels: little has to be looked at."""
    torch.manual_seed(0)
    model = Tower(2, 24, 24, 24, 24).double().eval()
    with torch.no_grad():
        for conv in model.convs:
            conv.weight *= torch.linspace(0, 1, len(conv.weight)).pow(8)[:, None, None, None]
    x = torch.rand(1, 2, 6, 6).double()
    R = nrm.Explainer(model, Everywhere(rules.ZPlus()))(x, target=1)
    flows = R.top(*LAYERS, k=5)
    table = R.joint(*LAYERS)[0]
    best = table.flatten().topk(5).values.tolist()
    assert [f.relevance for f in flows] == pytest.approx(best, abs=1e-12)
    assert flows.visited < 0.25
    assert flows.expanded < 10


@pytest.mark.parametrize("order", ORDERS)
def test_bounds_are_as_tight_as_they_were(order):
    """Bounds that are looser find the same, by more work: twice as wide, 16 beginnings, not 12."""
    R = tower(Everywhere(rules.Zero()), 2, 6, 8, 7, 9)
    assert R.top("convs.0", *LAYERS, k=3, order=order).expanded <= 13
    if order != "smallest":
        R = tower(Everywhere(rules.Gamma(0.25)), 2, 6, 8, 7, 9)
        assert R.top("convs.0", *LAYERS, k=3, order=order).expanded <= 26
    model, x = linear_layers()
    R = nrm.Explainer(model, Everywhere(rules.Gamma(0.25)))(x, target=0)
    flows = R.top("0", "2", "4", "input", k=1, by="neuron", order=order)
    assert flows.expanded == 3  # of neurons the best continuation is known: no step is in vain


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("work", [1, 2, 5])
def test_a_search_that_stops_says_the_gap(work, order):
    R = tower(Everywhere(rules.Zero()), 2, 6, 8, 7, 9)
    layers = ["convs.0", *LAYERS]
    best = sorted(R.joint(*layers)[0].flatten().tolist(), key=ORDERS[order], reverse=True)[:4]
    stopped = R.top(*layers, k=4, order=order, work=work)
    assert len(stopped) == 4
    key = ORDERS[order]
    for flow in stopped:
        assert float(R(*flow.sets)) == pytest.approx(flow.relevance, abs=1e-11)
    # Nothing that is not listed goes beyond the last one listed by more than the gap.
    assert key(best[0]) <= key(stopped[-1].relevance) + stopped.gap + 1e-12 or math.isclose(
        best[0], stopped[0].relevance
    )
    listed = {f.relevance for f in stopped}
    others = [v for v in best if not any(math.isclose(v, r, rel_tol=1e-9) for r in listed)]
    for value in others:
        assert key(value) <= key(stopped[-1].relevance) + stopped.gap + 1e-12
    if work == 1:
        assert not stopped.exact
        assert 0 < stopped.gap < math.inf
    assert R.top(*layers, k=4, order=order, seconds=1e-9).expanded <= 4


def test_progress_is_told_with_the_gap_that_is_left():
    R = tower(Everywhere(rules.Zero()), 2, 6, 8, 7, 9)
    gaps = []
    flows = R.top("convs.0", *LAYERS, progress=gaps.append)
    assert len(gaps) == flows.expanded
    assert gaps[-1] == flows.gap == 0
    assert R.top("convs.0", *LAYERS, progress=True)[0] == flows[0]


@pytest.mark.parametrize("rule", [rules.Occlusion(), rules.LocalLinear()], ids=repr)
def test_without_bounds_all_beginnings_are_followed(rule):
    """Rules that cannot tell absolute sizes: exact nevertheless, and no gap is known."""
    R = tower(Everywhere(rule), 2, 3, 4, 3, 3)
    layers = ["convs.0", "convs.2", "convs.3"]
    flows = R.top(*layers, k=5)
    best = R.joint(*layers)[0].flatten().topk(5).values.tolist()
    assert flows.exact
    assert [f.relevance for f in flows] == pytest.approx(best, rel=1e-9)
    if isinstance(rule, rules.Occlusion):
        assert R.top(*layers, k=5, work=1).gap == math.inf


def test_operations_without_a_row_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4), nn.Softmin(1), nn.Linear(4, 3)
    )
    model.double().eval()
    R = nrm.Explainer(model, fallback=LocalLinear())(torch.randn(1, 4).double(), target=0)
    flows = R.top("0", "2", "input", k=3, by="neuron")
    best = R.joint("0", "2", "input", by="neuron")[0].flatten().topk(3).values.tolist()
    assert [f.relevance for f in flows] == pytest.approx(best, rel=1e-9)


def test_ties_give_the_same_values():
    """Channels twice over: each best combination is there four times."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        for layer, parents in ((model[0], False), (model[2], True), (model[4], True)):
            if layer is not model[4]:
                half = len(layer.weight) // 2
                layer.weight[half:], layer.bias[half:] = layer.weight[:half], layer.bias[:half]
            if parents:
                half = layer.weight.shape[1] // 2
                layer.weight[:, half:] = layer.weight[:, :half]
    R = nrm.Explainer(model.double().eval())(torch.randn(1, 3).double(), target=0)
    for order in ORDERS:
        flows = R.top("0", "2", "input", k=8, by="neuron", order=order)
        table = R.joint("0", "2", "input", by="neuron")[0].flatten().tolist()
        best = sorted(table, key=ORDERS[order], reverse=True)[:8]
        assert [f.relevance for f in flows] == pytest.approx(best, abs=1e-12)
        assert flows[0].relevance == pytest.approx(flows[3].relevance)


def test_sets_as_parts_which_may_overlap():
    R = tower(Everywhere(rules.Gamma(0.25)), 2, 6, 8, 7, 9)
    upper = [nrm.patch("convs.3", slice(a, a + 3), slice(b, b + 3)) for a in (0, 2) for b in (1, 3)]
    lower = [nrm.channels("convs.1", 0, c) for c in range(1, 5)]
    everything = {
        (a, m, b): float(R(upper[a], nrm.channels("convs.2", m), lower[b]))
        for a in range(4)
        for m in range(7)
        for b in range(4)
    }
    for order in ORDERS:
        flows = R.top(upper, "convs.2", lower, k=6, order=order)
        check_values = sorted(everything.values(), key=ORDERS[order], reverse=True)[:6]
        assert flows.exact
        assert [f.relevance for f in flows] == pytest.approx(check_values, abs=1e-12)
        for flow in flows:
            assert everything[tuple(flow.parts.values())] == pytest.approx(flow.relevance)


def test_the_greedy_search_follows_the_best_of_each_layer():
    """The best unit of the top is not on the best flow: two of its parents cancel."""
    model = nn.Sequential(
        nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False), nn.Identity(),
        nn.Linear(2, 1, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(3, 1))
        model[2].weight.copy_(torch.tensor([[0.4, 0.3, 0.3], [0.0, 0.9, 0.0]]))
        model[4].weight.fill_(1.0)
    R = nrm.Explainer(model.eval(), Everywhere(rules.Zero()))(torch.ones(1, 1), target=0)
    greedy, exact = (R.top("2", "0", k=1, method=way)[0] for way in ("greedy", "exact"))
    assert (greedy.parts, exact.parts) == ({"2": 0, "0": 0}, {"2": 1, "0": 1})
    assert greedy.relevance == pytest.approx(0.4 / 1.9)
    assert exact.relevance == pytest.approx(0.9 / 1.9)
    flows = R.top("2", "0", k=2, method="greedy")
    assert [f.relevance for f in flows] == pytest.approx([0.9 / 1.9, 0.4 / 1.9])
    assert flows.gap == math.inf
    assert not flows.exact


def test_nodes_and_tokens_are_places_of_an_axis():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3)).double().eval()
    x = torch.randn(2, 5, 8).double()
    R = nrm.Explainer(model)(x, target=1)
    layers = ["input", "0"]
    pairs = R.joint(layers[0], layers[-1], by=0)
    assert pairs.shape == (2, 5, 5)
    sets = [nrm.channels(layers[k], n, axis=0) for k, n in ((0, 2), (-1, 4))]
    torch.testing.assert_close(pairs[:, 2, 4], R(*sets))
    best = R.top(layers[0], layers[-1], k=3, by=0, sample=1)
    expected = pairs[1].flatten().topk(3).values.tolist()
    assert [f.relevance for f in best] == pytest.approx(expected, abs=1e-11)
    assert R.joint(layers[0], layers[-1], by=-1).shape == (2, 8, 8)
    with pytest.raises(QueryError, match="has no axis 2"):
        R.joint(layers[0], layers[-1], by=2)
    with pytest.raises(NeuronSetError, match="number of an axis"):
        R.joint(layers[0], layers[-1], by="token")


def test_a_composite_of_several_rules():
    R = tower(composites.EpsilonGammaBox(-3.0, 3.0), 3, 6, 8, 7, 9)
    layers = ["input", "convs.0", *LAYERS]
    flows = R.top(*layers, k=5)
    expected = R.joint(*layers)[0].flatten().topk(5).values.tolist()
    assert [f.relevance for f in flows] == pytest.approx(expected, abs=1e-11)


# -- what a review found ---------------------------------------------------------------------------


def test_sizes_that_overflow_bound_nothing():
    """LRP-0 through many layers: absolute sizes overflow in single precision."""
    torch.manual_seed(1)
    inner = [layer for _ in range(110) for layer in (nn.Linear(8, 8), nn.Tanh())]
    model = nn.Sequential(nn.Linear(4, 8), *inner, nn.Linear(8, 3)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.kaiming_normal_(parameter)
    R = nrm.Explainer(model, rules.Zero())(torch.randn(1, 4), target=0)
    pairs = R.joint("220", "0")[0]
    assert bool(torch.isfinite(pairs).all())
    for order in ORDERS:
        for by in ("channel", "neuron"):
            flows = R.top("220", "0", k=4, order=order, by=by)
            best = sorted(pairs.flatten().tolist(), key=ORDERS[order], reverse=True)[:4]
            assert [f.relevance for f in flows] == pytest.approx(best, rel=1e-3)
    lists = [[nrm.neurons(layer, i) for i in range(5)] for layer in ("220", "100", "0")]
    flows = R.top(*lists, k=3)
    best = R.joint(*lists)[0].flatten().topk(3).values.tolist()
    assert [f.relevance for f in flows] == pytest.approx(best, rel=1e-3)


def test_relevance_that_overflows_is_refused():
    """Sums that nearly cancel: relevance grows about a thousandfold in each layer."""
    torch.manual_seed(0)
    x, layers = torch.rand(1, 8) + 0.5, []
    h = x
    for _ in range(16):
        layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
        layer.weight.copy_(1000 * torch.randn(8, 8))
        layer.weight -= (layer(h).T - torch.randn(8, 1).sign()) / (8 * h)  # sums of 1 and -1
        layers += [layer, nn.Tanh()]
        h = layers[-1](layer(h))
    R = nrm.Explainer(nn.Sequential(*layers).eval(), rules.Zero())(x, target=0)
    for method in ("exact", "greedy"):
        with pytest.raises(QueryError, match="overflowed"):
            R.top("29", "0", method=method)


def test_a_row_whose_contributions_have_a_sign_of_their_own():
    """Nothing bounds them; the search is exact nevertheless."""
    from nrm.operators import Contribution, WeightedSum, register
    from nrm.rules import Activation

    class Negated(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(size, size))

        def forward(self, input):
            return -(input @ self.weight.T)

    class Row(WeightedSum):
        passes = ("input",)

        def contributions(self, call, values, setting):
            return [
                Contribution(
                    Activation(values[0]),
                    setting.weight("weight", call["weight"]),
                    apply=lambda factor, weight: -(factor @ weight.T),
                    uniform=lambda factor: factor.sum(-1, keepdim=True).expand(-1, 5),
                )
            ]

    register(Row("linear"), Negated)
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.ReLU(), Negated(5), nn.ReLU(), nn.Linear(5, 2)]
    R = nrm.Explainer(nn.Sequential(*layers).double().eval(), Everywhere(rules.ZPlus()))(
        torch.randn(8, 4).double(), target=0
    )
    tables = R.joint("3", "0", "input").flatten(1)
    for sample, table in enumerate(tables):
        flows = R.top("3", "0", "input", k=3, sample=sample)
        best = table.topk(3).values.tolist()
        assert [f.relevance for f in flows] == pytest.approx(best, abs=1e-12)


def test_single_neurons_where_pairs_cannot_be_bounded():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 6)
            self.g, self.h = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.h(torch.relu(self.b(self.a(x)) + self.g(x)))

    torch.manual_seed(0)
    R = nrm.Explainer(Sum().double().eval(), rules.Occlusion())(
        torch.randn(1, 4).double(), target=0
    )
    flows = R.top(":relu", "a", "input", by="neuron", k=4)
    best = R.joint(":relu", "a", "input", by="neuron")[0].flatten().topk(4).values.tolist()
    assert [f.relevance for f in flows] == pytest.approx(best, abs=1e-10)


@pytest.mark.parametrize("product", [torch.mul, lambda a, b: (a[:, :, None] @ b[:, None]).sum(2)])
def test_alphas_may_be_negative(product):
    """Relevance is then of either sign, also under rules that share out nothing negative."""

    class Extreme(rules.Alpha):
        def coefficients(self, gates):
            return [1.5, -0.5]

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            h = torch.relu(self.first(x))
            return self.head(product(self.a(h), self.b(h)))

    torch.manual_seed(0)
    composite = composites.Composite([], rules.ZPlus(), alpha_default=Extreme())
    x = torch.randn(6, 3).double()
    R = nrm.Explainer(Gated().double().eval(), composite)(x, target=0)
    tables = R.joint("first", "b", "input").flatten(1).tolist()
    assert any(value < 0 for table in tables for value in table)
    for sample, table in enumerate(tables):
        for order in ORDERS:
            flows = R.top("first", "b", "input", k=3, order=order, sample=sample)
            best = sorted(table, key=ORDERS[order], reverse=True)[:3]
            assert [f.relevance for f in flows] == pytest.approx(best, abs=1e-10)
