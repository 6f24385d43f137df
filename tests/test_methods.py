"""The named methods: thin queries, checked against the enumeration of all walks."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from support import oracle as o
from support.networks import make
from torch import nn

import nrm
from nrm import methods
from nrm.errors import NeuronSetError, QueryError, TargetError, UnknownLayerError

LAYERS = {
    "MLP": ["layers.1", "layers.3", "input"],
    "Concat": ["squeeze", ":relu@2", "small"],
    "Residual": ["norm", ":relu", "first"],
}


def half(R, layer, rng):
    """Half of a layer's neurons at random: for nrm, and for the oracle."""
    shape = R.graph.variable(layer).shape[1:]
    bits = rng.random(int(np.prod(shape))) < 0.5
    bits[rng.integers(len(bits))] = True
    chosen = nrm.mask(layer, torch.tensor(bits).view(shape))
    return chosen, {(layer, int(i)) for i in np.flatnonzero(bits)}


@pytest.fixture(params=LAYERS, scope="module")
def case(request):
    """A measure, for each sample all walks, and three neuron sets as such and for the oracle."""
    made = make(request.param, "gamma", False, seed=3)
    R = nrm.Explainer(made.model, made.composite)(*made.inputs, target=1)
    rng = np.random.default_rng(4)
    sets = [half(R, layer, rng) for layer in LAYERS[request.param]]
    return R, [net.walks(1) for net in made.oracles], *zip(*sets, strict=True)


def check(found, expected):
    """`found` by sample, against a function of each sample's walks."""
    np.testing.assert_allclose(np.asarray(found), np.array(expected), atol=1e-10)


def test_heatmaps(case):
    R, walks, (a, b, _), (in_a, in_b, _) = case
    size = R.heatmap()[0].numel()

    def expected(*picked):
        return [o.marginal(w, "input", size, *picked) for w in walks]

    check(methods.lrp(R).flatten(1), expected())
    check(methods.crp(R, a).flatten(1), expected(in_a))
    check(methods.crp(R, a, b).flatten(1), expected(in_a, in_b))
    known = np.array([[o.relevance(w, in_a, in_b)] for w in walks])
    divided = np.where(known == 0, 0, expected(in_a, in_b) / np.where(known == 0, 1, known))
    check(methods.crp(R, a, b, conditional=True).flatten(1), divided)


def test_bypass_unites_a_concept_with_what_lies_beside_it(case):
    R, walks, (a, b, _), (in_a, in_b, _) = case
    size = R.heatmap()[0].numel()
    places = {name for name, _ in in_a | in_b}
    shut = [
        [(v, r) for v, r in w if not {n for n in v if n[0] in places} - in_a - in_b] for w in walks
    ]
    expected = np.array([o.marginal(w, "input", size) for w in shut])
    check(methods.crp(R, a, b, bypass=True).flatten(1), expected)
    known = np.array([[o.relevance(w)] for w in shut])
    divided = np.where(known == 0, 0, expected / np.where(known == 0, 1, known))
    check(methods.crp(R, a, b, bypass=True, conditional=True).flatten(1), divided)


def test_sets(case):
    R, walks, sets, picked = case
    check(methods.conrel(R, sets[0]), [o.relevance(w, picked[0]) for w in walks])
    check(methods.subgraph(R, *sets), [o.relevance(w, *picked) for w in walks])
    a, b, c = sets
    visits = [[(r, [bool(v & p) for p in picked]) for v, r in w] for w in walks]
    check(
        methods.symbxai(R, a & ~(b | c)),
        [sum(r for r, (x, y, z) in w if x and not (y or z)) for w in visits],
    )
    check(
        methods.symbxai(R, a, given=[b]) * R(b),
        [sum(r for r, (x, y, _) in w if x and y) for w in visits],
    )
    dividends = methods.harsanyi(R, *sets)
    for held in itertools.product([False, True], repeat=3):
        key = frozenset(s for s, yes in zip(sets, held, strict=True) if yes)
        exactly = [sum(r for r, seen in w if tuple(seen) == held) for w in visits]
        check(dividends.get(key, torch.zeros(2)), exactly)
    check(sum(dividends.values()), [1, 1])
    inside = set().union(*picked)
    share = [sum(r * len(v & inside) for v, r in w) / 7 for w in walks]
    check(methods.additive(R, *sets, layers=7), share)


def test_walks_and_their_originals():
    made = make("MLP", "plain-gamma", False, seed=3, nonnegative=True)
    R = nrm.Explainer(made.model, made.composite)(*made.inputs, target=1)
    visited, _ = max(made.oracles[0].walks(1), key=lambda walk: walk[1])
    steps = {name: i for name, i in visited if name != "layers.4"}
    for normalized in (True, False):
        walks = [dict(net.walks(1, normalized)) for net in made.oracles]
        found = methods.walk(R, steps, normalized=normalized)
        check(found, [w[visited] for w in walks])
        assert found.abs().max() > 0
    one = nrm.neurons("layers.1", 1)
    check(methods.subgraph(R, one, normalized=False), R(one, normalized=False))


class Chain(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(20, 3),
        )  # fmt: skip


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3)
        self.branch = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3 * 16, 2)

    def forward(self, x):
        h = torch.relu(self.stem(x))
        return self.head(torch.relu(self.branch(h) + h).flatten(1))


@pytest.fixture(scope="module")
def explainer():
    torch.manual_seed(0)
    return nrm.Explainer(Chain().double().eval(), nrm.composites.EpsilonPlus())


@pytest.fixture(scope="module")
def images():
    return torch.rand(7, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", ["normalized", "logit"])
@pytest.mark.parametrize("batches", ["one", "several", "dictionaries"])
def test_relmax_over_batches_the_last_of_one(explainer, images, batches, scale):
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    R = explainer(images, target=labels)
    concept = nrm.channels("2", 1, 3)
    split = images.split(3)  # 3, 3, 1
    given = {
        "one": lambda: images,
        "several": lambda: (x for x in split),
        "dictionaries": lambda: [{"input": x} for x in split],
    }[batches]
    units = R.scale if scale == "logit" else torch.ones_like(R.scale)
    values, indices = methods.relmax(explainer, given(), concept, labels, k=4, scale=scale)
    order = (R(concept) * units).argsort(descending=True)[:4]
    torch.testing.assert_close(indices, order)
    torch.testing.assert_close(values, (R(concept) * units)[order])
    by_channel = methods.relmax(explainer, given(), "2", labels, k=100, scale=scale)
    table = R.channels("2") * units[:, None]
    assert by_channel.indices.shape == (7, 5)
    torch.testing.assert_close(
        by_channel.indices, table.argsort(dim=0, descending=True, stable=True)
    )
    torch.testing.assert_close(by_channel.values, table.sort(0, descending=True).values)


def test_relmax_finds_each_samples_own_target():
    """Wherever the batch lies, and however many samples there are to a call."""
    torch.manual_seed(0)

    class Series(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):  # [time, batch, features]
            return self.b(torch.relu(self.a(x)).sum(0))

    model, x = Series().double().eval(), torch.rand(2, 6, 3).double()
    targets = [0, 1, 1, 0, 1, 0]
    explainer = nrm.Explainer(model, batch_axis=1)
    concept = nrm.mask("output", torch.tensor([False, True]))
    values, indices = methods.relmax(explainer, x.split(4, 1), concept, targets, k=6)
    assert values.tolist() == [1, 1, 1, 0, 0, 0]
    assert indices.tolist() == [1, 2, 4, 0, 3, 5]
    alone = nrm.Explainer(model, batch_axis=None)
    graphs = [x[:, k : k + 1] for k in range(6)]
    rows = [(0, target) for target in targets]
    found = methods.relmax(alone, graphs, nrm.neurons("output", (0, 1)), rows, k=3)
    assert found.indices.tolist() == [1, 2, 4]
    with pytest.raises(QueryError, match="7 targets for 6"):
        methods.relmax(explainer, x, concept, [*targets, 1])
    with pytest.raises((QueryError, TargetError)):
        methods.relmax(explainer, x.split(4, 1), concept, targets[:5])


def test_conditions_are_checked(explainer, images):
    for conditions, error in (
        ({"2": [3]}, QueryError),
        ([{"2": "3"}], QueryError),
        ([{"2": [1.0]}], QueryError),
        ([{"2": [True, False]}], QueryError),
        ([{"2": None}], QueryError),
        ([{"2": slice(3)}], QueryError),
        ([["2", 3]], QueryError),
        ([{"y": []}], QueryError),
        ([{"y": 3}], TargetError),
        ([{"2": [5]}], NeuronSetError),
        ([{"nowhere": [1]}], UnknownLayerError),
        ([{"nowhere": []}], UnknownLayerError),
        ([{"y": [0, 99]}], TargetError),
        ([{"y": [0, -1]}], TargetError),
    ):
        with pytest.raises(error):
            methods.crp_conditions(explainer, images, conditions)


def test_conditions_as_zennit_crp_takes_them(explainer, images):
    """Its masks are `mask[channels] = 1`: one number, an array, a number twice, from the end."""
    x = images[:2]
    R = explainer(x, target=1)
    a = R.heatmap(nrm.channels("2", 3))
    for one in (3, np.int64(3), [3], (3,), [3, 3], torch.tensor([3]), np.array([3]), {3}, [-2]):
        for y in (1, [1], torch.tensor(1), np.array([1]), [1, 1]):
            (found,) = methods.crp_conditions(explainer, x, [{"2": one, "y": y}])
            torch.testing.assert_close(found, a)
    two = methods.crp_conditions(explainer, x, [{"2": [np.int64(3), torch.tensor(0)], "y": 1}])[0]
    torch.testing.assert_close(two, R.heatmap(nrm.channels("2", 0, 3)))


def test_an_empty_condition_masks_the_layer(explainer, images):
    x = images[:2]
    conditions = [{"y": 1}, {"y": 1, "2": []}, {"2": [3], "y": 1}, {"0": [1], "2": [], "y": 1}]
    for options in ({}, {"exclude_parallel": False}, {"conditional": True}, {"scale": "logit"}):
        found = methods.crp_conditions(explainer, x, conditions, **options)
        assert not found[1].any()  # a chain: all walks visit the layer
        assert not found[3].any()
        assert bool(found[0].any())
        assert bool(found[2].any())


def test_an_empty_condition_beside_a_skip_connection(images):
    torch.manual_seed(2)
    explainer = nrm.Explainer(Skip().double().eval(), nrm.composites.GammaFlat())
    R = explainer(images, target=0)
    branch = nrm.neurons("branch")
    masked = [{"branch": [], "y": 0}]
    alone = methods.crp_conditions(explainer, images, masked)[0]
    assert not alone.any()  # as zennit-crp with exclude_parallel=True: only through the layer
    (past,) = methods.crp_conditions(explainer, images, masked, exclude_parallel=False)
    torch.testing.assert_close(past, R.heatmap() - R.heatmap(branch))
    torch.testing.assert_close(past.sum((1, 2, 3)), 1 - R(branch))
    (share,) = methods.crp_conditions(
        explainer, images, masked, exclude_parallel=False, conditional=True
    )
    torch.testing.assert_close(share.sum((1, 2, 3)), torch.ones(len(images)).double())


def test_relmax_targets(explainer, images):
    of_one = methods.relmax(explainer, images.split(3), "2", 1, k=2)
    torch.testing.assert_close(of_one, methods.relmax(explainer, images, "2", [1] * 7, k=2))
    largest = methods.relmax(explainer, images.split(3), "2", k=2)
    torch.testing.assert_close(largest, methods.relmax(explainer, images, "2", k=2))
    with pytest.raises(QueryError, match="empty"):
        methods.relmax(explainer, [], "2")
    with pytest.raises(QueryError, match="positive"):
        methods.relmax(explainer, images, "2", k=0)
    with pytest.raises(TargetError):
        methods.relmax(explainer, images.split(3), "2", [1, 2, 0, 1])
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    expected = methods.relmax(explainer, images[:6], "2", labels)
    for pairs in (images[:6].split(2), images[:6].split(6)):
        found = methods.relmax(explainer, pairs, "2", labels.numpy())
        torch.testing.assert_close(found, expected)
    with pytest.raises(QueryError, match="one for each sample"):  # each two would be the same
        methods.relmax(explainer, images[:6].split(2), "2", (0, 2))


def test_conditions_keep_their_order(explainer, images):
    x = images[:2]
    conditions = [
        {"2": [4, 0], "y": [1]},
        {"0": [1], "2": [3], "y": [2]},
        {"y": [1]},
        {"2": [4, 0], "y": [0, 2]},
        {"0": [1]},
    ]
    found = methods.crp_conditions(explainer, x, conditions)
    a, b, c = nrm.channels("2", 4, 0), nrm.channels("0", 1), nrm.channels("2", 3)
    one, two = explainer(x, target=1), explainer(x, target=2)
    logits = one.output * torch.tensor([1.0, 0, 1.0])
    several = explainer(x, output_relevance=logits)
    expected = [one.heatmap(a), two.heatmap(b, c), one.heatmap(), several.heatmap(a)]
    torch.testing.assert_close(found, torch.stack([*expected, explainer(x).heatmap(b)]))
    scaled = methods.crp_conditions(explainer, x, conditions[:1], scale="logit")[0]
    torch.testing.assert_close(scaled, one.heatmap(a) * one.scale.view(2, 1, 1, 1))
    given = methods.crp_conditions(explainer, [x], conditions[:1], conditional=True)[0]
    torch.testing.assert_close(given, one.heatmap(given=a))
    with pytest.raises(QueryError, match="no conditions"):
        methods.crp_conditions(explainer, x, [])


@pytest.mark.parametrize("head", [nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid()], ids=repr)
def test_several_outputs_are_explained_behind_a_head(explainer, images, head):
    """As a single one is: by the logits, in their units, and never by probabilities."""
    conditions = [{"y": [0]}, {"y": [0, 2]}, {"2": [4, 0], "y": [1, 2]}]
    through = nrm.Explainer(nn.Sequential(*explainer.model, head).eval(), explainer.composite)
    for scale in ("logit", "normalized"):
        expected = methods.crp_conditions(explainer, images[:2], conditions, scale=scale)
        found = methods.crp_conditions(through, images[:2], conditions, scale=scale)
        torch.testing.assert_close(found, expected)


def test_conditions_beside_a_skip_connection(images):
    torch.manual_seed(2)
    explainer = nrm.Explainer(Skip().double().eval(), nrm.composites.GammaFlat())
    R = explainer(images, target=0)
    branch = nrm.channels("branch", 1)
    conditions = [{"branch": [1], "y": [0]}]
    alone = methods.crp_conditions(explainer, images, conditions)[0]
    torch.testing.assert_close(alone, R.heatmap(branch))
    united = methods.crp_conditions(explainer, images, conditions, exclude_parallel=False)[0]
    torch.testing.assert_close(united, R.heatmap(within=branch))
    skip = 1 - R("branch")
    torch.testing.assert_close(united.sum((1, 2, 3)), alone.sum((1, 2, 3)) + skip)


def test_scale(explainer, images):
    R = explainer(images, target=2)
    a, b = nrm.channels("0", 1), nrm.channels("2", 3)
    wide = R.scale.view(-1, 1, 1, 1)
    for found, expected in [
        (methods.lrp(R, scale="logit"), R.heatmap() * wide),
        (methods.conrel(R, "2", scale="logit"), R.channels("2") * R.scale[:, None]),
        (methods.crp(R, a, b, scale="logit"), R.heatmap(a, b) * wide),
        (methods.symbxai(R, a & ~b, scale="logit"), R(a & ~b) * R.scale),
        (methods.additive(R, a, b, scale="logit"), R.additive(a, b) * R.scale),
    ]:
        torch.testing.assert_close(found, expected)
    with pytest.raises(QueryError, match="'normalized', 'logit' or 'original'"):
        methods.lrp(R, scale="probability")
    with pytest.raises(QueryError, match="at least one concept"):
        methods.crp(R)


def test_each_method_equals_its_definition():
    """The rows of docs/methods.md that need no other library."""
    from benchmarks.methods.chain import chain_rows
    from benchmarks.methods.graph import graph_rows
    from benchmarks.methods.table import methods_table

    rows = [*chain_rows(), *graph_rows()]
    assert max(row.deviation for row in rows) < 1e-12
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    for line in methods_table(rows).splitlines():
        assert line.rpartition("| ")[0].rpartition("| ")[0] in page  # all but the deviation
