"""`nrm relmax` on a folder of pictures: what it writes, prints and refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer", reason="nrm[cli] is not installed")
pytest.importorskip("pyarrow", reason="nrm[dataset] is not installed")

import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import nrm
from nrm.cli.app import app
from nrm.cli.relmax import Made

HERE = "support.dataset:network"
GREY = f"{__name__}:grey"


def grey(picture: Image.Image) -> Tensor:
    """`[1, 6, 6]` from 0 to 1."""
    return torch.from_numpy(np.array(picture.convert("L"))).float()[None] / 255


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(12):
        file = tmp_path / "data" / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (6, 6), dtype=np.uint8)).save(file)
    (tmp_path / "data" / "a" / "bad.png").write_text("no picture")
    return tmp_path / "data"


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(sys.modules, "test_cli_relmax", sys.modules[__name__])
    out = str(folder.parent / "out")
    return [
        "relmax", "--model", HERE, "--data", str(folder), "--transform", GREY, "--layers", "1,3",
        "--out", out, "--shard", "8", "--batch", "4", "--k", "3", "--quiet",
    ]  # fmt: skip


@pytest.mark.usefixtures("captured_once")
def test_a_run_and_what_it_was_made_from(command: list[str], folder: Path) -> None:
    joint = ["--joint", "1,3", "--joint-classes", "0,1,2", "--target", "true"]
    done = CliRunner().invoke(app, [*command, *joint])
    assert done.exit_code == 0, done.output
    assert "12 explained, 1 skipped" in done.stdout
    assert "skipped: a/bad.png" in done.stderr
    results = nrm.open_results(folder.parent / "out")
    assert results.complete
    assert results.manifest["target"] == "true"
    best = results.references("3", 4)
    assert len(best) == 3
    assert best[0].name.endswith(".png")
    made = Made.from_manifest(results.manifest)
    assert "--joint-classes" in results.manifest["made_from"]["command"]
    explainer = made.explainer()
    shown = results.heatmaps(explainer, made.source(8), "3", 4)
    assert shown.heatmaps.shape == (3, 1, 6, 6)
    again = CliRunner().invoke(app, [*command, *joint])
    assert again.exit_code == 0
    other = CliRunner().invoke(app, [*command, "--composite", "LRPZero"])
    assert other.exit_code == 2
    assert "another run" in other.stderr


@pytest.mark.usefixtures("captured_once")
def test_what_is_refused(command: list[str], tmp_path: Path) -> None:
    for given, text in (
        (["--joint-classes", "1"], "without --joint"),
        (["--joint", "1"], "give two layers"),
        (["--joint", "1,3", "--joint-classes", "x"], "indices of classes"),
        (["--target", "best"], "predicted, true, or the index"),
        (["--num-gpus", "1"], "without --ray"),
        (["--k", "2"], "given 2 times"),
    ):
        done = CliRunner().invoke(app, [*command, *given])
        assert done.exit_code == 2, given
        assert text in done.stderr, given
    place = command.index("--data")
    for data, text in (
        (str(tmp_path / "none"), "no such folder"),
        ("support.dataset:no", "no 'no'"),
    ):
        done = CliRunner().invoke(app, [*command[:place], "--data", data, *command[place + 2 :]])
        assert done.exit_code == 2, data
        assert text in done.stderr, data
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("captured_once")
def test_a_data_set_by_its_name(command: list[str], tmp_path: Path) -> None:
    place = command.index("--data")
    named = [*command[:place], "--data", "support.dataset:data", *command[place + 4 :]]
    done = CliRunner().invoke(app, named)
    assert done.exit_code == 0, done.output
    assert "70 explained, 0 skipped" in done.stdout


def test_ray_may_stand_alone(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="nrm[ray] is not installed")
    seen = []

    def relmax(*args: object, **options: object) -> None:
        seen.append(options["ray"])
        raise nrm.errors.InputError("enough")

    monkeypatch.setattr("nrm.dataset.relmax", relmax)
    for given in (["--ray"], ["--ray", "--debug"], ["--ray", "host:6379"], []):
        CliRunner().invoke(app, [*command, *given])
    assert seen == [True, True, "host:6379", False]


def test_help_lists_the_commands() -> None:
    shown = CliRunner().invoke(app, ["relmax", "--help"])
    assert shown.exit_code == 0
    assert "run" in shown.stdout
    assert "--layers" in CliRunner().invoke(app, ["relmax", "run", "--help"]).stdout
