"""`cnn-channels`, `cnn-clusters`: the choice of pictures, one class, the experiment, its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nrm.errors import InputError
from nrm.evaluation.baselines import Families
from nrm.evaluation.intervention import Interventions, joint_contributions
from nrm.evaluation.metrics import pearson
from nrm.experiments.cnn import study as studies
from nrm.experiments.cnn.data import WEIGHTS, Photo, choose, labels, network, read
from nrm.experiments.cnn.experiment import CnnPairs, report
from nrm.experiments.cnn.one_class import of_class
from nrm.experiments.cnn.plan import CHANNELS, CLUSTERS
from nrm.experiments.cnn.study import METHODS, Study, steps, typical
from nrm.experiments.cnn.walks import PAPERS
from nrm.experiments.report import PAGE, RESULT
from nrm.experiments.reproduce import EXPERIMENTS
from nrm.experiments.request import Request
from nrm.experiments.walks import OTHERS, JointRelevance

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def _packages():
    for package in ("sklearn", "typer", "matplotlib", "PIL", "safetensors", "rich"):
        pytest.importorskip(package, reason=f"{package}, which the command needs, is missing")


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


LAYERS = ("squeeze.1", "expand.1")
TINY_CHANNELS = replace(CHANNELS, layers=LAYERS, combinations=24)
TINY_CLUSTERS = replace(CLUSTERS, layers=LAYERS, combinations=9, k=3)


def photo(seed=0):
    x = torch.rand(1, 3, 13, 13, generator=torch.Generator().manual_seed(seed))
    return Photo(f"picture {seed}", x, x[0].permute(1, 2, 0).numpy())


@pytest.fixture
def tiny():
    torch.manual_seed(2)
    model = Tiny().eval()
    model.classifier[1].bias.data += 1  # no class is without any activation
    return model


# -- pictures -------------------------------------------------------------------------------------


def test_pictures_are_drawn_by_the_seed(tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"{name}.JPEG").touch()
    (tmp_path / "classes.txt").touch()
    few, more = choose(tmp_path, 3, 0), choose(tmp_path, 5, 0)
    assert few == sorted(few)
    assert len(few) == 3
    assert set(few) < set(more)
    assert choose(tmp_path, 3, 1) != few
    assert len(choose(tmp_path, 100, 0)) == 8


def test_a_folder_without_pictures_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no folder with pictures"):
            choose(folder, 3, 0)


# -- one class ------------------------------------------------------------------------------------


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


def test_one_class_of_a_linear_layer():
    model = nn.Sequential()
    model.classifier = nn.Sequential(nn.Linear(4, 3, bias=False))
    narrow = of_class(model, 2).classifier
    x = torch.rand(2, 4)
    torch.testing.assert_close(narrow(x), model.classifier(x)[:, 2:])


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


# -- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [TINY_CHANNELS, TINY_CLUSTERS], ids=lambda plan: plan.part)
@pytest.mark.parametrize("walks", OTHERS, ids=lambda walks: walks.key)
def test_other_walks_are_those_of_their_own_explainer(tiny, plan, walks):
    x, by = photo().x, plan.by(0)
    families = Families(PAPERS.explainer(tiny)(x, target=1), LAYERS, by)
    own = walks.explainer(tiny)(x, target=1)
    score = JointRelevance(walks, tiny, LAYERS, by)(families, None)
    torch.testing.assert_close(score, Families(own, LAYERS, by).joint() * own.scale)


def test_clusters_are_found_once_for_each_picture(tiny, monkeypatch):
    from nrm.experiments.cnn import plan

    calls = []
    found = plan.clusters
    monkeypatch.setattr(plan, "clusters", lambda *a: calls.append(a[1]) or found(*a))
    families = Families(PAPERS.explainer(tiny)(photo().x, target=1), LAYERS, TINY_CLUSTERS.by(0))
    JointRelevance(OTHERS[0], tiny, LAYERS, TINY_CLUSTERS.by(0))(families, None)
    assert calls == list(LAYERS)


def test_steps_end_with_all():
    assert steps(24) == (1, 2, 3, 5, 7, 10, 15, 20, 24)
    assert steps(100)[-3:] == (50, 70, 100)
    assert steps(1) == (1,)


# -- the experiment -------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [TINY_CHANNELS, TINY_CLUSTERS], ids=lambda plan: plan.part)
def test_the_report_of_some_pictures(tiny, plan, tmp_path):
    study = Study(tiny, plan, tmp_path / "kept", 0)
    photos = [photo(seed) for seed in range(3)]
    found = report(study, photos, None, Request("", tmp_path))
    assert [row.method for row in found.rows] == list(METHODS.values())
    assert [row.paper for row in found.rows] == [plan.paper.get(key) for key in METHODS]
    assert {row.samples for row in found.rows} == {3}
    assert all(row.layers == LAYERS for row in found.rows)
    found.write(tmp_path)
    assert (tmp_path / PAGE).is_file()
    assert all((tmp_path / picture.file).is_file() for picture in found.pictures)
    samples = json.loads((tmp_path / RESULT).read_text())["details"]["samples"]
    assert len(samples) == 3 * len(METHODS)
    with torch.no_grad():
        predicted = [int(tiny(one.x)[0].argmax()) for one in photos]
    assert [one["target"] for one in samples[:: len(METHODS)]] == predicted


def test_figures_are_those_of_the_shown_picture(tiny, tmp_path):
    study = Study(tiny, TINY_CHANNELS, tmp_path, 0)
    with torch.no_grad():
        shown = study.shown(photo())
        rows = {row.method: row for row in study.rows_of(photo())}
    for key, score in shown.scores.items():
        assert score.shape == (4, 6)
        assert pearson(score, shown.contribution) == pytest.approx(rows[key].figures["pearson"])
    ranked = [float(shown.scores["joint"][pair]) for pair in shown.top(5)]
    assert ranked == sorted(ranked, reverse=True)
    assert ranked[0] == float(shown.scores["joint"].max())
    (pair, *_) = shown.top(1)
    total = shown.R.heatmap(
        *(family[i] for family, i in zip(shown.families.sets, pair, strict=True))
    )
    assert float(total.sum() * shown.R.scale) == pytest.approx(ranked[0], rel=1e-4)
    last = rows["joint"].figures["SC_24"]
    assert last == pytest.approx(float(shown.contribution.sum()), rel=1e-4, abs=1e-5)
    assert len(shown.clouds()) == len(METHODS)
    assert np.isfinite(shown.clouds()[0].score).all()


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    with torch.no_grad():
        first = Study(tiny, TINY_CLUSTERS, tmp_path, 0).rows_of(photo())

        def refuse(*_, **__):
            raise AssertionError("found again")

        monkeypatch.setattr("nrm.evaluation.faithfulness.joint_contributions", refuse)
        again = Study(tiny, TINY_CLUSTERS, tmp_path, 0)
        assert again.rows_of(photo()) == first
        with pytest.raises(AssertionError, match="found again"):
            again.rows_of(photo(1))
        tiny.squeeze[0].weight.data *= 2  # other weights have a place of their own
        with pytest.raises(AssertionError, match="found again"):
            Study(tiny, TINY_CLUSTERS, tmp_path, 0).rows_of(photo())


def test_the_typical_picture_is_the_median(tiny, tmp_path):
    def row(name, value):
        return studies.Found(name, "joint", 0, 1.0, {"pearson": value})

    study = Study(tiny, TINY_CHANNELS, tmp_path, 0)
    values = {"a": 0.9, "b": None, "c": 0.1, "d": 0.5}
    assert typical(study.joined([row(*item) for item in values.items()])) == "d"
    assert typical(study.joined([row("b", None)])) == "b"


def test_both_are_known_by_name():
    for plan in (CHANNELS, CLUSTERS):
        experiment = EXPERIMENTS[plan.name]
        assert isinstance(experiment, CnnPairs)
        assert experiment.plan is plan
        assert experiment.summary


# -- SqueezeNet -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squeezenet(torchvision_models):
    if not (DATA / WEIGHTS).is_file():
        pytest.skip("SqueezeNet's weights are not there")
    return network(DATA)


def test_channels_of_squeezenet(squeezenet, tmp_path):
    """A few channels of each layer: all of them take seconds."""
    file = DATA / "imagenet" / "n02391049_zebra.JPEG"
    if not file.is_file():
        pytest.skip("the picture is not there")
    x = read(file).x
    with torch.no_grad():
        number = int(squeezenet(x)[0].argmax())
        assert labels(DATA)[number] == "zebra"
        explainer = PAPERS.explainer(of_class(squeezenet, number))
        R = explainer(x, target=0)
        some = [
            family[::step]
            for family, step in zip(Families(R, CHANNELS.layers).sets, (4, 16), strict=True)
        ]
        given = dict(zip(CHANNELS.layers, some, strict=True))
        families = Families(R, CHANNELS.layers, lambda R, layer: given[layer])
        interventions = Interventions(explainer, x, target=0)
        contribution = joint_contributions(interventions, *families.sets)
        assert contribution.shape == (16, 16)
        found = pearson(families.joint(), contribution)
    assert found is not None
    assert found > 0.7
