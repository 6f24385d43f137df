"""Metrics of faithfulness, and evaluations of samples (section 4.1)."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from support.evaluated import contributions_by_hooks, conv_net, generator, mlp, pictures, vectors
from torch import nn

import nrm
from nrm import composites
from nrm.errors import InputError, QueryError
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
    occlusion,
)

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
