"""Walks through blocks: against walks enumerated by hand, re-execution, and laws."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from support.blocks import CASES, IDS, MASK, Pictures, Words, case, drawn, pictures, seeded
from torch import Tensor, nn

import nrm
from nrm import rules
from nrm.errors import NeuronSetError, QueryError, UnknownLayerError

pytestmark = pytest.mark.usefixtures("captured_once")


# -- walks enumerated by hand ----------------------------------------------------------------------


class Three(nn.Module):
    """Three rectified layers and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.ra = nn.Linear(3, 5), nn.ReLU()
        self.b, self.rb = nn.Linear(5, 4), nn.ReLU()
        self.c, self.rc = nn.Linear(4, 3), nn.ReLU()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rc(self.c(self.rb(self.b(self.ra(self.a(x)))))))


def walks_of(model: Three, x: Tensor, removed: list[int], target: int) -> Tensor:
    """`[5, 4, 3]`, f(x) times the relevance of every walk above `ra` when a set is removed.

    Each walk is the difference of its lowest neuron times weights and slopes between two runs.
    """
    now = model.ra(model.a(x))
    then = now.clone()
    then[removed] = 0
    found = torch.zeros(5, 4, 3, dtype=torch.float64)
    z, z0 = model.b(now), model.b(then)
    u, u0 = model.c(z.relu()), model.c(z0.relu())

    def slope(one: Tensor, other: Tensor) -> float:
        if one == other:
            return 0.0  # relevance of no walk: the neuron is the same in both
        return float(((one.relu() - other.relu()) / (one - other)).detach())

    for i, j, k in itertools.product(range(5), range(4), range(3)):
        found[i, j, k] = (
            (now[i] - then[i])
            * model.b.weight[j, i]
            * slope(z[j], z0[j])
            * model.c.weight[k, j]
            * slope(u[k], u0[k])
            * model.head.weight[target, k]
        )
    return found.detach()


SETS = ([0, 2], [1], [4])  # of the five neurons of `ra`; one of them is in none


@pytest.mark.parametrize("seed", range(4))
def test_every_walk_by_hand(seed: int) -> None:
    model = seeded(Three, seed)
    x = drawn(3, seed=seed)
    R = nrm.Explainer(model)(x[None], target=1)
    blocks = nrm.Blocks(R, [nrm.neurons("ra", *chosen) for chosen in SETS])
    walks = torch.stack([walks_of(model, x, chosen, 1) for chosen in SETS]) / R.scale
    for layer, axes in (("rb", (1, 3)), ("rc", (1, 2))):
        torch.testing.assert_close(
            blocks.joint(layer, by="neuron")[0], walks.sum(axes), rtol=1e-10, atol=1e-12
        )
    torch.testing.assert_close(
        blocks.joint("rb", "rc", by="neuron")[0], walks.sum(1), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(
        blocks.joint("rc", "rb", by="neuron")[0].movedim(1, 2), walks.sum(1), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(blocks.marginal("ra")[0], walks.sum((0, 2, 3)))
    torch.testing.assert_close(blocks.each()[0], walks.sum((1, 2, 3)))
    b, c = nrm.neurons("rb", 1, 3), nrm.neurons("rc", 0)
    torch.testing.assert_close(blocks(b & c)[0], walks[:, :, [1, 3], 0].sum())
    torch.testing.assert_close(
        blocks(b | c)[0], walks[:, :, [1, 3]].sum() + walks[:, :, [0, 2], 0].sum()
    )
    torch.testing.assert_close(blocks.each(b, c)[0], walks[:, :, [1, 3], 0].sum((1, 2)))
    # A part of a set of the layer, and what visits neither.
    inside = nrm.neurons("ra", 2)
    torch.testing.assert_close(blocks(inside, c)[0], walks[:, 2, :, 0].sum())
    torch.testing.assert_close(
        blocks(~inside & ~c)[0], 1 - walks[:, 2].sum() - walks[:, [0, 1, 3, 4], :, 0].sum()
    )
    torch.testing.assert_close(
        blocks(inside, given=c)[0], torch.nan_to_num(walks[:, 2, :, 0].sum() / walks[..., 0].sum())
    )


def test_where_nothing_bends_it_is_the_measure() -> None:
    """Of a network that is linear above the layer and has no bias, block walks are LRP-0's."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False),
                                         nn.Linear(5, 3, bias=False)))  # fmt: skip
    R = nrm.Explainer(model, rules.Zero())(drawn(2, 4), target=0)
    blocks = nrm.Blocks(R, "1", by="neuron")
    torch.testing.assert_close(blocks.joint("2", by="neuron"), R.joint("1", "2", by="neuron"))
    torch.testing.assert_close(blocks.rest, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(blocks.heatmap(nrm.neurons("2", 3)), R.heatmap(nrm.neurons("2", 3)))


def test_a_block_of_one_layer_is_occlusion() -> None:
    """`phi(z_j) - phi(z_j - z_ij)` (section 3.5.3), where what lies above is linear."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)))
    x = drawn(3, 4)
    occluded = nrm.Explainer(model, rules.Occlusion(rest_to_bias=True), bias="input")
    R = occluded(x, target=2)
    blocks = nrm.Blocks(nrm.Explainer(model)(x, target=2), "input", by="neuron")
    expected = R.joint("input", "1", by="neuron")
    found = blocks.joint("1", by="neuron")
    active = (model[:2](x) > 0).unsqueeze(1).expand_as(found)
    torch.testing.assert_close(found[active], expected[active])
    assert float(expected.abs().max()) > 0.01
    # What is silent has no relevance to hand on from layer to layer, and may wake here.
    assert not expected[~active].any()
    assert bool(found[~active].any())


# -- re-execution, whatever the network ------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_each_is_what_the_network_loses(name: str) -> None:
    """Of every sample, against `Interventions`, which run the captured graph plainly."""
    model, inputs, R, blocks = case(name)
    explainer = nrm.Explainer(model)
    _, _, layer, by = CASES[name]
    for sample in range(2):
        one = [x[sample : sample + 1] for x in inputs]
        runs = nrm.Interventions(explainer, *one, target=1)
        sets = nrm.evaluation.Families(explainer(*one, target=1), [layer], by).sets[0]
        lost = runs.output - runs.without([[chosen] for chosen in sets])
        torch.testing.assert_close(blocks.each()[sample] * R.scale[sample], lost)
        assert float(lost.abs().max()) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_cuts_are_complete(name: str) -> None:
    """Over every cut above the layer, neurons have what the set has; the rest makes it one."""
    _, _, R, blocks = case(name)
    each = blocks.each()
    above = [v for v in blocks.graph.cuts if v.producer is not None]
    assert len(above) > 1
    for variable in above:
        found = blocks.marginal(variable.name)
        per_sample = variable.per_sample(found.unsqueeze(0), 2)[0]
        torch.testing.assert_close(per_sample, each.sum(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(each.sum(1) + blocks.rest, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(blocks(), torch.ones(2, dtype=torch.float64))
    for given in R.graph.inputs:
        below = blocks.marginal(given.name)
        inside = R.graph.variable(CASES[name][2])
        if inside is given or inside in R.graph.cuts:
            torch.testing.assert_close(below.flatten(1).sum(1), each.sum(1))


@pytest.mark.parametrize("name", CASES)
def test_memory_decides_nothing(name: str) -> None:
    """One set at a time, each sample alone, and all together are the same."""
    model, inputs, R, blocks = case(name)
    _, _, layer, by = CASES[name]
    above = blocks.graph.cuts[1].name
    few = nrm.Blocks(R, layer, by=by, memory=1)
    torch.testing.assert_close(few.each(), blocks.each(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(few.marginal(above), blocks.marginal(above), rtol=1e-10, atol=1e-12)
    joint = blocks.joint(above)
    torch.testing.assert_close(few.joint(above), joint, rtol=1e-10, atol=1e-12)
    for sample in range(2):
        one = nrm.Explainer(model, nrm.composites.LRPZero())(
            *(x[sample : sample + 1] for x in inputs), target=1
        )
        alone = nrm.Blocks(one, layer, by=by).joint(above)
        torch.testing.assert_close(alone[0], joint[sample], rtol=1e-9, atol=1e-11)


def test_above_the_layer_it_is_a_reference() -> None:
    """The part above as a model of its own, explained with the removed activations as reference."""

    class Upper(nn.Module):
        def __init__(self, whole: Words) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, h: Tensor, mask: Tensor) -> Tensor:
            return self.whole.above(h, mask)

    model = seeded(Words)
    R = nrm.Explainer(model)(IDS, MASK, target=2)
    blocks = nrm.Blocks(R, [nrm.channels("words", t, axis=0) for t in range(4)])
    h = model.words(IDS).detach()
    explainer = nrm.Explainer(Upper(model).eval())
    for layer in ("up", "out", "qkv"):
        found = blocks.joint([nrm.channels(layer, 1), nrm.channels(layer, 0, 3)])
        for token in range(4):
            reference = h.clone()
            reference[:, token] = 0
            upper = explainer(h, MASK, target=2, reference={"h": reference})
            for place, chosen in enumerate(((1,), (0, 3))):
                expected = upper(nrm.channels(f"whole.{layer}", *chosen)) * upper.scale / R.scale
                torch.testing.assert_close(found[:, token, place], expected, rtol=1e-9, atol=1e-12)


def test_a_graph_of_one_sample() -> None:
    """Without a batch axis every set takes a run of its own."""

    class Nodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            h = torch.relu(adjacency @ self.one(x))
            return self.head(torch.relu(adjacency @ self.two(h)).sum(0))[None]

    model = seeded(Nodes)
    x, adjacency = drawn(5, 2), torch.eye(5, dtype=torch.float64).roll(1, 0) + torch.eye(5)
    explainer = nrm.Explainer(model, batch_axis=None)
    R = explainer(x, adjacency, target=(0, 1))
    blocks = nrm.Blocks(R, "one", by=0)
    runs = nrm.Interventions(explainer, x, adjacency, target=(0, 1))
    lost = runs.output - runs.without([[nrm.channels("one", n, axis=0)] for n in range(5)])
    torch.testing.assert_close(blocks.each()[0] * R.scale, lost)
    table = blocks.joint("two", by=0)
    torch.testing.assert_close(table.sum(-1), blocks.each())
    assert table.shape == (1, 5, 5)


# -- what may be asked -----------------------------------------------------------------------------


def test_laws_of_formulas() -> None:
    _, blocks = pictures()
    a, b, c = nrm.channels("stem", 1), nrm.channels("two", 0, 2), nrm.patch("one", 0, slice(0, 3))
    one = blocks()
    torch.testing.assert_close(blocks(~a), one - blocks(a))
    torch.testing.assert_close(blocks(a & b) + blocks(a & ~b), blocks(a))
    torch.testing.assert_close(blocks(b | c), blocks(b) + blocks(c) - blocks(b, c))
    torch.testing.assert_close(blocks(b ^ c), blocks(b & ~c) + blocks(~b & c))
    torch.testing.assert_close(blocks(a, given=b) * blocks(b), blocks(a, b))
    torch.testing.assert_close(blocks.each(c)[:, 1], blocks(a, c))
    torch.testing.assert_close(blocks.each(c, given=b)[:, 1], blocks(a, c, given=b))
    torch.testing.assert_close(blocks(~c, given=~b), blocks(~c & ~b) / blocks(~b))
    torch.testing.assert_close(
        blocks.marginal("two", a, given=c),
        blocks.marginal("two", a, c) / blocks(c)[:, None, None, None],
    )


def test_joint_tables_agree_with_single_queries() -> None:
    _, blocks = pictures()
    c = nrm.channels("two", 0)
    table = blocks.joint("bn", c)
    assert table.shape == (2, 4, 4)
    for a, b in itertools.product(range(4), range(4)):
        asked = blocks(nrm.channels("stem", a), nrm.channels("bn", b), c)
        torch.testing.assert_close(table[:, a, b], asked)
    torch.testing.assert_close(blocks.joint("bn", given=c), table / blocks(c)[:, None, None])
    sets = [nrm.channels("two", 0, 1), nrm.channels("two", 3)]
    whole = blocks.joint("two")
    torch.testing.assert_close(
        blocks.joint(sets), torch.stack([whole[..., :2].sum(-1), whole[..., 3]], -1)
    )


def test_sets_that_differ_by_sample() -> None:
    R, _ = pictures()
    shape = R.activations("stem").shape
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
    blocks = nrm.Blocks(R, [nrm.mask("stem", chosen), nrm.mask("stem", ~chosen)])
    above = torch.rand(R.activations("two").shape, generator=torch.Generator().manual_seed(3)) < 0.5
    found = blocks.joint([nrm.mask("two", above)])[:, :, 0]
    explainer = nrm.Explainer(seeded(Pictures))
    for sample in range(2):
        one = explainer(drawn(2, 2, 6, 6)[sample : sample + 1], target=1)
        parts = [nrm.mask("stem", m[sample]) for m in (chosen, ~chosen)]
        alone = nrm.Blocks(one, parts).each(nrm.mask("two", above[sample]))
        torch.testing.assert_close(found[sample], alone[0])


@pytest.mark.parametrize("order", ["largest", "smallest", "absolute"])
def test_top_is_the_best_of_all(order: str) -> None:
    _, blocks = pictures()
    avoided = ~nrm.channels("two", 1)
    for layers, given in ((("two",), None), (("bn", "two"), None), (("bn",), avoided)):
        table = blocks.joint(*layers, *([] if given is None else [given]))
        table = table if given is None else table / blocks(given)[:, None, None]
        flows = blocks.top(*layers, k=4, order=order, sample=1, given=given)
        keys = {"largest": table[1], "smallest": -table[1], "absolute": table[1].abs()}[order]
        best = keys.flatten().topk(4).indices
        torch.testing.assert_close(
            torch.tensor([flow.relevance for flow in flows], dtype=torch.float64),
            table[1].flatten()[best],
        )
        assert flows.exact
        (first, *_) = flows
        index = tuple(first.parts.values())
        assert list(first.parts) == ["stem", *layers]
        torch.testing.assert_close(float(table[1][index]), first.relevance)
        if given is None:
            torch.testing.assert_close(
                first.share, float(table[1][index] / table[1].sum()), rtol=1e-9, atol=1e-12
            )
            asked = blocks(*first.sets)[1]
            torch.testing.assert_close(float(asked), first.relevance)


def test_targets_and_heads() -> None:
    model = seeded(Pictures)
    x = drawn(2, 2, 6, 6)
    explainer = nrm.Explainer(model)
    R = explainer(x, target=1)
    blocks = nrm.Blocks(R, "stem")
    other = blocks.of(nrm.Contrast(0, 2))
    expected = nrm.Blocks(R.of(0), "stem").joint("two") * R.of(0).scale[:, None, None]
    expected = expected - nrm.Blocks(R.of(2), "stem").joint("two") * R.of(2).scale[:, None, None]
    torch.testing.assert_close(other.joint("two") * other.scale[:, None, None], expected)
    logits = model(x).detach()
    given = nrm.Blocks(explainer(x, output_relevance=2 * logits), "stem")
    parts = [
        nrm.Blocks(R.of(t), "stem").joint("two") * R.of(t).scale[:, None, None] for t in range(3)
    ]
    torch.testing.assert_close(given.joint("two") * given.scale[:, None, None], 2 * sum(parts))
    headed = nn.Sequential(model, nn.Softmax(-1)).eval()
    found = nrm.Blocks(nrm.Explainer(headed)(x, target=1), "0.stem")
    torch.testing.assert_close(found.joint("0.two"), blocks.joint("two"))


@pytest.mark.parametrize("removal", ["mean", 0.3, "tensor"])
def test_removal(removal: object) -> None:
    model = seeded(Pictures)
    x = drawn(1, 2, 6, 6)
    explainer = nrm.Explainer(model)
    R = explainer(x, target=1)
    if removal == "tensor":
        removal = {"stem": drawn(4, 6, 6)}
    blocks = nrm.Blocks(R, "stem", removal=removal)
    runs = nrm.Interventions(explainer, x, target=1, removal=removal)
    lost = runs.output - runs.without([[nrm.channels("stem", c)] for c in range(4)])
    torch.testing.assert_close(blocks.each()[0] * R.scale, lost)
    torch.testing.assert_close(blocks.joint("head", by="neuron").sum(-1), blocks.each())
    torch.testing.assert_close(blocks.marginal("head")[0].sum(), lost.sum() / R.scale[0])


def test_evaluated_beside_interventions() -> None:
    explainer = nrm.Explainer(seeded(Pictures))
    x = [drawn(1, 2, 6, 6, seed=s) for s in range(3)]
    found = nrm.evaluate(explainer, x, ["two", "stem"], methods=("joint", "blocks"), ks=(1,))
    assert found.mean("blocks").mean > 0.5
    R = explainer(x[0])
    families = nrm.evaluation.Families(R, ["two", "stem"])
    runs = nrm.Interventions(explainer, x[0], target=R.target)
    torch.testing.assert_close(families.blocks(runs).T, nrm.Blocks(R, "stem").joint("two")[0])


def test_how_walks_go_on_depends_on_the_set() -> None:
    """The backward Markov property does not hold: `R(A, C | B)` is not `R(A | B) R(C | B)`."""
    worst = 0.0
    for seed in range(4):
        R = nrm.Explainer(seeded(Three, seed))(drawn(1, 3, seed=seed), target=1)
        table = nrm.Blocks(R, "ra", by="neuron").joint("rb", "rc", by="neuron")[0]
        through = table / table.sum((0, 2), keepdim=True).clamp(min=1e-3)
        apart = through.sum(2, keepdim=True) * through.sum(0, keepdim=True)
        worst = max(worst, float((through - apart).abs().max()))
    assert worst > 0.01


def test_a_set_that_changes_nothing_has_no_relevance() -> None:
    model = seeded(Three)
    with torch.no_grad():
        model.b.weight[:, 3] = 0
    x = drawn(1, 3)
    blocks = nrm.Blocks(nrm.Explainer(model)(x, target=0), "ra", by="neuron")
    table = blocks.joint("rb", by="neuron")
    assert not table[0, 3].any()
    assert table.isfinite().all()


def test_single_precision_is_normalised() -> None:
    model = seeded(Pictures).float()
    R = nrm.Explainer(model)(drawn(2, 2, 6, 6).float(), target=1)
    blocks = nrm.Blocks(R, "stem")
    torch.testing.assert_close(blocks(), torch.ones(2), atol=1e-5, rtol=0)
    head = blocks.marginal("head").flatten(1).sum(1)
    torch.testing.assert_close(head + blocks.rest, torch.ones(2), atol=1e-5, rtol=0)


def test_shown_copied_and_progress() -> None:
    done: list[int] = []
    R, _ = pictures()
    blocks = nrm.Blocks(R, "stem", progress=done.append, memory=1)
    blocks.each()
    assert sum(done) == 4
    assert "4 sets removed" in repr(blocks)
    assert "stem" in str(blocks)
    assert "<table" in blocks._repr_html_()
    torch.testing.assert_close(pickle.loads(pickle.dumps(blocks)).each(), blocks.each())


# -- what is refused -------------------------------------------------------------------------------


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)) + torch.tanh(self.b(x))


def test_refused() -> None:
    R, blocks = pictures()
    beside = nrm.Explainer(seeded(Beside))(drawn(1, 3), target=1)
    with pytest.raises(NeuronSetError, match="in common"):
        nrm.Blocks(R, [nrm.channels("stem", 0, 1), nrm.channels("stem", 1)])
    with pytest.raises(UnknownLayerError, match="stem"):
        nrm.Blocks(R, "stam")
    with pytest.raises(QueryError, match="what is explained"):
        nrm.Blocks(R, "head")
    with pytest.raises(QueryError, match="only neurons of 'stem' are removed"):
        nrm.Blocks(R, "stem", removal={"two": 0.0})
    with pytest.raises(QueryError, match="removal is"):
        nrm.Blocks(R, "stem", removal="nothing")
    with pytest.raises(QueryError, match="memory"):
        nrm.Blocks(R, "stem", memory=0)
    with pytest.raises(QueryError, match="lies below 'stem'"):
        blocks("input")
    with pytest.raises(UnknownLayerError):
        blocks("nowhere")
    with pytest.raises(QueryError, match="neither within"):
        blocks(nrm.Condition("two", within="two"))
    with pytest.raises(QueryError, match="no walk passes both"):
        nrm.Blocks(beside, "a")("b")
    with pytest.raises(QueryError, match="name a layer above"):
        blocks.top()
    with pytest.raises(QueryError, match="sample"):
        blocks.top("two", sample=2)
    other = nrm.Explainer(seeded(Pictures))(drawn(2, 2, 6, 6), target=1, reference=0.0)
    with pytest.raises(QueryError, match="differences"):
        nrm.Blocks(other, "stem")


def test_a_model_that_has_changed_is_refused() -> None:
    model = seeded(Pictures)
    blocks = nrm.Blocks(nrm.Explainer(model)(drawn(1, 2, 6, 6), target=1), "stem")
    blocks.each()
    with torch.no_grad():
        model.two.weight *= 2
    with pytest.raises(QueryError, match="changed"):
        blocks.each()


# -- beside interventions, and beside the measure --------------------------------------------------


class Sized(nn.Module):
    """A size of the batch in a view, and a constant that is the same for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.places = nn.Parameter(torch.zeros(1, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.a(x.reshape(-1, 4)))
        h = rows.view(x.shape[0], x.shape[1], 5) + self.places.expand(x.shape[0], -1, -1)
        return self.head(torch.relu(h).sum(1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_blocks_and_interventions_on_one_explainer(batch_first: bool) -> None:
    """How a graph holds copies is found once for both, on one sample or on a batch."""
    model, x = seeded(Sized), drawn(3, 2, 4)
    sets = [[nrm.channels("a", c)] for c in range(5)]

    def lost(explainer: nrm.Explainer) -> Tensor:
        runs = nrm.Interventions(explainer, x[:1], target=1)
        return runs.output - runs.without(sets)

    expected = lost(nrm.Explainer(model))
    explainer = nrm.Explainer(model)
    if not batch_first:
        lost(explainer)
    R = explainer(x, target=1)
    torch.testing.assert_close(nrm.Blocks(R, "a").each()[0] * R.scale[0], expected)
    torch.testing.assert_close(lost(explainer), expected)


def test_a_gate_that_takes_nothing_in_the_measure_is_a_layer_above() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            out: Tensor = self.o(self.b(h) * torch.sigmoid(h))
            return out

    torch.manual_seed(0)
    R = nrm.Explainer(Gated().double().eval())(torch.randn(2, 4).double(), target=1)
    blocks = nrm.Blocks(R, ":relu")
    whole = blocks(":sigmoid")
    assert bool((whole != 0).all())
    torch.testing.assert_close(blocks.marginal(":sigmoid").sum(1), whole)
    torch.testing.assert_close(blocks.joint(":sigmoid", by="neuron").sum((1, 2)), whole)
    with pytest.raises(QueryError, match="'a' lies below ':relu'"):
        blocks.joint("a")
    with pytest.raises(QueryError, match="'a' lies below ':relu'"):
        blocks.top("a")
