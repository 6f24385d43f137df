"""Additive and joint relevance of clusters beside interventions: the experiment of Fig. A.3."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import nrm
from nrm import composites
from nrm.errors import InputError, QueryError
from nrm.evaluation import Interventions, pearson
from nrm.experiments.additive import (
    Effect,
    Mean,
    Sample,
    Score,
    additive_ceiling,
    contributions,
    experiment,
    mean_with_interval,
)
from nrm.experiments.additive.__main__ import PICTURE, RESULT, choose, main
from nrm.experiments.additive.comparison import overlap, scores
from nrm.experiments.additive.drawing import typical

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


def test_the_experiment_refuses_what_it_cannot_compare():
    explainer = nrm.Explainer(tiny().double().eval())
    sample = Sample("noise", _picture(), _picture()[0].permute(1, 2, 0).numpy())
    for layers in (["stem"], ["stem", "stem"]):
        with pytest.raises(QueryError, match="at least two layers, each once"):
            experiment(explainer, [sample], layers, 2)
    with pytest.raises(InputError, match="no pictures"):
        experiment(explainer, [], ["stem", "last"], 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Some pictures, and the tiny model where the command finds it."""
    from PIL import Image

    made = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.JPG", "c.png", "d.png"):
        Image.fromarray(made.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(
            tmp_path / "pictures" / name
        )
    (tmp_path / "pictures" / "names.txt").write_text("no picture")
    module = ModuleType("tiny_model")
    module.tiny = tiny
    monkeypatch.setitem(sys.modules, "tiny_model", module)
    return tmp_path


def _command(folder, out, *more):
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("--pictures", str(folder / "pictures"), "--out", str(folder / out)),
                *("--model", "tiny_model:tiny", "--layers", "stem,branch,last"),
                *("--k", "3", "--size", "32", *more),
            ]
        )
    return ended.value.code


def test_the_command_writes_its_results(folder, capsys):
    assert _command(folder, "out", "--samples", "3") == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == [RESULT, PICTURE]
    assert (folder / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    text = (folder / "out" / RESULT).read_text()
    result = json.loads(text)
    assert [pair["layers"] for pair in result["pairs"]] == [
        ["stem", "branch"],
        ["stem", "last"],
        ["branch", "last"],
    ]
    for pair in result["pairs"]:
        assert len(pair["pictures"]) == 3
        for effect in Effect:
            each = [one["correlations"][effect]["joint"] for one in pair["pictures"]]
            found = pair["correlations"][effect]["joint"]
            assert found["mean"] == pytest.approx(np.mean(each))
            assert found["low"] <= found["mean"] <= found["high"]
            for one in pair["pictures"]:
                assert one["correlations"][effect]["additive"] == pytest.approx(
                    pearson(
                        torch.tensor(one["scores"]["additive"]),
                        torch.tensor(one["contributions"][effect]),
                    ),
                    abs=1e-6,
                )
    assert "stem x branch, 3 pictures" in capsys.readouterr().out
    assert _command(folder, "again", "--samples", "3") == 0
    assert (folder / "again" / RESULT).read_text() == text
    assert sorted(p.name for p in folder.iterdir()) == ["again", "out", "pictures"]


def test_the_seed_chooses_the_pictures(folder):
    pictures = folder / "pictures"
    assert len(choose(pictures, 10, 0)) == 4
    assert choose(pictures, 2, 0) == choose(pictures, 2, 0)
    assert {tuple(choose(pictures, 2, seed)) for seed in range(9)} != {
        tuple(choose(pictures, 2, 0))
    }


def test_the_command_refuses_in_one_line(folder, capsys):
    assert _command(folder, "out", "--layers", "stem") == 2
    assert "at least two layers" in capsys.readouterr().err
    assert _command(folder, "out", "--layers", "stem,nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    assert _command(folder, "out", "--pictures", str(folder / "none")) == 2
    assert "no such folder" in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert _command(folder, "out", "--pictures", str(folder / "empty")) == 2
    assert "holds none of" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.skipif(
    not (DATA / "squeezenet").exists(), reason="needs the pretrained SqueezeNet in ../shared/data"
)
def test_joint_relevance_predicts_what_is_lost_only_jointly(torchvision_models):
    from safetensors.torch import load_file

    from nrm.cli.pictures import imagenet, read_image

    model = torchvision_models.squeezenet1_0()
    model.load_state_dict(load_file(DATA / "squeezenet" / "squeezenet1_0.safetensors"))
    picture = imagenet(read_image(DATA / "imagenet" / "n01833805_hummingbird.JPEG"))
    sample = Sample("hummingbird", picture.x, picture.shown)
    explainer = nrm.Explainer(model.eval())
    result, drawn = experiment(explainer, [sample], ["features.10", "features.12"], 4)
    found = result["pairs"][0]["correlations"]
    assert found["joint"]["joint"]["mean"] > 0.85
    assert found["joint"]["joint"]["mean"] > found["joint"]["additive"]["mean"] + 0.1
    assert found["total"]["additive"]["mean"] > 0.8
    assert found["total"]["either"]["mean"] > found["total"]["additive"]["mean"]
    assert typical(drawn) is drawn[0]
