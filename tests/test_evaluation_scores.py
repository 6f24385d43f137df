"""Scores of combinations beside what hooks and sums find: baselines (section 4.1)."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.evaluated import (
    contributions_by_hooks,
    conv_net,
    mlp,
    output_without,
    pictures,
    vectors,
)
from torch import nn

import nrm
from nrm import composites
from nrm.errors import QueryError
from nrm.evaluation import intervention
from nrm.evaluation.intervention import Interventions, joint_contributions
from nrm.evaluation.metrics import pearson
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
