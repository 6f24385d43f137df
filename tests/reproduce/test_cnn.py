"""`cnn-channels`, `cnn-clusters`: one class, what is refused, the experiment, its report."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from nrm.errors import QueryError, UnknownLayerError
from nrm.evaluation import (
    Evaluation,
    Families,
    Interventions,
    faithfulness,
    joint_contributions,
    pearson,
)
from nrm.evaluation.faithfulness import Row
from nrm_reproduce import cnn, comparison
from nrm_reproduce.cnn import (
    CHANNELS,
    CLUSTERS,
    METHODS,
    PAPERS,
    compared,
    layer_pairs,
    report,
    top,
    typical,
)
from nrm_reproduce.comparison import OTHERS, JointRelevance
from nrm_reproduce.data import Photo, class_names, read_photo
from nrm_reproduce.networks import Pictured, of_class, squeezenet
from nrm_reproduce.report import PAGE, RESULT, Request

LAYERS = ("squeeze.1", "expand.1")
TINY_CLUSTERS = replace(CLUSTERS, k={"SqueezeNet": 3})
PLANS = [CHANNELS, TINY_CLUSTERS]


class Tiny(nn.Module):
    """Built as SqueezeNet is, with a branch beside the second layer."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())
        self.beside = nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(9, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x):
        x = self.squeeze(x)
        return self.classifier(torch.cat([self.beside(x), self.expand(x)], 1)).flatten(1)


def photo(seed=0):
    x = torch.rand(1, 3, 13, 13, generator=torch.Generator().manual_seed(seed))
    return Photo(f"picture {seed}", x, x[0].permute(1, 2, 0).numpy())


def tiny_network(model, count=1):
    photos = [photo(seed) for seed in range(count)]
    return Pictured("SqueezeNet", "tiny", "pictures", model, photos, None)


def comparison_of(model, plan, layers=LAYERS):
    one, _ = compared(plan, tiny_network(model), layers, 0)
    return one


@pytest.fixture(scope="module")
def tiny():
    """One for all tests, none of which changes it."""
    torch.manual_seed(2)
    model = Tiny().eval()
    model.classifier[1].bias.data += 1  # no class is without any activation
    with pytest.MonkeyPatch.context() as patched:  # each class is captured once
        patched.setattr(comparison, "of_class", cache(of_class))
        yield model


@pytest.mark.parametrize("number", [0, 3])
def test_one_class_has_the_same_output_relevance_and_contributions(tiny, number):
    x = photo().x
    narrow = of_class(tiny, number)
    with torch.no_grad():
        torch.testing.assert_close(narrow(x)[:, 0], tiny(x)[:, number])
    found = []
    for model, target in ((tiny, number), (narrow, 0)):
        explainer = PAPERS.explainer(model)
        families = Families(explainer(x, target=target), LAYERS)
        interventions = Interventions(explainer, x, target=target)
        found.append((families.joint(), joint_contributions(interventions, *families.sets)))
    for whole, one in zip(*found, strict=True):
        torch.testing.assert_close(one, whole)
    assert tiny.classifier[1].weight.shape[0] == 5  # the model itself is as it was


def test_removal_before_and_after_the_activation_function_is_the_same(tiny):
    x = photo().x
    explainer = PAPERS.explainer(tiny)
    R = explainer(x, target=0)
    interventions = Interventions(explainer, x, target=0)
    before, after = (Families(R, layers) for layers in (("squeeze.0", "expand.0"), LAYERS))
    torch.testing.assert_close(before.joint(), after.joint())
    torch.testing.assert_close(
        joint_contributions(interventions, *before.sets),
        joint_contributions(interventions, *after.sets),
    )


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.part)
@pytest.mark.parametrize("walks", OTHERS, ids=lambda walks: walks.key)
def test_other_walks_are_those_of_their_own_explainer(tiny, plan, walks):
    x, by = photo().x, plan.by("SqueezeNet", 0)
    families = Families(PAPERS.explainer(tiny)(x, target=1), LAYERS, by)
    own = walks.explainer(tiny)(x, target=1)
    score = JointRelevance(walks, tiny, LAYERS, by)(families, None)
    torch.testing.assert_close(score, Families(own, LAYERS, by).joint() * own.scale)


def test_clusters_are_found_once_for_each_picture(tiny, monkeypatch):
    calls = []
    found = cnn.clusters
    monkeypatch.setattr(cnn, "clusters", lambda *a: calls.append(a[1]) or found(*a))
    families = Families(
        PAPERS.explainer(tiny)(photo().x, target=1), LAYERS, TINY_CLUSTERS.by("SqueezeNet", 0)
    )
    JointRelevance(OTHERS[0], tiny, LAYERS, TINY_CLUSTERS.by("SqueezeNet", 0))(families, None)
    assert calls == list(LAYERS)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.part)
def test_the_report_of_some_pictures(tiny, plan, tmp_path):
    shown = tiny_network(tiny, 3)
    several = (LAYERS, ("squeeze.1", "beside.1"))
    found = report(plan, shown, several, Request("", tmp_path / "kept"))
    assert [row.method for row in found.rows] == 2 * list(METHODS.values())
    assert {row.paper for row in found.rows} == {None}  # for layers of the paper's kind only
    assert {row.samples for row in found.rows} == {3}
    assert [row.layers for row in found.rows[:: len(METHODS)]] == list(several)
    combined = [24, 12] if plan is CHANNELS else [9, 9]
    assert [value for key, value in found.facts.items() if "pairs of" in key] == combined
    found.write(tmp_path)
    assert (tmp_path / PAGE).is_file()
    assert all((tmp_path / picture.file).is_file() for picture in found.pictures)
    assert {"pairs-1.png", "pairs-2.png"} < {picture.file for picture in found.pictures}
    details = json.loads((tmp_path / RESULT).read_text())["details"]["layers"]
    assert [tuple(one["layers"]) for one in details] == list(several)
    samples = details[1]["samples"]
    assert len(samples) == 3 * len(METHODS)
    with torch.no_grad():
        predicted = [int(tiny(one.x)[0].argmax()) for one in shown.photos]
    assert [one["target"] for one in samples[:: len(METHODS)]] == predicted


def test_figures_are_those_of_the_shown_picture(tiny, tmp_path):
    one, x = comparison_of(tiny, CHANNELS), photo().x
    with torch.no_grad():
        shown = one.shown(x)
        rows = {row.method: row for row in one.report([("0", x)], Request("", tmp_path)).rows}
    for key in METHODS:
        score = shown.score(key)
        assert score.shape == (4, 6)
        assert pearson(score, shown.contribution) == pytest.approx(rows[key].figures["pearson"])
    ranked = [float(shown.score("joint")[pair]) for pair in top(shown, 5)]
    assert ranked == sorted(ranked, reverse=True)
    assert ranked[0] == float(shown.score("joint").max())
    (pair, *_) = top(shown, 1)
    total = shown.R.heatmap(
        *(family[i] for family, i in zip(shown.families.sets, pair, strict=True))
    )
    assert float(total.sum() * shown.R.scale) == pytest.approx(ranked[0], rel=1e-4)
    last = rows["joint"].figures["SC_24"]
    assert last == pytest.approx(float(shown.contribution.sum()), rel=1e-4, abs=1e-5)
    clouds = shown.clouds(METHODS, seed=0)
    assert [cloud.method for cloud in clouds] == list(METHODS.values())
    assert np.array_equal(clouds[0].score, shown.score("joint").flatten())


@pytest.mark.parametrize(
    ("plan", "moment"), [(CHANNELS, 2), (TINY_CLUSTERS, 3)], ids=("channels", "clusters")
)
def test_an_interruption_changes_nothing(tiny, plan, moment, undrawn, tmp_path, monkeypatch):
    def run(folder):
        return report(plan, tiny_network(tiny, 3), [LAYERS], Request("", folder)).as_json()

    whole = run(tmp_path / "whole")
    calls = []
    found = faithfulness.joint_contributions

    def interrupted(*given):
        calls.append(1)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return found(*given)

    monkeypatch.setattr(faithfulness, "joint_contributions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    assert run(tmp_path / "cut") == whole
    assert len(calls) == 3 + 1  # what was found before is not found again


def test_the_typical_picture_is_the_median():
    def row(name, value):
        return Row(name, "joint", 0, 1.0, {"pearson": value})

    values = {"a": 0.9, "b": None, "c": 0.1, "d": 0.5}
    assert typical(Evaluation(LAYERS, tuple(row(*item) for item in values.items()))) == "d"
    assert typical(Evaluation(LAYERS, (row("b", None),))) == "b"


def test_pairs_of_layers_are_two_different_ones_each_once():
    assert layer_pairs([("a", "b"), ("b", "c"), ("a", "b")]) == [("a", "b"), ("b", "c")]
    for names in (("a",), ("a", "b", "c"), ("a", "a")):
        with pytest.raises(QueryError, match="name two different layers"):
            layer_pairs([names])


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        (("squeeze.1", "nowhere"), UnknownLayerError, "no layer is called 'nowhere'"),
        (("expand.1", "squeeze.1"), QueryError, "squeeze.1 comes first"),
        (("beside.1", "expand.1"), QueryError, "neither leads to the other"),
        (("squeeze.1", "output"), QueryError, "no channels at positions"),
        (("squeeze.1", "classifier.3"), QueryError, "1 positions, too few for 3 clusters"),
    ],
)
def test_layers_that_are_refused_before_anything_is_compared(tiny, tmp_path, layers, kind, message):
    with pytest.raises(kind, match=message):
        report(TINY_CLUSTERS, tiny_network(tiny), [LAYERS, layers], Request("", tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_papers_figures_stand_beside_its_layers_only():
    (layers,) = CHANNELS.layers["SqueezeNet"]
    assert CHANNELS.papers("SqueezeNet", layers) == CHANNELS.paper
    assert not CHANNELS.papers("SqueezeNet", ("features.10", "features.12"))
    assert not CHANNELS.papers("DigitNet", CHANNELS.layers["DigitNet"][0])
    assert not CLUSTERS.papers("SqueezeNet", CLUSTERS.layers["SqueezeNet"][0])


@pytest.mark.parametrize(("plan", "count"), [(CHANNELS, 24 * 32), (CLUSTERS, 5 * 5)])
def test_digits_with_layers_of_ones_own(undrawn, tmp_path, plan, count):
    request = Request("digits", tmp_path, samples=1, layers=(("relu2", "relu3"),))
    found = cnn.run(plan, request)
    assert {row.layers for row in found.rows} == {("relu2", "relu3")}
    assert found.facts["pairs of relu2 and relu3"] == count
    assert "DigitNet" in found.title
    assert {row.paper for row in found.rows} == {None}


@pytest.fixture(scope="module")
def pretrained(torchvision_models, shared):
    return squeezenet(shared)


def test_channels_of_squeezenet(pretrained, shared):
    """A few channels of each layer: all of them take seconds."""
    x = read_photo(shared / "imagenet" / "n02391049_zebra.JPEG").x
    with torch.no_grad():
        number = int(pretrained(x)[0].argmax())
        assert class_names(shared)[number] == "zebra"
        explainer = PAPERS.explainer(of_class(pretrained, number))
        R = explainer(x, target=0)
        (layers,) = CHANNELS.layers["SqueezeNet"]
        some = [
            family[::step] for family, step in zip(Families(R, layers).sets, (4, 16), strict=True)
        ]
        given = dict(zip(layers, some, strict=True))
        families = Families(R, layers, lambda R, layer: given[layer])
        interventions = Interventions(explainer, x, target=0)
        contribution = joint_contributions(interventions, *families.sets)
        assert contribution.shape == (16, 16)
        found = pearson(families.joint(), contribution)
    assert found is not None
    assert found > 0.7
