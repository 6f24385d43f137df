"""Models that return a map of classes: a class is explained by its mean, or at one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer", reason="the command line's packages are not installed")

from PIL import Image
from typer.testing import CliRunner

import nrm
from nrm.cli import app as commands
from nrm.cli import report
from nrm.cli.commands import CommandError
from nrm.cli.models import split_place

HERE = __name__


def segmenter(*last: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Upsample(scale_factor=2)
        )


def classifier() -> nn.Module:
    return nn.Sequential(segmenter(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def small(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((12, 12)))).permute(2, 0, 1).float() / 255


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a picture, in which nothing is drawn but its relevance kept."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report.plot, "single", lambda relevance, **_: relevance)
    monkeypatch.setattr(report.plot, "overview", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(report.plot, "save", lambda found, path: torch.save(found, path))
    return tmp_path


def explain(model: str, *more: object) -> Any:
    given = ["explain", "picture.png", "--model", f"{HERE}:{model}"]
    options = ["--transform", f"{HERE}:small", "--out", "out", *map(str, more)]
    return CliRunner().invoke(commands.app, [*given, *options], catch_exceptions=False)


def test_a_class_of_a_map_and_one_of_its_places(here: Path) -> None:
    found = explain("segmenter", "--target", "1", "--target", "1,2,7", "--target", "top1")
    assert found.exit_code == 0, found.stderr
    with Image.open("picture.png") as image:
        x = small(image)[None]
    model = segmenter().eval()
    output = model(x)[0].detach()
    means = output.flatten(1).mean(1)
    entries = report.explanations(json.loads((here / "out" / "result.json").read_text()))
    top = int(means.argmax())
    wanted = [nrm.Average(1), (1, 2, 7)] + ([] if top == 1 else [nrm.Average(top)])
    names = ["target_1_", "target_1_2_7_", *([] if top == 1 else [f"target_{top}_"])]
    values = [means[1], output[1, 2, 7], *([] if top == 1 else [means[top]])]
    assert len(entries) == len(wanted)
    explainer = nrm.Explainer(model)
    for entry, target, name, value in zip(entries, wanted, names, values, strict=True):
        assert entry["logit"] == pytest.approx(float(value), rel=1e-5)
        assert entry["place"] == ([2, 7] if target == (1, 2, 7) else "mean")
        assert entry["probability"] is None
        drawn = torch.load(here / "out" / f"{name}heatmap.png")
        torch.testing.assert_close(drawn, explainer(x, target=target).heatmap()[0])


def test_what_result_json_says_of_the_other_classes(here: Path) -> None:
    assert explain("segmenter").exit_code == 0
    result = json.loads((here / "out" / "result.json").read_text())
    assert result["outputs"] == 3
    values = [one["value"] for one in result["largest"]]
    assert values == sorted(values, reverse=True)
    assert result["target"] == result["largest"][0]["target"]
    assert result["place"] == "mean"


@pytest.mark.parametrize(
    ("model", "target", "said"),
    [
        ("segmenter", "1,2", "names 1 coordinates, but the model's output is a map of 10 x 10"),
        ("segmenter", "1,2,10", "outside of the map of 10 x 10"),
        ("segmenter", "7,2,3", "target 7 is out of range"),
        ("classifier", "1,2,3", "names 2 coordinates, but the model's output is [1, classes]"),
    ],
)
def test_places_that_there_are_not(here: Path, model: str, target: str, said: str) -> None:
    refused = explain(model, "--target", target)
    assert refused.exit_code == 2
    assert said in " ".join(refused.stderr.split())


def test_commas_in_names_of_classes() -> None:
    assert split_place("tench, Tinca tinca", ()) == ("tench, Tinca tinca", None)
    assert split_place("tench, Tinca tinca", (4, 4)) == ("tench, Tinca tinca", None)
    assert split_place(" sky, 3,0", (4, 4)) == ("sky", (3, 0))
    with pytest.raises(CommandError, match="class,y,x"):
        split_place("sky,3", (4, 4))
