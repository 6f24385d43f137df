"""`cnn-channels`, `cnn-clusters`: the choice of pictures, one class, the experiment, its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nrm.cli.errors import CommandError
from nrm.errors import InputError, QueryError, UnknownLayerError
from nrm.evaluation import faithfulness
from nrm.evaluation.faithfulness import Families
from nrm.evaluation.fingerprint import digest
from nrm.evaluation.intervention import Interventions, joint_contributions
from nrm.evaluation.metrics import pearson
from nrm.experiments import digit_net
from nrm.experiments.cnn import study as studies
from nrm.experiments.cnn import subject as subjects
from nrm.experiments.cnn.data import WEIGHTS, Photo, choose, labels, network, read
from nrm.experiments.cnn.experiment import CnnPairs, report
from nrm.experiments.cnn.layers import pairs
from nrm.experiments.cnn.one_class import of_class
from nrm.experiments.cnn.plan import CHANNELS, CLUSTERS
from nrm.experiments.cnn.study import METHODS, Study, typical
from nrm.experiments.cnn.subject import Subject, load
from nrm.experiments.cnn.walks import PAPERS
from nrm.experiments.comparison import steps
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
TINY_CLUSTERS = replace(CLUSTERS, k={"SqueezeNet": 3})
PLANS = [CHANNELS, TINY_CLUSTERS]


def photo(seed=0):
    x = torch.rand(1, 3, 13, 13, generator=torch.Generator().manual_seed(seed))
    return Photo(f"picture {seed}", x, x[0].permute(1, 2, 0).numpy())


def subject(model, count=1):
    photos = [photo(seed) for seed in range(count)]
    return Subject("SqueezeNet", "tiny", "pictures", model, photos, None)


def study_of(model, plan, kept, layers=LAYERS, count=1):
    return Study(subject(model, count), plan, layers, kept, 0)


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


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.part)
@pytest.mark.parametrize("walks", OTHERS, ids=lambda walks: walks.key)
def test_other_walks_are_those_of_their_own_explainer(tiny, plan, walks):
    x, by = photo().x, plan.by("SqueezeNet", 0)
    families = Families(PAPERS.explainer(tiny)(x, target=1), LAYERS, by)
    own = walks.explainer(tiny)(x, target=1)
    score = JointRelevance(walks, tiny, LAYERS, by)(families, None)
    torch.testing.assert_close(score, Families(own, LAYERS, by).joint() * own.scale)


def test_clusters_are_found_once_for_each_picture(tiny, monkeypatch):
    from nrm.experiments.cnn import plan

    calls = []
    found = plan.clusters
    monkeypatch.setattr(plan, "clusters", lambda *a: calls.append(a[1]) or found(*a))
    families = Families(
        PAPERS.explainer(tiny)(photo().x, target=1), LAYERS, TINY_CLUSTERS.by("SqueezeNet", 0)
    )
    JointRelevance(OTHERS[0], tiny, LAYERS, TINY_CLUSTERS.by("SqueezeNet", 0))(families, None)
    assert calls == list(LAYERS)


def test_steps_end_with_all():
    assert steps(24) == (1, 2, 3, 5, 7, 10, 15, 20, 24)
    assert steps(100)[-3:] == (50, 70, 100)
    assert steps(1) == (1,)


# -- the experiment -------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.part)
def test_the_report_of_some_pictures(tiny, plan, tmp_path):
    shown = subject(tiny, 3)
    several = (LAYERS, ("squeeze.1", "beside.1"))
    studies = [Study(shown, plan, layers, tmp_path / "kept", 0) for layers in several]
    with torch.no_grad():
        found = report(studies, shown, Request("", tmp_path))
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
    study = study_of(tiny, CHANNELS, tmp_path)
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
        first = study_of(tiny, TINY_CLUSTERS, tmp_path).rows_of(photo())

        def refuse(*_, **__):
            raise AssertionError("found again")

        monkeypatch.setattr("nrm.evaluation.faithfulness.joint_contributions", refuse)
        again = study_of(tiny, TINY_CLUSTERS, tmp_path)
        assert again.rows_of(photo()) == first
        with pytest.raises(AssertionError, match="found again"):
            again.rows_of(photo(1))
        tiny.squeeze[0].weight.data *= 2  # other weights have a place of their own
        with pytest.raises(AssertionError, match="found again"):
            study_of(tiny, TINY_CLUSTERS, tmp_path).rows_of(photo())


@pytest.mark.parametrize(
    ("plan", "moment"), [(CHANNELS, 2), (TINY_CLUSTERS, 3)], ids=("channels", "clusters")
)
def test_an_interruption_changes_nothing(tiny, plan, moment, tmp_path, monkeypatch):
    def run(folder):
        shown = subject(tiny, 3)
        with torch.no_grad():
            study = Study(shown, plan, LAYERS, folder, 0)
            return report([study], shown, Request("", folder)).as_json()

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


def test_the_typical_picture_is_the_median(tiny, tmp_path):
    def row(name, value):
        return studies.Found(name, "joint", 0, 1.0, {"pearson": value})

    study = study_of(tiny, CHANNELS, tmp_path)
    values = {"a": 0.9, "b": None, "c": 0.1, "d": 0.5}
    assert typical(study.joined([row(*item) for item in values.items()])) == "d"
    assert typical(study.joined([row("b", None)])) == "b"


def test_both_are_known_by_name():
    for plan in (CHANNELS, CLUSTERS):
        experiment = EXPERIMENTS[plan.name]
        assert isinstance(experiment, CnnPairs)
        assert experiment.plan is plan
        assert experiment.options == {"layers", "weights"}
        assert experiment.summary


# -- layers ---------------------------------------------------------------------------------------


def test_pairs_of_layers_are_two_different_ones_each_once():
    assert pairs([("a", "b"), ("b", "c"), ("a", "b")]) == [("a", "b"), ("b", "c")]
    for names in (("a",), ("a", "b", "c"), ("a", "a")):
        with pytest.raises(QueryError, match="name two different layers"):
            pairs([names])


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
        study_of(tiny, TINY_CLUSTERS, tmp_path, layers)
    assert not list(tmp_path.iterdir())


def test_the_papers_figures_stand_beside_its_layers_only():
    (layers,) = CHANNELS.layers["SqueezeNet"]
    assert CHANNELS.papers("SqueezeNet", layers) == CHANNELS.paper
    assert not CHANNELS.papers("SqueezeNet", ("features.10", "features.12"))
    assert not CHANNELS.papers("DigitNet", CHANNELS.layers["DigitNet"][0])
    assert not CLUSTERS.papers("SqueezeNet", CLUSTERS.layers["SqueezeNet"][0])


# -- digits and VGG16 -----------------------------------------------------------------------------


def test_digits_with_layers_of_ones_own(tmp_path, monkeypatch):
    train = digit_net.train
    monkeypatch.setattr(digit_net, "train", lambda seed: train(epochs=1, seed=seed))
    request = Request("digits", tmp_path, samples=2, layers=(("relu2", "relu3"),))
    for plan, count in ((CHANNELS, 24 * 32), (CLUSTERS, 5 * 5)):
        found = CnnPairs(plan).run(request)
        assert {row.layers for row in found.rows} == {("relu2", "relu3")}
        assert found.facts["pairs of relu2 and relu3"] == count
        assert "DigitNet" in found.title
        assert "scikit-learn's digits" in found.facts["network"]
        assert {row.paper for row in found.rows} == {None}
    with pytest.raises(InputError, match="--weights are those of VGG16"):
        load(replace(request, weights=tmp_path / "vgg.pth"), 1)


def folder_of_pictures(tmp_path):
    from PIL import Image

    (tmp_path / "imagenet").mkdir()
    Image.new("RGB", (300, 260), "green").save(tmp_path / "imagenet" / "a.png")
    return tmp_path


class Small(nn.Sequential):
    """In VGG16's place, which has half a gigabyte."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, stride=32), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
        self.append(nn.Flatten()).append(nn.Linear(125, 6)).append(nn.ReLU())
        self.append(nn.Linear(6, 3))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_of_ones_own(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "VGG16", f"{__name__}:Small")
    torch.manual_seed(3)
    model = Small()
    file = tmp_path / f"weights.{suffix}"
    save = torch.save if suffix == "pth" else save_file
    save(model.state_dict(), file)
    request = Request(str(folder_of_pictures(tmp_path)), tmp_path, weights=file)
    request = replace(request, layers=(("1", "3"),))
    assert digest(load(request, 1).model) == digest(model.eval())
    found = CnnPairs(CHANNELS).run(request)
    assert found.facts["network"] == f"VGG16, with the weights of {file.name}"
    assert "VGG16" in found.title
    assert found.facts["pairs of 1 and 3"] == 20
    save({"0.weight": torch.zeros(1)}, file)
    with pytest.raises(CommandError, match="does not fit the model"):
        load(request, 1)


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
