"""Queries as a user asks them: sets, batches, targets, masks beside skips, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nrm
from nrm import composites, rules
from nrm.composites import Everywhere
from nrm.errors import NeuronSetError, QueryError, TargetError


@pytest.fixture(scope="module")
def R():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    return nrm.Explainer(model.double().eval())(torch.rand(3, 2, 4, 4).double(), target=[4, 0, 1])


def test_sets_by_index_channel_patch_and_mask(R):
    whole = R.marginal("1")
    torch.testing.assert_close(R(nrm.neurons("1", (0, 1, 2))), whole[:, 0, 1, 2])
    torch.testing.assert_close(
        R(nrm.neurons("1", (0, 1, 2), (3, slice(None), -1))),
        whole[:, 0, 1, 2] + whole[:, 3, :, -1].sum(1),
    )
    torch.testing.assert_close(R(nrm.channels("1", 1, 3)), whole[:, [1, 3]].sum((1, 2, 3)))
    torch.testing.assert_close(R(nrm.channels("1", 1, axis=1)), whole[:, :, 1].sum((1, 2)))
    torch.testing.assert_close(R(nrm.patch("1", slice(1, 3), 0)), whole[:, :, 1:3, 0].sum((1, 2)))
    torch.testing.assert_close(
        R(nrm.patch("1", [0, 2], [0, 3])), whole[:, :, [0, 2]][..., [0, 3]].sum((1, 2, 3))
    )
    chosen = torch.rand(4, 4, 4) > 0.5
    torch.testing.assert_close(R(nrm.mask("1", chosen)), (whole * chosen).sum((1, 2, 3)))
    each = torch.rand(3, 4, 4, 4) > 0.5
    torch.testing.assert_close(R(nrm.mask("1", each)), (whole * each).sum((1, 2, 3)))
    torch.testing.assert_close(
        R(nrm.channels("1", 0) | nrm.channels("1", 0, 2)), whole[:, [0, 2]].sum((1, 2, 3))
    )
    torch.testing.assert_close(R(nrm.neurons("5", 4)), torch.tensor([1.0, 0, 0]).double())
    torch.testing.assert_close(R.channels("1"), whole.sum((2, 3)))
    torch.testing.assert_close(R("1"), torch.ones(3).double())
    torch.testing.assert_close(R(nrm.neurons("1")), torch.ones(3).double())


def test_every_sample_has_its_own_target(R):
    assert R.target.tolist() == [4, 0, 1]
    torch.testing.assert_close(R.scale, R.output[torch.arange(3), R.target])
    torch.testing.assert_close(R.marginal("output"), torch.eye(5)[[4, 0, 1]].double())
    assert R.heatmap().shape == (3, 2, 4, 4)


def test_conditional_is_zero_where_the_condition_has_none(R):
    never = nrm.neurons("output", 2)
    assert R(nrm.channels("1", 0), given=never).tolist() == [0, 0, 0]
    assert (R.heatmap(given=never) == 0).all()


def test_conditional_heatmap(R):
    a, b = nrm.channels("1", 1), nrm.channels("3", 1, 2)
    torch.testing.assert_close(R.heatmap(a, given=b), R.heatmap(a, b) / R(b)[:, None, None, None])
    torch.testing.assert_close(R.heatmap(a, given=[a, b]).sum((1, 2, 3)), torch.ones(3).double())


def test_disjoint_and_identical_sets(R):
    a, b = nrm.channels("1", 0), nrm.channels("1", 1)
    assert R(a, b).tolist() == [0, 0, 0]
    torch.testing.assert_close(R(a, a), R(a))
    torch.testing.assert_close(R.marginal("1", a)[:, 0], R.marginal("1")[:, 0])


class Skip(nn.Module):
    """out = head(relu(branch(x)) + x), weights by hand."""

    def __init__(self):
        super().__init__()
        self.branch, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.branch.weight.data = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        self.head.weight.data = torch.tensor([[1.0, 1.0]])

    def forward(self, x):
        return self.head(torch.relu(self.branch(x)) + x)


def test_a_mask_beside_a_skip_drops_what_bypasses_it():
    """x = (1, 1): the sum's neurons hold 3 = 2 + 1 and 5 = 4 + 1, the output 8."""
    R = nrm.Explainer(Skip().eval(), Everywhere(rules.Zero()))(torch.ones(1, 2), target=0)
    assert R("branch").item() == pytest.approx(6 / 8)  # the branch's share of the flow
    assert R(nrm.neurons("branch", 0)).item() == pytest.approx(2 / 8)
    inside = R.heatmap(nrm.neurons("branch", 0))[0]
    torch.testing.assert_close(inside, torch.tensor([2 / 8, 0]))  # no flow over the skip
    torch.testing.assert_close(R.heatmap()[0], torch.tensor([3 / 8, 5 / 8]))
    # united with what bypasses the branch: the flow over the skip is kept
    assert R(within=nrm.neurons("branch", 0)).item() == pytest.approx(4 / 8)
    kept = R.heatmap(within=nrm.neurons("branch", 0))[0]
    torch.testing.assert_close(kept, torch.tensor([3 / 8, 1 / 8]))
    assert R("head", within=nrm.neurons("input", 1)).item() == pytest.approx(5 / 8)
    assert R(nrm.neurons("branch", 0), nrm.neurons("input", 0)).item() == pytest.approx(2 / 8)
    assert R(nrm.neurons("branch", 0), nrm.neurons("input", 1)).item() == 0.0
    cuts = {
        layer.name for layer in nrm.Explainer(Skip().eval()).layers(torch.ones(1, 2)) if layer.cut
    }
    assert cuts == {"input", ":add", "head"}


def test_parallel_branches_have_no_joint_relevance():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(4, 1)

        def forward(self, x):
            return self.c(torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1))

    torch.manual_seed(0)
    R = nrm.Explainer(Two().eval())(torch.rand(2, 2), target=0)
    assert R("a", "b").tolist() == [0, 0]
    torch.testing.assert_close(R("a") + R("b"), torch.ones(2))
    torch.testing.assert_close(R(nrm.neurons("a") | nrm.neurons("b")), torch.ones(2))
    torch.testing.assert_close(
        R.heatmap(nrm.neurons("a", 0) | nrm.neurons("b", 1)),
        R.heatmap(nrm.neurons("a", 0)) + R.heatmap(nrm.neurons("b", 1)),
    )
    assert R.joint("a", "b").abs().max() == 0
    with pytest.raises(QueryError, match="side by side"):
        R.top("a", "b")


def test_top_flows(R):
    best = R.top("1", "3", k=4, sample=2)
    assert best.exact
    pairs = R.joint("1", "3")[2]
    for flow in best:
        assert flow.relevance == pytest.approx(pairs[flow.parts["1"], flow.parts["3"]].item())
        assert R(*flow.sets)[2].item() == pytest.approx(flow.relevance)
        assert flow.share == pytest.approx(flow.relevance)  # both layers are cuts
    assert [f.relevance for f in best] == sorted((f.relevance for f in best), reverse=True)
    three = R.top("1", "3", "input", k=3)
    assert three.exact
    for flow in three:
        assert R(*flow.sets)[0].item() == pytest.approx(flow.relevance)
    single = R.top("3", k=1)[0]
    assert single.relevance == pytest.approx(R.channels("3")[0].max().item())
    with pytest.raises(QueryError):
        R.top("1", sample=3)


def test_output_relevance_instead_of_a_target():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).eval()
    x = torch.rand(2, 3)
    explainer = nrm.Explainer(model)
    weights = explainer(x).output.softmax(1)
    R = explainer(x, output_relevance=weights)
    assert R.target is None
    mixed = sum(weights[:, k, None] * explainer(x, target=k).heatmap() for k in range(4))
    torch.testing.assert_close(R.heatmap(), mixed)
    torch.testing.assert_close(explainer(x, output_relevance=3 * weights).heatmap(), R.heatmap())
    # explaining output k is conditioning on neuron k
    torch.testing.assert_close(
        R.heatmap(given=nrm.neurons("output", 2)), explainer(x, target=2).heatmap()
    )
    for bad, message in [
        (weights[:1], "shape"),
        (weights * torch.nan, "NaN"),
        (torch.tensor([[1.0, -1, 0, 0]] * 2), "sums to zero"),
    ]:
        with pytest.raises(TargetError, match=message):
            explainer(x, output_relevance=bad)
    with pytest.raises(TargetError, match="not both"):
        explainer(x, target=1, output_relevance=weights)


def test_targets():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).eval()
    x = torch.rand(2, 3)
    explainer = nrm.Explainer(model)
    assert explainer(x).target.tolist() == model(x).argmax(1).tolist()
    assert explainer(x, target=1).target.tolist() == [1, 1]
    assert explainer(x, target=torch.tensor([3, 0])).target.tolist() == [3, 0]
    for bad, message in [
        (4, r"0 to 3"), (-1, "out of range"), ([0, 4], "target 4"), ([0, 1, 2], "each sample"),
        (1.5, "integer"), ((0, 1, 2), "int"), (True, "integer"),
    ]:  # fmt: skip
        with pytest.raises(TargetError, match=message):
            explainer(x, target=bad)
    maps = nrm.Explainer(nn.Conv2d(1, 2, 1).eval())
    picture = torch.rand(2, 1, 3, 3)
    assert maps(picture, target=(1, 2, 0)).target.tolist() == [[1, 2, 0]] * 2
    assert maps(picture, target=(1, 2, 0)).heatmap()[1, 0, 2, 0] == 1
    with pytest.raises(TargetError, match="tuple of 3"):
        maps(picture, target=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nrm.channels("1", 4), "out of range"),
        (lambda: nrm.channels("1"), "empty"),
        (lambda: nrm.channels("1", 1.0), "no index"),
        (lambda: nrm.neurons("1", 3), "needs 3 entries"),
        (lambda: nrm.neurons("1", (0, 9, 0)), "out of range"),
        (lambda: nrm.neurons("1", (0, slice(3, 3), 0)), "takes nothing"),
        (lambda: nrm.neurons("1", (0, [], 0)), "empty"),
        (lambda: nrm.patch("1", 0), "2 spatial axes"),
        (lambda: nrm.mask("1", torch.zeros(4, 4, 4, dtype=torch.bool)), "empty"),
        (lambda: nrm.mask("1", torch.ones(4, 4, 4)), "boolean"),
        (lambda: nrm.mask("1", torch.ones(4, 4, dtype=torch.bool)), "shape"),
        (lambda: nrm.mask("1", torch.ones(2, 4, 4, 4, dtype=torch.bool)), "2 samples"),
        (lambda: 3, "neuron set"),
    ],
)
def test_bad_sets_are_refused(R, make, message):
    with pytest.raises(NeuronSetError, match=message):
        R(make())


def test_pairs_that_cannot_be_are_refused(R):
    with pytest.raises(QueryError, match="above both layers"):
        R.joint("3", "1", nrm.channels("1", 0))
    with pytest.raises(QueryError, match="different layers"):
        R.joint("1", "1")


def test_results_follow_dtype():
    model = nn.Linear(3, 2).eval()
    for dtype in (torch.float32, torch.float64):
        R = nrm.Explainer(model.to(dtype))(torch.rand(1, 3, dtype=dtype), target=0)
        assert R("input").dtype == R.heatmap().dtype == dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_a_gpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    model, x = model.double().eval(), torch.rand(2, 2, 4, 4).double()
    expected = nrm.Explainer(model)(x, target=1).heatmap(nrm.channels("1", 0))
    R = nrm.Explainer(model.cuda())(x.cuda(), target=1)
    torch.testing.assert_close(R.heatmap(nrm.channels("1", 0)).cpu(), expected)


def test_composites_choose_by_kind_type_path_and_position():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 1), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2),
    ).eval()  # fmt: skip
    graph = nrm.Explainer(model).graph(torch.rand(1, 1, 4, 4))

    def chosen(composite):
        return {op.address: composite.rule(op, graph) for op in graph.operations}

    flat, gamma, zero = rules.Flat(), rules.Gamma(0.25), rules.Gamma(0.0)
    found = chosen(composites.GammaFlat(0.25))
    assert [found[k] for k in ("0", "2", "3", "4", "6", "8")] == [flat, *[gamma] * 4, zero]
    found = chosen(composites.EpsilonPlusFlat())
    eps, plus = rules.Epsilon(1e-6), rules.ZPlus()
    assert [found[k] for k in ("0", "2", "3", "4", "6", "8")] == [flat, plus, plus, eps, eps, eps]
    custom = composites.Composite(
        [
            (composites.path("2", "8"), plus),
            (composites.module(nn.Conv2d), flat),
            (composites.module("Linear"), gamma),
        ],
        eps,
    )
    found = chosen(custom)
    assert [found[k] for k in ("0", "2", "3", "4", "6", "8")] == [
        flat,
        plus,
        flat,
        eps,
        gamma,
        plus,
    ]


def test_repr(R):
    assert "batch 3" in repr(R)
    assert (
        repr(nrm.channels("1", 2) | nrm.patch("1", 0, 0)) == "channels('1', 2) | patch('1', 0, 0)"
    )


def test_results_and_queries_do_not_disturb_each_other(R):
    """Messages are overwritten on the way; neither results nor the next query may notice."""
    a, b = nrm.channels("1", 1), nrm.channels("3", 1)
    first = [R.heatmap(), R.heatmap(a), R.marginal("output"), R.marginal("3"), R.joint("1", "3")]
    kept = [result.clone() for result in first]
    R.diagnostics()
    R(a, b)
    again = [R.heatmap(), R.heatmap(a), R.marginal("output"), R.marginal("3"), R.joint("1", "3")]
    for before, result, after in zip(kept, first, again, strict=True):
        assert torch.equal(before, result)
        torch.testing.assert_close(before, after)
    first[2].zero_()  # what a user does to a result is no business of the measure's
    torch.testing.assert_close(R.marginal("output"), kept[2])


def test_memory_is_used_again_only_where_nothing_keeps_it():
    """Convolutions whose output several operations read, in all orders, relu among them."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            h = self.a(x)
            kept = h + x  # keeps the values of h
            pooled = nn.functional.max_pool2d(h, 2).repeat(1, 1, 2, 2)
            k = self.b(torch.relu(h) + kept)
            return self.head((torch.relu(k) + nn.functional.dropout(k, training=False)
                              + pooled).flatten(1))  # fmt: skip

    torch.manual_seed(0)
    model = Shared().double().eval()
    x = torch.randn(2, 2, 2, 2).double()
    before = x.clone()
    for rule in (rules.Zero(), rules.Gamma(), rules.ZPlus()):
        for bias in ("drop", "input"):
            R = nrm.Explainer(model, Everywhere(rule), bias=bias)(x, target=1)
            torch.testing.assert_close(R.output, model(x).detach())
            assert R.diagnostics().worst_cut_deviation < 1e-10
            if rule == rules.Zero() and bias == "input":
                # LRP-0 with biases as inputs, through relu and max: gradient x input, exactly
                leaf = x.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
                expected = gradient * x / R.scale[:, None, None, None]
                torch.testing.assert_close(R.heatmap(), expected)
    assert torch.equal(x, before)
