"""Walks beside interventions: which are compared, on which samples, and what goes on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from nrm.errors import NrmError
from nrm.evaluation import Families, Interventions, joint_contributions, pearson
from nrm.evaluation.scores import SCORES
from nrm_reproduce.comparison import OTHERS, Comparison, JointRelevance, some, steps
from nrm_reproduce.networks import LAYERS, MLP
from nrm_reproduce.report import Request
from nrm_reproduce.rules import gamma, outputs

ZERO = OTHERS[0]
WALKS = (ZERO, gamma(0.1, "drop"))


def test_points_of_a_scatter_plot():
    generator = np.random.default_rng(0)
    score, contribution = generator.normal(size=(2, 5000))
    score[17] = 40
    drawn, beside = some(score, contribution, seed=0, most=100)
    assert len(drawn) == len(beside) == 100
    assert 40 in drawn
    pairs = set(zip(score, contribution, strict=True))
    assert pairs.issuperset(zip(drawn, beside, strict=True))
    assert some(score, contribution, seed=0)[0] is score


def test_steps_end_with_all():
    assert steps(24) == (1, 2, 3, 5, 7, 10, 15, 20, 24)
    assert steps(100)[-3:] == (50, 70, 100)
    assert steps(1) == (1,)


def network(widths=(7, 5), seed=1):
    """One whose neurons fall silent without others."""
    torch.manual_seed(seed)
    model = MLP(6, widths, 3).eval().requires_grad_(False)
    for layer in (model.fc1, model.fc2):
        layer.weight.mul_(4)
        layer.bias.add_(0.3)
    return model


@pytest.fixture
def model():
    return network().double()


def asked(model, layers, seed=0):
    """What a score is given."""
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(seed)).double()
    explainer = ZERO.explainer(model)
    R = explainer(x)
    return Families(R, layers, "neuron"), Interventions(explainer, x, target=int(R.target[0]))


def test_walks_from_other_outputs(model):
    families, interventions = asked(model, LAYERS)
    x = families.R.activations("x")
    logits = model(x)
    for walks, relevance in zip(
        outputs(gamma(0.1, "drop")), (logits, logits.softmax(-1)), strict=True
    ):
        R = walks.explainer(model)(x, output_relevance=relevance)
        expected = R.joint(*LAYERS, by="neuron")[0] * relevance.sum()
        found = JointRelevance(walks, model, LAYERS, "neuron")(families, interventions)
        torch.testing.assert_close(found, expected)


def samples(count):
    x = torch.rand(count, 6, generator=torch.Generator().manual_seed(2)).double()
    return [(str(n), x[n : n + 1]) for n in range(count)]


@pytest.mark.parametrize("layers", [LAYERS, ("x", *LAYERS)], ids=("pairs", "triples"))
def test_other_walks_are_those_of_their_own_explainer(model, layers):
    families, interventions = asked(model, layers)
    x = families.R.activations("x")
    for walks in OTHERS:
        own = walks.explainer(model)(x)
        expected = Families(own, layers, "neuron").joint() * own.scale
        score = JointRelevance(walks, model, layers)(families, interventions)
        torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("one_class", [False, True])
def test_rows_are_of_the_predicted_class(model, one_class, tmp_path):
    """Of one class alone or of all: the same figures, and those of the scores themselves."""
    given = samples(3)
    others = {"lrp": SCORES["lrp"]}
    one = Comparison("some", model, LAYERS, WALKS, others=others, ks=(3, 35), one_class=one_class)
    found = one.report(given, Request("", tmp_path))
    for name, x in given:
        number = int(model(x).argmax())
        R = ZERO.explainer(model)(x)
        families = Families(R, LAYERS, "neuron")
        interventions = Interventions(ZERO.explainer(model), x, target=number)
        contribution = joint_contributions(interventions, *families.sets)
        rows = {row.method: row for row in found.rows if row.sample == name}
        assert {row.target for row in rows.values()} == {number}
        for key, score in {
            ZERO.key: SCORES["joint"],
            WALKS[1].key: JointRelevance(WALKS[1], model, LAYERS),
            **others,
        }.items():
            expected = pearson(score(families, interventions), contribution)
            assert rows[key].figures["pearson"] == pytest.approx(expected)
            assert rows[key].figures["SC_35"] == pytest.approx(float(contribution.sum()))
    shown = one.shown(given[0][1])
    assert shown.number == (int(model(given[0][1]).argmax()) if one_class else None)
    (cloud, *_) = shown.clouds({ZERO.key: "LRP-0"}, seed=0)
    assert cloud.pearson == pytest.approx(found.values(ZERO.key)[0])


def test_walks_are_chosen_without_the_other_scores(model, tmp_path):
    one = Comparison("some", model, LAYERS, WALKS, others={"lrp": SCORES["lrp"]}, ks=(3,))
    best, found = one.choose(samples(4), Request("", tmp_path))
    assert set(found.methods) == {walks.key for walks in WALKS}
    assert found.figures == ("pearson",)
    means = {walks: found.mean(walks.key).mean for walks in WALKS}
    assert means[best] == max(means.values())


def test_what_was_found_is_not_found_again(model, tmp_path, monkeypatch):
    def one():
        return Comparison("some", model, LAYERS, WALKS, one_class=True)

    request = Request("", tmp_path)
    first = one().report(samples(2), request)

    def refuse(*_):
        raise NrmError("found again")

    monkeypatch.setattr("nrm.evaluation.faithfulness.joint_contributions", refuse)
    assert one().report(samples(2), request) == first
    for again, given in ((request, samples(3)), (replace(request, seed=1), samples(2))):
        with pytest.raises(NrmError, match="found again"):
            one().report(given, again)
    with pytest.raises(NrmError, match="found again"):
        one().choose(samples(2), request)
    model.fc1.weight.mul_(2)  # other weights have a place of their own
    with pytest.raises(NrmError, match="found again"):
        one().report(samples(2), request)
