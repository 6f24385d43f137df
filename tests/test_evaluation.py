"""Metrics of faithfulness, baselines, and evaluations that may be interrupted (section 4.1)."""

from __future__ import annotations

import itertools
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nrm
from nrm import composites
from nrm.errors import InputError, QueryError
from nrm.evaluation import intervention
from nrm.evaluation.faithfulness import evaluate
from nrm.evaluation.intervention import Interventions, joint_contributions
from nrm.evaluation.metrics import (
    Mean,
    bootstrap,
    bootstrap_difference,
    contribution_of_top,
    pearson,
    ranks,
    spearman,
)
from nrm.evaluation.scores import (
    Families,
    activation,
    joint,
    lrp,
    lrp_product,
    occlusion,
    occlusion_sum,
    products,
    sums,
)
from nrm.evaluation.store import described, digest


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp():
    torch.manual_seed(2)
    layers = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    return nn.Sequential(*layers).double().eval()


def conv_net():
    torch.manual_seed(5)
    return (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(80, 3),
        )
        .double()
        .eval()
    )


def vectors(count=4):
    return list(torch.rand(count, 1, 6, generator=generator(1), dtype=torch.float64))


def pictures(count=2):
    return list(torch.rand(count, 1, 2, 8, 8, generator=generator(1), dtype=torch.float64))


def output_without(model, x, target, places):
    """The output with entries of modules' outputs set to zero by hooks."""

    def zero(indices):
        def hook(module, inputs, output):
            output = output.clone()
            for index in indices:
                output[0, index] = 0
            return output

        return hook

    handles = [
        model.get_submodule(layer).register_forward_hook(zero(indices))
        for layer, indices in places.items()
    ]
    with torch.no_grad():
        found = model(x)[0, target]
    for handle in handles:
        handle.remove()
    return found


def contributions_by_hooks(model, x, target, layers, sizes):
    """Eq. 57 for channels, term by term."""
    found = torch.zeros(sizes, dtype=torch.float64)
    for chosen in itertools.product(*map(range, sizes)):
        for taken in itertools.product((False, True), repeat=len(layers)):
            parts = zip(layers, chosen, taken, strict=True)
            places = {layer: [index] for layer, index, removed in parts if removed}
            found[chosen] += (-1) ** sum(taken) * output_without(model, x, target, places)
    return found


# -- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pearson_is_numpys(dtype):
    a = torch.randn(13, 7, 5, generator=generator(), dtype=dtype)
    b = a + torch.randn(13, 7, 5, generator=generator(1), dtype=dtype)
    wanted = np.corrcoef(a.double().numpy().ravel(), b.double().numpy().ravel())[0, 1]
    assert pearson(a, b) == pytest.approx(wanted, abs=1e-12)
    turned = a.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # other strides, the same elements
    assert pearson(turned, b) == pytest.approx(wanted, abs=1e-12)


def test_pearson_joins_chunks_and_withstands_cancellation():
    # More than one chunk, of other means, far from zero, where sums of squares lose digits.
    a = torch.randn(2**20 + 12345, generator=generator(), dtype=torch.float64) + 1e4
    b = 0.5 * a + torch.randn(len(a), generator=generator(1), dtype=torch.float64)
    b[2**20 :] += 3
    x, y = a.numpy() - a.numpy().mean(), b.numpy() - b.numpy().mean()
    wanted = (x @ y) / np.sqrt((x @ x) * (y @ y))
    assert pearson(a, b) == pytest.approx(wanted, abs=1e-10)
    assert pearson(a, -2 * a) == pytest.approx(-1.0, abs=1e-14)


def test_correlation_with_a_constant_is_not_defined():
    constant, other = torch.full((7,), 0.1), torch.arange(7.0)
    assert pearson(constant, other) is None
    assert pearson(other, constant) is None
    assert spearman(constant, other) is None
    assert pearson(torch.ones(1), torch.ones(1)) is None


def test_comparisons_that_make_no_sense_are_refused():
    with pytest.raises(QueryError, match="not to be compared"):
        pearson(torch.rand(2, 3), torch.rand(3, 2))
    with pytest.raises(QueryError, match="nothing to compare"):
        spearman(torch.rand(0), torch.rand(0))
    with pytest.raises(QueryError, match="infinite"):
        pearson(torch.tensor([1.0, float("nan"), 2.0]), torch.rand(3))


def test_ranks_share_ties():
    values = torch.tensor([[3.0, 1.0, 3.0], [0.0, -0.0, 7.0]])
    assert ranks(values).tolist() == [4.5, 3.0, 4.5, 1.5, 1.5, 6.0]


def test_spearman_is_that_of_the_closed_form():
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)); monotonous functions change nothing.
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    b = torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])
    assert spearman(a, b.exp()) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # With ties: Pearson of ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4), which is 4.5 / sqrt(4.5 * 5).
    tied = torch.tensor([0.0, 1.0, 1.0, 2.0])
    assert spearman(tied, torch.arange(4.0)) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_contribution_of_top_by_hand():
    relevance = torch.tensor([[0.5, -0.9], [0.2, 0.0]])
    contribution = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    found = contribution_of_top(relevance, contribution, (1, 2, 3, 4, 9))
    assert found.tolist() == [1.0, 5.0, 13.0, 15.0, 15.0]  # more than all is all
    assert contribution_of_top(relevance, contribution, (1, 2), "absolute").tolist() == [2.0, 3.0]
    assert contribution_of_top(relevance, contribution, (3, 1), "smallest").tolist() == [14.0, 2.0]
    assert contribution_of_top(relevance, contribution, ()).tolist() == []


def test_contribution_of_top_shares_ties():
    relevance = torch.tensor([0.0, 2.0, 1.0, 1.0, 0.0, 0.0])
    contribution = torch.tensor([3.0, 10.0, 1.0, 5.0, 6.0, 0.0])
    wanted = [10.0, 13.0, 16.0, 19.0, 22.0, 25.0]
    found = contribution_of_top(relevance, contribution, range(1, 7))
    assert found.tolist() == wanted
    shuffled = torch.tensor([5, 3, 0, 1, 4, 2])  # the order of the elements does not matter
    again = contribution_of_top(relevance[shuffled], contribution[shuffled], range(1, 7))
    assert again.tolist() == wanted


def test_contribution_of_top_is_the_sum_over_a_sort():
    relevance = torch.randn(40, 30, generator=generator())
    contribution = torch.randn(40, 30, generator=generator(1))
    order = relevance.flatten().argsort(descending=True)
    wanted = contribution.flatten()[order].double().cumsum(0)[[0, 9, 99, 1199]]
    found = contribution_of_top(relevance, contribution, (1, 10, 100, 1200))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("order", ["largest", "smallest", "absolute"])
def test_contribution_of_top_of_more_than_is_looked_at_at_once(order):
    """More than 2 ** 20, most of which are tied; two of the largest are at the ends."""
    relevance = torch.randn(440, 5, 500, generator=generator()).round()
    relevance[0, 0, 0], relevance[-1, -1, -1] = 90, -100
    contribution = torch.randn(440, 5, 500, generator=generator(1))
    key = {"largest": relevance, "smallest": -relevance, "absolute": relevance.abs()}[order]
    ks = (1, 2, 3, 1000, 2**20 + 1, relevance.numel())
    values = key.unique().flip(0)
    groups = [contribution[key == value].double() for value in values]
    wanted = []
    for k in ks:
        total, left = 0.0, k
        for group in groups:  # of those that are tied each counts as their mean
            taken = min(left, len(group))
            total, left = total + taken * float(group.mean()), left - taken
        wanted.append(total)
    found = contribution_of_top(relevance, contribution, ks, order)
    torch.testing.assert_close(found, torch.tensor(wanted).to(found), rtol=1e-6, atol=1e-4)
    turned = relevance.permute(2, 0, 1), contribution.permute(2, 0, 1)
    torch.testing.assert_close(contribution_of_top(*turned, ks[2:4], order), found[2:4])


@pytest.mark.parametrize(("ks", "order"), [((0,), "largest"), ((1.5,), "largest"), ((1,), "best")])
def test_contribution_of_top_refuses(ks, order):
    with pytest.raises(QueryError):
        contribution_of_top(torch.rand(3), torch.rand(3), ks, order)


def test_contribution_of_top_of_numbers_without_order_or_opposite():
    nan = torch.tensor([1.0, torch.nan])
    for pair in ((nan, torch.ones(2)), (torch.ones(2), nan)):
        with pytest.raises(QueryError, match="NaN"):
            contribution_of_top(*pair, (1,))
    small = torch.tensor([-128, 3], dtype=torch.int8)
    found = contribution_of_top(small, torch.tensor([5.0, 1.0]), (1,), "smallest")
    assert found.tolist() == [5.0]


def test_bootstrap_is_seeded_and_leaves_out_what_is_missing():
    values = torch.randn(50, generator=generator()).tolist()
    found = bootstrap([*values, None])
    assert found == bootstrap([*values, None])
    assert found.samples == 50
    assert found.mean == pytest.approx(np.mean(values))
    assert found != bootstrap(values, seed=1)
    # For many samples the interval is that of the normal distribution.
    error = np.std(values) / np.sqrt(50)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.low < found.mean < found.high
    narrow = bootstrap(values, level=0.5)
    assert found.low < narrow.low < narrow.high < found.high
    assert bootstrap([2.0]) == Mean(2.0, 2.0, 2.0, 1)
    assert bootstrap([None]) == Mean(None, None, None, 0)
    with pytest.raises(QueryError):
        bootstrap(values, resamples=0)


def test_paired_difference_is_surer_than_two_means():
    noise = torch.randn(40, generator=generator()).tolist()
    a = [value + 0.1 for value in noise]
    found = bootstrap_difference([*a, None, 1.0], [*noise, 1.0, None])
    assert found.samples == 40
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)
    with pytest.raises(QueryError, match="paired"):
        bootstrap_difference([1.0], [])


# -- baselines -----------------------------------------------------------------------------------


def test_scores_of_neurons_of_three_layers():
    model, x, layers = mlp(), vectors()[0], ["1", "input", "3"]  # in no order of their own
    explainer = nrm.Explainer(model)
    R = explainer(x)
    families = Families(R, layers, by="neuron")
    interventions = Interventions(explainer, x, target=int(R.target))
    assert families.shape == (5, 6, 4)
    scores = (joint, lrp, lrp_product, activation, occlusion, occlusion_sum)
    found = [score(families, interventions) for score in scores]
    values = R.activations("1")[0], x[0], R.activations("3")[0]
    for chosen in itertools.product(range(5), range(6), range(4)):
        sets = [nrm.neurons(layer, number) for layer, number in zip(layers, chosen, strict=True)]
        alone = sum(interventions.output - interventions.without([[one]])[0] for one in sets)
        marginals = [R(one)[0] for one in sets]
        wanted = [
            R(*sets)[0] * R.scale[0],
            sum(marginals) * R.scale[0],
            marginals[0] * marginals[1] * marginals[2] * R.scale[0],
            sum(value[number] for value, number in zip(values, chosen, strict=True)),
            interventions.output - interventions.without([sets])[0],
            alone,
        ]
        for score, one in zip(found, wanted, strict=True):
            torch.testing.assert_close(score[chosen], one)


def test_scores_of_channels_by_hooks():
    model, x, layers = conv_net(), pictures()[0], ["1", "4"]
    explainer = nrm.Explainer(model, composites.EpsilonPlus())
    R = explainer(x, target=1)
    families = Families(R, layers)
    interventions = Interventions(explainer, x, target=1)
    output = model(x)[0, 1].detach()
    torch.testing.assert_close(interventions.output, output)
    drops = [
        [output - output_without(model, x, 1, {layer: [channel]}) for channel in range(size)]
        for layer, size in (("1", 4), ("4", 5))
    ]
    alone = torch.tensor(drops[0])[:, None] + torch.tensor(drops[1])
    torch.testing.assert_close(occlusion_sum(families, interventions), alone)
    both = [
        [output - output_without(model, x, 1, {"1": [a], "4": [b]}) for b in range(5)]
        for a in range(4)
    ]
    torch.testing.assert_close(occlusion(families, interventions), torch.tensor(both))
    total = [R.activations(layer)[0].sum((1, 2)) for layer in layers]
    torch.testing.assert_close(activation(families), total[0][:, None] + total[1])
    marginal = [R.channels(layer)[0] for layer in layers]
    torch.testing.assert_close(lrp(families), (marginal[0][:, None] + marginal[1]) * R.scale)
    wanted = contributions_by_hooks(model, x, 1, layers, (4, 5))
    torch.testing.assert_close(joint_contributions(interventions, *families.sets), wanted)


def test_sets_of_a_function_may_overlap():
    R = nrm.Explainer(conv_net())(pictures()[0])
    halves = [slice(0, 5), slice(3, 8)], [slice(0, 2), slice(1, 4)]
    sides = dict(zip(("1", "4"), halves, strict=True))
    given = []

    def patches(measure, layer):
        given.append((measure, layer))
        return (nrm.patch(layer, rows, slice(None)) for rows in sides[layer])

    families = Families(R, ["1", "4"], patches)
    assert given == [(R, "1"), (R, "4")]
    sets = families.sets
    wanted = torch.stack([torch.stack([R(a, b)[0] for b in sets[1]]) for a in sets[0]])
    torch.testing.assert_close(joint(families), wanted * R.scale)
    first, second = (torch.stack([R(one)[0] for one in family]) for family in sets)
    torch.testing.assert_close(lrp(families), (first[:, None] + second) * R.scale)
    values = R.activations("4")[0]
    below = torch.stack([values[:, rows].sum() for rows in sides["4"]])
    torch.testing.assert_close(families.activations()[1], below)


def test_one_layer_has_marginals():
    R = nrm.Explainer(mlp())(vectors()[0])
    families = Families(R, ["1"], by="neuron")
    torch.testing.assert_close(joint(families), R.marginal("1")[0] * R.scale)


def test_relevance_has_the_sign_of_contributions_below_zero():
    # One hidden neuron takes the output below zero: it has relevance, and so does it contribute.
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.tensor([[-1.0, -0.25]]))
    explainer, x = nrm.Explainer(model.eval(), composites.LRPZero()), torch.ones(1, 2)
    families = Families(explainer(x, target=0), ["0", "1"], "neuron")
    contribution = joint_contributions(Interventions(explainer, x, target=0), *families.sets)
    assert pearson(joint(families), contribution) == pytest.approx(1)


def test_families_are_of_one_sample():
    R = nrm.Explainer(mlp())(torch.cat(vectors()))
    with pytest.raises(QueryError, match="one sample"):
        Families(R, ["1", "3"])
    with pytest.raises(QueryError, match="list"):
        Families(nrm.Explainer(mlp())(vectors()[0]), "1")


def test_sums_and_products_are_over_all_combinations():
    a, b, c = torch.arange(2.0), torch.arange(3.0) * 10, torch.arange(4.0) * 100
    found = sums([a, b, c])
    assert found.shape == (2, 3, 4)
    assert found[1, 2, 3] == 321
    found = products([a, b, c])
    assert found.shape == (2, 3, 4)
    assert found[1, 2, 3] == 6000


def test_baselines_by_hand():
    # f = relu(a - b) + 2 a: a = 3, b = 1. Without a: 0; without b: 3 + 6; without both: 0.
    sizes = [nn.Linear(2, size, bias=False) for size in (2, 2, 1)]
    model = nn.Sequential(*sizes[:2], nn.ReLU(), sizes[2]).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
        model[3].weight.fill_(1.0)
    explainer = nrm.Explainer(model, composites.LRPZero())
    x = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    families = Families(explainer(x, target=0), ["0", "2"], "neuron")
    interventions = Interventions(explainer, x, target=0)
    assert float(interventions.output) == 8

    def numbers(score):
        return score(families, interventions).tolist()

    # R(a) f = 3 + 6, R(b) f = -1; of the second layer 2 and 6.
    assert numbers(lrp) == [[9 + 2, 9 + 6], [-1 + 2, -1 + 6]]
    assert numbers(lrp_product) == [[18 / 8, 54 / 8], [-2 / 8, -6 / 8]]
    assert numbers(activation) == [[3 + 2, 3 + 6], [1 + 2, 1 + 6]]
    # Without a: 0. Without b: 9. Without the first of the second layer: 6; the second: 2.
    assert numbers(occlusion_sum) == [[8 + 2, 8 + 6], [-1 + 2, -1 + 6]]
    assert numbers(occlusion) == [[8, 8], [2, 8 - 3]]
    assert joint_contributions(interventions, *families.sets).tolist() == [[2, 6], [-1, 0]]


@pytest.mark.parametrize(
    ("layers", "wanted_runs"),
    [(["input", "1"], [2]), (["1", "3"], [2, 1]), (["3", "input", "1"], [3, 2])],
)
def test_losses_and_contributions_are_of_the_same_runs(layers, wanted_runs, monkeypatch):
    explainer, x = nrm.Explainer(mlp()), vectors()[0]
    families = Families(explainer(x), layers, by="neuron").sets
    runs = []

    class Counted(intervention.Combinations):
        def effects(self, advance):
            runs.append(len(self.families))
            return super().effects(advance)

    monkeypatch.setattr(intervention, "Combinations", Counted)
    interventions = Interventions(explainer, x, target=0)
    contribution = interventions.joint(*families)
    united = interventions.united(*families)
    # The output is affine in "3": what is lost without the lower ones is found beside it.
    assert runs == wanted_runs
    wanted = torch.zeros_like(united)
    for size in range(1, len(layers) + 1):  # inclusion and exclusion
        for axes in itertools.combinations(range(len(layers)), size):
            some = Interventions(explainer, x, target=0).joint(*(families[a] for a in axes))
            shape = [n if a in axes else 1 for a, n in enumerate(united.shape)]
            wanted += (-1) ** (size - 1) * some.view(shape)
    torch.testing.assert_close(united, wanted)
    runs.clear()
    torch.testing.assert_close(interventions.joint(*families), contribution, rtol=0, atol=0)
    assert not runs


# -- evaluate ------------------------------------------------------------------------------------


def by_hand(model, x, layers, by, target=None):
    """The scores and contributions of one sample."""
    explainer = nrm.Explainer(model)
    R = explainer(x, target=target)
    families = Families(R, layers, by)
    interventions = Interventions(explainer, x, target=int(R.target))
    scores = {
        "joint": R.joint(*layers, by=by)[0] * R.scale,
        "lrp": lrp(families),
        "activation": activation(families),
        "occlusion": occlusion(families, interventions),
    }
    contribution = joint_contributions(interventions, *families.sets)
    by_hooks = contributions_by_hooks(model, x, int(R.target), layers, families.shape)
    torch.testing.assert_close(contribution, by_hooks)
    return scores, contribution, R


@pytest.mark.parametrize(
    ("model", "samples", "layers", "by"),
    [(mlp(), vectors(2), ["1", "3"], "neuron"), (conv_net(), pictures(), ["4", "1"], "channel")],
    ids=["mlp", "conv"],
)
def test_evaluation_against_hooks(model, samples, layers, by):
    found = evaluate(nrm.Explainer(model), samples, layers, by, ks=(1, 5))
    assert found.methods == ("joint", "lrp", "activation", "occlusion")
    assert found.figures == ("pearson", "spearman", "SC_1", "SC_5")
    assert len(found.rows) == 4 * len(samples)
    for number, x in enumerate(samples):
        scores, contribution, R = by_hand(model, x, layers, by)
        rows = [row for row in found.rows if row.sample == str(number)]
        for row, (method, score) in zip(rows, scores.items(), strict=True):
            assert (row.method, row.target) == (method, int(R.target))
            assert row.output == pytest.approx(float(R.scale))
            top = contribution_of_top(score, contribution, (1, 5)).tolist()
            wanted = [pearson(score, contribution), spearman(score, contribution), *top]
            assert list(row.figures.values()) == pytest.approx(wanted)


def test_joint_relevance_is_the_contribution_of_a_network_of_products():
    # Without biases and with all neurons active, joint relevance is joint contribution.
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    x = torch.rand(1, 4, generator=generator(), dtype=torch.float64)
    explainer = nrm.Explainer(model.eval(), composites.LRPZero())
    found = evaluate(explainer, [x], ["input", "0"], by="neuron", target=2)
    assert found.rows[0].figures["pearson"] == pytest.approx(1)
    assert found.rows[0].target == 2


def test_table_and_json():
    samples = [(name, x) for name, x in zip("abcd", vectors(), strict=True)]
    found = evaluate(nrm.Explainer(mlp()), samples, ["1", "3"], "neuron", ("joint", "lrp"), ks=(2,))
    pearsons = found.values("joint")
    line = found.table()[0]
    assert line["method"] == "joint"
    assert line["pearson"] == pytest.approx(np.mean(pearsons))
    wanted = bootstrap(pearsons, 0)
    assert (line["pearson_low"], line["pearson_high"]) == (wanted.low, wanted.high)
    assert line["SC_2_samples"] == 4
    assert found.mean("joint") == wanted
    wanted = bootstrap_difference(pearsons, found.values("lrp"), 0)
    assert found.difference("joint", "lrp") == wanted
    read = json.loads(found.to_json())
    assert [row["sample"] for row in read["rows"]] == [name for name in "abcd" for _ in range(2)]
    assert read["means"] == found.table()
    assert read["layers"] == ["1", "3"]
    with pytest.raises(QueryError, match="no 'SC_3'"):
        found.values("joint", "SC_3")


def test_targets():
    explainer, layers = nrm.Explainer(mlp()), ["1", "3"]
    labels = {"a": 2, "b": 0}
    samples = list(zip(labels, vectors(2), strict=True))
    asked = []

    def label(name, x):
        asked.append((name, x))
        return torch.tensor(labels[name])

    found = evaluate(explainer, samples, layers, "neuron", ("joint",), target=label)
    assert [row.target for row in found.rows] == [2, 0]
    assert [name for name, _ in asked] == ["a", "b"]
    assert torch.equal(asked[0][1], samples[0][1])
    found = evaluate(explainer, samples, layers, "neuron", ("joint",), target=1)
    assert [row.target for row in found.rows] == [1, 1]
    with pytest.raises(QueryError, match="'likely'"):
        evaluate(explainer, samples, layers, "neuron", target="likely")


class TwoInputs(nn.Module):
    """Its outputs are `[batch, 2, 3]`."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(3, 4), nn.Linear(2, 4), nn.ReLU()
        self.head = nn.Linear(4, 6)

    def forward(self, x, y):
        hidden = self.act(self.first(x) + self.second(y))
        return self.head(hidden).view(-1, 2, 3)


def test_several_inputs_and_outputs_of_several_axes(tmp_path):
    torch.manual_seed(1)
    explainer = nrm.Explainer(TwoInputs().double().eval())
    x, y = (torch.rand(1, n, generator=generator(), dtype=torch.float64) for n in (3, 2))
    run = partial(evaluate, explainer, [("a", (x, y)), [x, y]], ["x", "act"], "neuron")
    found = run(target=(1, 2), removal="mean", store=tmp_path)
    assert [row.sample for row in found.rows[::4]] == ["a", "1"]
    assert found.rows[0].target == (1, 2)
    assert found.rows[0].figures == found.rows[4].figures
    again = run(target=lambda name, inputs: torch.tensor([-1, 2]), removal="mean", store=tmp_path)
    assert again.rows == found.rows
    assert run(target=(1, 2), removal="mean", store=tmp_path) == found
    by_hand = Interventions(explainer, x, y, target=(1, 2), removal="mean")
    families = Families(explainer(x, y, target=(1, 2)), ["x", "act"], "neuron")
    wanted = pearson(joint(families), joint_contributions(by_hand, *families.sets))
    assert found.values("joint")[0] == pytest.approx(wanted)
    with pytest.raises(InputError, match="other settings: removal 'mean'"):
        run(store=tmp_path)


def test_scores_of_ones_own_and_the_limit_on_ranks():
    explainer = nrm.Explainer(mlp())
    own = {"none": lambda families, interventions: torch.zeros(families.shape)}
    found = evaluate(explainer, vectors(2), ["1", "3"], "neuron", own, ks=(20,), ranked=19)
    assert found.figures == ("pearson", "SC_20")
    assert found.values("none") == [None, None]
    assert found.table()[0]["pearson"] is None
    assert found.table()[0]["pearson_samples"] == 0
    assert json.loads(found.to_json())["rows"][0]["figures"]["pearson"] is None


def test_evaluations_that_make_no_sense_are_refused():
    explainer = nrm.Explainer(mlp())
    with pytest.raises(QueryError, match="methods are some of joint"):
        evaluate(explainer, vectors(), ["1", "3"], methods=("guess",))
    with pytest.raises(QueryError, match="SC_k"):
        evaluate(explainer, vectors(), ["1", "3"], ks=(0,))
    with pytest.raises(QueryError, match="list of names"):
        evaluate(explainer, vectors(), "1")
    with pytest.raises(InputError, match="no sample"):
        evaluate(explainer, [], ["1", "3"])
    with pytest.raises(InputError, match="'x' is to be a tensor"):
        evaluate(explainer, [("x", [1.0])], ["1", "3"])
    with pytest.raises(QueryError, match="twice"):
        evaluate(explainer, vectors(), ["1", "1"])
    with pytest.raises(QueryError, match="ks are a list"):
        evaluate(explainer, vectors(), ["1", "3"], ks=5)
    for seed in (-1, True, 1.0):
        with pytest.raises(QueryError, match="a seed is"):
            evaluate(explainer, vectors(), ["1", "3"], seed=seed)
    with pytest.raises(QueryError, match="methods are some of joint"):
        evaluate(explainer, vectors(), ["1", "3"], methods={})
    for odd in (None, 1.5, "first"):
        with pytest.raises(QueryError, match="target is"):
            evaluate(explainer, vectors(), ["1", "3"], target=lambda name, x, odd=odd: odd)
    own = {"mine": lambda families, interventions: np.zeros((6, 4))}
    with pytest.raises(QueryError, match="'mine' is to give a tensor"):
        evaluate(explainer, vectors(), ["1", "3"], by="neuron", methods=own)


def test_progress_is_told():
    told = []
    explainer = nrm.Explainer(mlp())
    evaluate(explainer, iter(vectors(3)), ["1", "3"], methods=("lrp",), progress=told.append)
    assert told == [1, 1, 1]


# -- the folder of finished samples --------------------------------------------------------------


class StoppedError(Exception):
    pass


def interrupted_after(samples, count):
    yield from samples[:count]
    raise StoppedError


def test_interrupted_evaluation_goes_on(tmp_path):
    samples = [(f"picture {n}/x.png", x) for n, x in enumerate(vectors())]
    run = partial(evaluate, layers=["1", "3"], by="neuron", ks=(1, 3), seed=7)
    whole = run(nrm.Explainer(mlp()), samples)
    store = tmp_path / "deep" / "folder"
    with pytest.raises(StoppedError):
        run(nrm.Explainer(mlp()), interrupted_after(samples, 2), store=store)
    assert len(list(store.iterdir())) == 3
    explainer, explained = nrm.Explainer(mlp()), set()  # another process has another model object

    class Counting(nrm.Explainer):
        def __call__(self, *inputs, **named):
            explained.add(float(inputs[0].sum()))
            return super().__call__(*inputs, **named)

    found = run(Counting(explainer.model), samples, store=store)
    assert len(explained) == 2
    assert found == whole
    assert found.to_json() == whole.to_json()
    assert not [path for path in store.iterdir() if path.name.startswith(".")]
    # In another order, and with another sample: only that one is new.
    new = "new", 2 * samples[0][1]
    again = run(Counting(explainer.model), [*samples[::-1], new], store=store)
    assert len(explained) == 3
    assert again.values("joint")[:4] == whole.values("joint")[::-1]


def test_error_within_a_sample_keeps_those_before(tmp_path):
    calls = []

    def failing(families, interventions):
        calls.append(1)
        if len(calls) == 3:
            raise StoppedError
        return lrp(families)

    run = partial(evaluate, nrm.Explainer(mlp()), vectors(), ["1", "3"], methods={"a": failing})
    with pytest.raises(StoppedError):
        run(store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_changed_samples_and_targets_are_not_those_of_the_folder(tmp_path):
    run = partial(evaluate, nrm.Explainer(mlp()), layers=["1", "3"], store=tmp_path)
    first = run([("a", vectors()[0])])
    second = run([("a", vectors()[1])])
    assert first != second
    assert run([("a", vectors()[0])], target=first.rows[0].target).rows == first.rows
    assert run([("a", vectors()[0])], target=lambda name, x: 2).rows[0].target == 2


def other_model():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-9
    return model


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"layers": ["3", "1"]}, "layers"),
        ({"by": "channel"}, "by"),
        ({"by": lambda R, layer: [nrm.channels(layer, 0)]}, "by"),
        ({"methods": ("joint",)}, "methods"),
        ({"ks": (1, 2)}, "ks"),
        ({"seed": 1}, "seed"),
        ({"order": "absolute"}, "order"),
        ({"ranked": 0}, "ranked"),
        ({"explainer": nrm.Explainer(other_model())}, "model"),
        ({"explainer": nrm.Explainer(mlp(), composites.GammaFlat(0.25))}, "composite"),
        ({"explainer": nrm.Explainer(mlp(), bias="input")}, "rules"),
        ({"explainer": nrm.Explainer(mlp(), strict=True)}, "rules"),
    ],
)
def test_other_settings_are_refused(tmp_path, changed, named):
    settings = {
        "explainer": nrm.Explainer(mlp()),
        "samples": vectors(1),
        "layers": ["1", "3"],
        "by": "neuron",
        "store": tmp_path,
    }
    evaluate(**settings)
    evaluate(**settings)
    with pytest.raises(InputError, match=f"other settings: {named}"):
        evaluate(**settings | changed)


def test_files_that_were_cut_off_are_written_again(tmp_path):
    run = partial(evaluate, nrm.Explainer(mlp()), vectors(2), ["1", "3"], store=tmp_path)
    whole = run()
    for path in tmp_path.glob("*.json"):
        if path.name != "settings.json":
            path.write_text(path.read_text()[:20])
    assert run() == whole
    assert run() == whole


def test_functions_are_told_apart_by_what_they_enclose():
    def clusters(k):
        return lambda R, layer: nrm.clusters(R, layer, k)

    assert described(clusters(3)) == described(clusters(3))
    assert described(clusters(3)) != described(clusters(4))
    assert described(partial(clusters, 3)) != described(partial(clusters, 4))
    assert described(lambda x: x + 1) != described(lambda x: x + 2)
    chosen = torch.tensor([True, False])

    def given(mask):
        return lambda R, layer: [nrm.mask(layer, mask)]

    assert described(given(chosen)) == described(given(chosen.clone()))
    assert described(given(chosen)) != described(given(~chosen))
    sets = [nrm.mask("1", chosen)], [nrm.mask("1", chosen)], [nrm.mask("1", ~chosen)]
    same, again, other = (digest(lambda R, layer, each=each: each) for each in sets)
    assert same == again != other


class Scaled:
    """Shows nothing of itself."""

    def __init__(self, by: Any) -> None:
        self.by = by

    def __call__(self, x: Any) -> Any:
        return x * self.by


class Slotted:
    __slots__ = ("by",)

    def __init__(self, by: Any) -> None:
        self.by = by


class ScaledModule(nn.Module):
    def __init__(self, by: Any) -> None:
        super().__init__()
        self.by = by


@pytest.mark.parametrize("kind", [Scaled, Slotted, ScaledModule])
def test_objects_are_told_apart_by_what_they_hold(kind: Any) -> None:
    assert described(kind(2)) == described(kind(2))
    assert described(kind(2)) != described(kind(3))
    one, two = torch.zeros(3000), torch.zeros(3000)
    two[1500] = 1
    assert described(kind(one)) == described(kind(one.clone()))
    assert described(kind(one)) != described(kind(two))
    assert described(kind(Scaled(2))) != described(kind(Scaled(3)))
    assert described([kind(2)]) != described([kind(3)])
    if kind is Scaled:
        assert described(kind(2).__call__) != described(kind(3).__call__)
    itself = kind(2)
    itself.by = itself if kind is not ScaledModule else [itself]
    assert "itself" in described(itself)


def test_composites_are_told_apart_by_their_selectors():
    def composite(pattern):
        choice = composites.path(pattern), nrm.rules.Gamma(0.1)
        return composites.Composite([choice], nrm.rules.Zero())

    assert digest(composite("1.*")) == digest(composite("1.*"))
    assert digest(composite("1.*")) != digest(composite("2.*"))
    assert "0x" not in described(composite("1.*"))
    assert digest(torch.zeros(2)) != digest(torch.zeros(2, dtype=torch.float64))
    assert digest([np.zeros(2)]) != digest([np.ones(2)])
    itself = []
    itself.append(itself)
    assert described(itself) == "list(itself)"
