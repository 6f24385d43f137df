"""Additive and joint relevance of clusters beside interventions: the experiment of Fig. A.3."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nrm
from nrm import composites
from nrm.errors import NrmError
from nrm.evaluation import Interventions, pearson
from nrm.experiments import digit_net
from nrm.experiments.additive import experiment as experiments
from nrm.experiments.additive.comparison import Effect, Score, overlap, scores
from nrm.experiments.additive.contribution import contributions
from nrm.experiments.additive.correlation import Mean, additive_ceiling, mean_with_interval
from nrm.experiments.additive.drawing import EFFECTS, SCORES, typical
from nrm.experiments.additive.experiment import Additive
from nrm.experiments.additive.study import Study, means
from nrm.experiments.cnn.data import Photo, read
from nrm.experiments.cnn.subject import Subject, load
from nrm.experiments.report import PAGE, RESULT
from nrm.experiments.request import Request

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def _packages():
    for package in ("sklearn", "typer", "matplotlib", "PIL", "safetensors", "rich"):
        pytest.importorskip(package, reason=f"{package}, which the command needs, is missing")


class Branching(nn.Module):
    """A skip connection, so that a walk may pass a layer or not."""

    def __init__(self, activation):
        super().__init__()
        linear = not isinstance(activation, nn.ReLU)
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=not linear)
        self.first = activation
        self.branch = nn.Conv2d(6, 6, 3, padding=1, bias=not linear)
        self.second = activation
        self.last = nn.Conv2d(6, 8, 3, stride=2, bias=not linear)
        self.third = activation
        self.head = nn.Linear(8, 4, bias=not linear)

    def forward(self, x):
        x = self.first(self.stem(x))
        x = x + self.second(self.branch(x))
        return self.head(self.third(self.last(x)).mean((2, 3)))


def tiny():
    torch.manual_seed(3)
    return Branching(nn.ReLU())


def linear():
    torch.manual_seed(3)
    return Branching(nn.Identity())


def _picture(seed=0):
    return torch.rand(1, 3, 17, 17, generator=torch.Generator().manual_seed(seed)).double()


def _explained(model, composite=None):
    x = _picture()
    return x, nrm.Explainer(model.double().eval(), composite)(x)


def _hooked(model, x, zeroed):
    """The model's output while forward hooks zero some modules' outputs."""
    handles = [
        getattr(model, name).register_forward_hook(
            lambda module, args, out, gone=gone: out * (~gone)
        )
        for name, gone in zeroed.items()
    ]
    try:
        with torch.no_grad():
            return model(x)[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("upper", ["branch", "last"])
def test_contributions_are_those_of_forward_hooks(upper):
    model = tiny()
    x, R = _explained(model)
    target = int(R.target)
    a, b = nrm.clusters(R, "stem", 3), nrm.clusters(R, upper, 4)
    found = contributions(Interventions(nrm.Explainer(model), x, target=target), a.sets, b.sets)
    whole = _hooked(model, x, {})[target]
    torch.testing.assert_close(found.output, whole)
    first = [a.labels == i for i in range(3)]
    second = [b.labels == j for j in range(4)]
    for i, gone in enumerate(first):
        torch.testing.assert_close(
            found.first[i], whole - _hooked(model, x, {"stem": gone})[target]
        )
        for j, also in enumerate(second):
            alone = _hooked(model, x, {upper: also})[target]
            both = _hooked(model, x, {"stem": gone, upper: also})[target]
            torch.testing.assert_close(found.second[j], whole - alone)
            torch.testing.assert_close(found.total[i, j], whole - both)
            joint = whole - _hooked(model, x, {"stem": gone})[target] - alone + both
            torch.testing.assert_close(found.joint[i, j], joint)
    assert found.joint.abs().max() > 1e-3


def test_scores_are_queries_of_the_measure():
    _, R = _explained(tiny())
    a, b = nrm.clusters(R, "stem", 3), nrm.clusters(R, "last", 4)
    found = scores(R, a, b)
    for i, s in enumerate(a):
        for j, t in enumerate(b):
            expected = {
                Score.JOINT: R(s, t),
                Score.ADDITIVE: R.additive(s, t, layers=2),
                Score.EITHER: R(s | t),
                Score.PRODUCT: R(s) * R(t),
            }
            for score, value in expected.items():
                torch.testing.assert_close(found[score][i, j], value[0])
    one = torch.tensor(1.0).double()
    torch.testing.assert_close(found[Score.JOINT].sum(), one)  # both layers are cuts
    torch.testing.assert_close(found[Score.PRODUCT].sum(), one)
    # Over two layers, the additive relevance is the mean of the other two.
    torch.testing.assert_close(
        found[Score.ADDITIVE], (found[Score.JOINT] + found[Score.EITHER]) / 2
    )


def test_relevance_is_contribution_where_the_network_is_linear():
    """Removing neurons removes the walks that visit them, and nothing else changes."""
    x, R = _explained(linear(), composites.LRPZero())
    for layer in ("branch", "last"):
        a, b = nrm.clusters(R, "stem", 3), nrm.clusters(R, layer, 3)
        interventions = Interventions(nrm.Explainer(linear().double().eval()), x, target=R.target)
        found = contributions(interventions, a.sets, b.sets)
        by_score = scores(R, a, b)
        torch.testing.assert_close(by_score[Score.JOINT] * R.scale, found.joint)
        torch.testing.assert_close(by_score[Score.EITHER] * R.scale, found.total)


def test_overlap_is_the_share_of_the_picture_in_both():
    coarse = torch.tensor([[0, 1], [0, 1]])
    fine = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [2, 2, 2, 2], [2, 2, 2, 1]])
    expected = torch.tensor([[0.25, 0.25], [0, 1 / 16], [0.25, 3 / 16]])
    torch.testing.assert_close(overlap(fine, coarse, 3, 2), expected)
    torch.testing.assert_close(overlap(coarse, fine, 2, 3), expected.T)


def test_no_sum_over_rows_and_columns_correlates_better_than_the_ceiling():
    made = torch.Generator().manual_seed(0)
    values = torch.rand(4, 5, generator=made).double()
    ceiling = additive_ceiling(values)
    tried = [
        pearson(rows[:, None] + columns, values)
        for rows, columns in (
            (torch.randn(4, generator=made), torch.randn(5, generator=made)) for _ in range(200)
        )
    ]
    assert 0.5 * ceiling < max(tried) <= ceiling < 1
    assert additive_ceiling(values[:, :1] + values[:1]) == pytest.approx(1)


def test_intervals():
    values = [0.1, 0.5, None, 0.9, 0.7]
    found = mean_with_interval(values, seed=0)
    assert found == mean_with_interval(values, seed=0)
    assert found.pictures == 4
    assert found.mean == pytest.approx(0.55)
    assert 0.1 < found.low < found.mean < found.high < 0.9
    assert mean_with_interval([0.5], 0) == Mean(0.5, 0.5, 0.5, 1)
    assert mean_with_interval([None], 0) is None


# -- the experiment -------------------------------------------------------------------------------

LAYERS = [("stem", "last"), ("branch", "last")]


@pytest.fixture
def subject(monkeypatch):
    """The tiny model in place of the experiment's network."""
    photos = [
        Photo(f"picture {seed}", _picture(seed), _picture(seed)[0].permute(1, 2, 0).numpy())
        for seed in range(4)
    ]
    model = tiny().double().eval().requires_grad_(False)
    found = Subject("SqueezeNet", "tiny", "noise", model, photos, None)
    monkeypatch.setattr(
        experiments, "load", lambda request, count: replace(found, photos=photos[:count])
    )
    return found


def _request(folder, **more):
    return Request("anywhere", folder / "kept", **{"samples": 3, "layers": tuple(LAYERS), **more})


def test_the_experiment_from_end_to_end(subject, tmp_path):
    Additive().run(_request(tmp_path)).write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "additive-2.png",
        "additive.png",
        "kept",
        PAGE,
        RESULT,
    ]
    result = json.loads((tmp_path / RESULT).read_text(encoding="utf-8"))
    pairs = result["details"]["pairs"]
    assert [tuple(pair["layers"]) for pair in pairs] == LAYERS
    rows = iter(result["rows"])
    for pair in pairs:
        assert len(pair["pictures"]) == 3
        for effect in Effect:
            for score in Score:
                each = [one["correlations"][effect][score] for one in pair["pictures"]]
                for one, value in zip(pair["pictures"], each, strict=True):
                    scores, effects = (
                        torch.tensor(one[kind][name])
                        for kind, name in (("scores", score), ("contributions", effect))
                    )
                    assert value == pytest.approx(pearson(scores, effects), abs=1e-6)
                row = next(rows)
                assert row["layers"] == pair["layers"]
                assert row["method"] == f"{SCORES[score]}, with {EFFECTS[effect]}"
                assert row["pearson"] == pytest.approx(np.mean(each))
                assert row["ci_low"] <= row["pearson"] <= row["ci_high"]
                assert (row["paper"], row["samples"]) == (None, 3)
            for limit in pair["limits"][effect].values():
                assert limit["low"] <= limit["mean"] <= limit["high"]
    assert next(rows, None) is None
    (table,) = result["tables"]
    assert len(table["lines"]) == 12
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert "Correlation with what removing two clusters does" in page


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take longer than all else."""
    monkeypatch.setattr(experiments, "draw", lambda *_: None)


def test_it_goes_on_after_an_interruption(subject, undrawn, tmp_path, monkeypatch):
    whole = Additive().run(_request(tmp_path / "whole")).as_json()
    real, calls = Study._compare, []

    def interrupted(self, photo, pairs):
        calls.append((photo.name, pairs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, photo, pairs)

    monkeypatch.setattr(Study, "_compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Additive().run(_request(tmp_path))
    assert Additive().run(_request(tmp_path)).as_json() == whole
    assert calls[3:] == [("picture 2", LAYERS)]  # those before were not compared again
    assert Additive().run(_request(tmp_path)).as_json() == whole
    assert len(calls) == 4

    for damage in ("{", "{}", '{"labels": [1]}'):  # as a full disk may leave it
        file = next(f for f in (tmp_path / "kept").rglob("*.json") if f.stem != "settings")
        file.write_text(damage)
        assert Additive().run(_request(tmp_path)).as_json() == whole
    assert len(calls) == 7


def test_more_pictures_and_layers_keep_those_before(subject, undrawn, tmp_path):
    few = Additive().run(_request(tmp_path, samples=2, layers=(LAYERS[0],)))
    more = Additive().run(_request(tmp_path, samples=4))
    (before,), (after, _) = (run.details["pairs"] for run in (few, more))
    assert after["pictures"][:2] == before["pictures"]


def test_other_weights_are_not_taken_for_the_same(subject, undrawn, tmp_path):
    before = Additive().run(_request(tmp_path))
    with torch.no_grad():
        subject.model.head.weight += 1
    after = Additive().run(_request(tmp_path))
    assert before.facts["weights"] != after.facts["weights"]
    assert before.rows != after.rows


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("stem",), "name two different layers"),
        (("stem", "stem"), "name two different layers"),
        (("stem", "branch", "last"), "name two different layers"),
        (("last", "stem"), "Name the lower layer first"),
        (("stem", "nowhere"), "nowhere"),
        (("stem", "head"), "no channels"),
    ],
)
def test_layers_that_cannot_be_compared(subject, tmp_path, layers, message):
    with pytest.raises(NrmError, match=message):
        Additive().run(_request(tmp_path, layers=(layers,)))
    assert not list(tmp_path.iterdir())


def test_digits_are_explained_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(digit_net, "train", partial(digit_net.train, epochs=1))
    report = Additive().run(Request("digits", tmp_path / "kept", samples=2))
    assert {row.layers for row in report.rows} == {("relu2", "relu3")}
    assert {row.samples for row in report.rows} == {2}
    assert report.title.endswith("in DigitNet, beside interventions")


@pytest.mark.skipif(
    not (DATA / "squeezenet").exists(), reason="needs the pretrained SqueezeNet in ../shared/data"
)
def test_joint_relevance_predicts_what_is_lost_only_jointly(torchvision_models, tmp_path):
    request = Request(str(DATA), tmp_path, samples=1)
    subject = load(request, 1)
    study = Study(subject, [("features.10", "features.12")], 4, tmp_path, 0)
    compared = study.compared(read(DATA / "imagenet" / "n01833805_hummingbird.JPEG"))
    assert typical(compared) is compared[0]
    found = means(compared, 0)
    assert found["joint"]["joint"].mean > 0.85
    assert found["joint"]["joint"].mean > found["joint"]["additive"].mean + 0.1
    assert found["total"]["additive"].mean > 0.8
    assert found["total"]["either"].mean > found["total"]["additive"].mean
