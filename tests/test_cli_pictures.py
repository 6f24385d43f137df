"""Several pictures: which are meant, where their results go, the index, and runs that end early."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer", reason="the command line's packages are not installed")

from PIL import Image
from support.command_line import run

import nrm
from nrm import cli, io
from nrm.cli import models, pictures, report
from nrm.cli.commands import CommandError

MODEL = f"{__name__}:tiny"


def tiny() -> nn.Module:
    """A classifier of three classes for colour pictures of 12 x 12, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)
        )


def small(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((12, 12)))).permute(2, 0, 1).float() / 255


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with pictures in folders."""
    for seed, name in enumerate(("a.png", "more/b.PNG", "more/c d#1.jpg", "more/deep/b.png")):
        draw(tmp_path / "photos" / name, seed)
    (tmp_path / "photos" / "notes.txt").write_text("mine")
    (tmp_path / "photos" / ".hidden").mkdir()
    draw(tmp_path / "photos" / ".hidden" / "x.png", 9)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longest, and is looked at elsewhere."""
    for name in ("single", "overview"):
        monkeypatch.setattr(report.plot, name, lambda *_, **__: None)
    monkeypatch.setattr(report.plot, "save", lambda figure, path: path.write_bytes(b"drawn"))


def explain(*more: object) -> Any:
    return run("explain", *more, "--model", MODEL, "--transform", f"{__name__}:small")


def index() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("out/index.json").read_text(encoding="utf-8"))
    return found


# -- which pictures, and where their results go ----------------------------------------------------


def folders(*given: str, out: str = "out") -> dict[str, str]:
    found = pictures.find([Path(g) for g in given], Path(out))
    return {job.picture.as_posix(): job.folder.as_posix() for job in found}


def test_pictures_that_are_named_and_those_in_folders(here: Path) -> None:
    assert folders("photos/a.png") == {"photos/a.png": "."}
    everything = {
        "photos/a.png": "a",
        "photos/more/b.PNG": "more/b",
        "photos/more/c d#1.jpg": "more/c d#1",
        "photos/more/deep/b.png": "more/deep/b",
    }
    assert folders("photos") == everything
    assert folders("photos", "photos/more/b.PNG", str(here / "photos" / "a.png")) == everything
    assert folders("photos/more/deep/b.png", "photos/more/b.PNG") == {
        "photos/more/deep/b.png": "deep/b", "photos/more/b.PNG": "b",
    }  # fmt: skip
    assert folders("photos/more/deep") == {"photos/more/deep/b.png": "b"}  # not the folder itself


def test_names_that_would_meet(here: Path) -> None:
    for name in ("a.jpg", "a.png", "index.json.png", "b.png"):
        draw(Path("same") / name, 1)
    assert sorted(folders("same").values()) == ["a.jpg", "a.png", "b", "index.json.png"]


def test_results_in_a_folder_of_pictures_are_no_pictures(here: Path) -> None:
    draw(Path("photos/out/heatmap.png"), 1)
    draw(Path("photos/earlier/heatmap.png"), 1)
    Path("photos/earlier/result.json").write_text("{}")
    assert len(folders("photos", out="photos/out")) == 4


def test_folders_without_pictures(here: Path) -> None:
    Path("empty").mkdir()
    Path("loop").mkdir()
    Path("loop/again").symlink_to("..", target_is_directory=True)
    Path("loop/x.png").symlink_to("x.png")
    for name in ("empty", "photos/.hidden/none"):
        Path(name).mkdir(exist_ok=True)
        with pytest.raises(CommandError, match="no picture in it"):
            folders(name)
    result = explain("loop")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: picture loop/x.png: no such file" in result.stderr
    assert not Path("out").exists()


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links")
def test_a_picture_behind_a_link_is_there_once(here: Path) -> None:
    Path("photos/link.png").symlink_to("a.png")
    assert "photos/link.png" in folders("photos")  # by its own name


# -- all of them -----------------------------------------------------------------------------------


def test_one_model_and_one_capture_for_all(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"model": 0, "capture": 0}
    build, capture = models.build, nrm.explainer.capture

    def built(spec: str) -> nn.Module:
        counted["model"] += 1
        return build(spec)

    def captured(*given: Any) -> Any:
        counted["capture"] += 1
        return capture(*given)

    monkeypatch.setattr(models, "build", built)
    monkeypatch.setattr(nrm.explainer, "capture", captured)
    result = explain("photos", "--out", "out")
    assert result.exit_code == 0, result.output
    assert counted == {"model": 1, "capture": 1}
    assert "folder photos: 1 files are no pictures: notes.txt" in result.stderr
    assert "4 of 4 pictures are explained; begin with out/index.html." in result.stdout

    found = index()
    assert (found["complete"], found["failed"], found["left"]) == (True, [], [])
    R = nrm.Explainer(tiny().eval())
    for entry in found["pictures"]:
        x = small(io.read_image(Path(entry["image"])))[None]
        logits = tiny()(x)[0].detach()
        (told,) = entry["explanations"]
        assert told["target"] == int(logits.argmax())
        assert told["logit"] == pytest.approx(float(logits.max()), rel=1e-5)
        folder = Path("out") / entry["folder"]
        whole = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert whole["image"] == entry["image"]
        assert sorted(p.name for p in folder.iterdir() if p.is_file()) == [
            "heatmap.png", "input.png", "overview.png", "result.json",
        ]  # fmt: skip
        assert R(x).output.argmax() == told["target"]
    page = Path("out/index.html").read_text(encoding="utf-8")
    assert 'href="more/c%20d%231/overview.png"' in page
    assert page.count("<tr>") == 4


def test_pictures_that_cannot_be_read_are_passed_over(here: Path) -> None:
    Path("photos/more/bad.png").write_bytes(b"no picture")
    result = explain("photos/more", "none.png", "photos/a.png", "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found == index()
    assert len(found["pictures"]) == 4
    assert [f["image"] for f in found["failed"]] == ["photos/more/bad.png", "none.png"]
    assert result.stderr.splitlines() == [
        "error: picture photos/more/bad.png: not a picture that Pillow can read",
        "error: picture none.png: no such file",
    ]
    assert "none.png: no such file" in Path("out/index.html").read_text(encoding="utf-8")


def test_what_is_wrong_with_all_is_said_once(here: Path) -> None:
    for wrong, message in (
        (["--target", "7"], "target 7 is out of range"),
        (["--layers", "nowhere"], "no layer is called 'nowhere'"),
        (["--labels", "photos"], "labels photos: it is a folder, not a file"),
        (["--weights", "photos"], "weights photos: it is a folder, not a file"),
        (["--composite", "GammaFlat(x)"], "give a name, or a name with numbers"),
    ):
        result = explain("photos", *wrong, "--json")
        assert (result.exit_code, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert message in result.stderr
        assert not Path("out").exists()


# -- runs that end early ---------------------------------------------------------------------------


def ending(monkeypatch: pytest.MonkeyPatch, after: int, how: Any) -> None:
    """A run ends while one more picture is drawn."""
    overview, drawn = report.plot.overview, [0]

    def draws(*given: Any) -> Any:
        drawn[0] += 1
        if drawn[0] > after:
            how()
        return overview(*given)

    monkeypatch.setattr(report.plot, "overview", draws)


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    cli._end(15, None)


@pytest.mark.parametrize(("how", "code"), [(interrupt, 130), (terminate, 143)])
def test_a_run_that_ended_early_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, how: Any, code: int
) -> None:
    with monkeypatch.context() as patched:
        ending(patched, 2, how)
        result = explain("photos")
    assert result.exit_code == code
    assert "2 of 4 pictures are explained; the same command goes on from there" in result.stderr
    assert "Traceback" not in result.stderr
    found = index()
    assert found["complete"] is False
    assert found["left"] == ["photos/more/c d#1.jpg", "photos/more/deep/b.png"]
    assert "the run ended before it" in Path("out/index.html").read_text(encoding="utf-8")
    assert not [p for p in here.rglob("*") if "-nrm-" in p.name or p.suffix == ".part"]
    kept = {p: p.stat().st_mtime_ns for p in Path("out").rglob("result.json")}
    assert len(kept) == 2

    with monkeypatch.context() as patched:
        ending(patched, 2, how)  # no more than two are drawn
        result = explain("photos")
    assert result.exit_code == 0, result.output
    assert "4 of 4 pictures are explained, 2 of them were there already" in result.stdout
    assert index()["complete"] is True
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_results_made_in_another_way_are_made_anew(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another picture, other weights, another target or other rules: nothing old is passed off."""
    two = ["photos/a.png", "photos/more/b.PNG"]

    def taken(*more: str) -> int:
        result = explain(*two, *more)
        assert result.exit_code == 0, result.output
        return int("1 of them were there" in result.stdout) + 2 * ("2 of them" in result.stdout)

    assert taken() == 0
    assert taken() == 2
    assert taken("--again") == 0
    draw(Path("photos/a.png"), 77)
    assert taken() == 1
    assert taken("--composite", "GammaFlat(0.1)") == 0
    assert taken("--composite", "GammaFlat(0.1)", "--target", "0", "--target", "1") == 0
    assert taken("--bias", "input") == 0
    assert taken() == 0
    Path("out/a/heatmap.png").unlink()
    assert taken() == 1
    Path("out/a/result.json").write_text("{")
    assert taken() == 1

    other = tiny()
    other[3].bias.data[0] += 1e-3  # type: ignore[operator, union-attr]
    monkeypatch.setitem(globals(), "tiny", lambda: other)
    assert taken() == 0


def test_again_is_for_several(here: Path) -> None:
    result = explain("photos/a.png", "--again")
    assert result.exit_code == 2
    assert "--again has no effect for a single picture" in result.stderr
