"""The command line: what `nrm explain` refuses, in one line and with nothing left behind."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer", reason="the command line's packages are not installed")

from PIL import Image
from support.command_line import HOME, MODEL, explain, fill, grey, refused, run, tiny

from nrm.cli import report
from nrm.errors import InputError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a picture, weights and labels."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Unready(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        raise LookupError("no\nluck")


def number() -> int:
    return 3


def two_outputs() -> nn.Module:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    return Two()


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(4))


def flat(image: Image.Image) -> Tensor:
    return grey(image).flatten()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"this is text", "not a picture"),
        (b"", "not a picture"),
        ("truncated", "truncated"),
    ],
)
def test_bad_pictures(here: Path, content: bytes | str | None, message: str) -> None:
    if content == "truncated":
        whole = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(whole, "JPEG")
        content = whole.getvalue()[:5000]
    if isinstance(content, bytes):
        Path("bad.jpg").write_bytes(content)
    refused(explain(image="bad.jpg"), "bad.jpg", message)


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.pt", "bad.pth"])
@pytest.mark.parametrize("content", [b"", b"no weights at all, but some more bytes", "cut"])
def test_corrupt_weights(here: Path, name: str, content: bytes | str) -> None:
    if isinstance(content, str):
        whole = here / f"weights.{'safetensors' if 'safe' in name else 'pt'}"
        content = whole.read_bytes()[:900]
    Path(name).write_bytes(content)
    refused(explain("--weights", name), name)


def test_missing_weights_and_unknown_kinds(here: Path) -> None:
    refused(explain("--weights", "none.pt"), "none.pt", "no such file")
    Path("weights.npz").write_bytes(b"")
    refused(explain("--weights", "weights.npz"), "expected a .safetensors, .pt, .pth, .ckpt")


def test_weights_that_do_not_fit(here: Path) -> None:
    state = torch.load("weights.pt")
    state["6.weight"] = torch.zeros(7, 16)
    state["extra"] = state.pop("0.bias")
    torch.save(state, "other.pt")
    refused(
        explain("--weights", "other.pt"),
        "missing keys: 0.bias", "unknown keys: extra", "6.weight is (7, 16) instead of (5, 16)",
    )  # fmt: skip


def test_pickles_are_not_run(here: Path) -> None:
    torch.save(tiny(), "model.pt")
    refused(explain("--weights", "model.pt"), "model.pt", "not a state dict")
    torch.save([1, 2], "list.pt")
    refused(explain("--weights", "list.pt"), "list.pt", "not a state dict")


def test_weights_of_every_kind_and_as_training_scripts_save_them(here: Path, undrawn: None) -> None:
    torch.save({"state_dict": torch.load("weights.pt"), "epoch": 3}, "checkpoint.pth")
    found = [
        json.loads(explain("--weights", f"{name}", "--json").stdout)
        for name in ("weights.safetensors", "weights.pt", "checkpoint.pth")
    ]
    for same in (lambda one: one["weights"]["values_sha256"], lambda one: one["logit"]):
        assert len(set(map(same, found))) == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tiny", "not of the form module:name"),
        ("no_such_module_anywhere:tiny", "no module 'no_such_module_anywhere'"),
        ("torch.nn.nowhere:tiny", "no module 'torch.nn.nowhere'"),
        (f"{HOME}:tny", "nearest names: tiny"),
        (f"{HOME}:COLOURS", "is a list"),
        (f"{__name__}:number", "made a int"),
        (f"{__name__}:Unready", "LookupError: no"),
        (f"{__name__}:lazy", "no shape before its first use: 1.weight, 1.bias"),
        (f"{__name__}:two_outputs", "choose one tensor of it with --output: 0 [1, 3, 28, 28], 1 ["),
        (f"{HOME}:grey_model", "fails on a picture"),
        ("broken_model:make", "broken_model cannot be imported: SyntaxError"),
        ("needy_model:make", "needy_model cannot be imported: it needs 'no_such_thing'"),
    ],
)
def test_bad_models(here: Path, model: str, message: str) -> None:
    Path("broken_model.py").write_text("def make(:\n")
    Path("needy_model.py").write_text("import no_such_thing\n")
    refused(explain(model=model), message)


def test_unknown_layers(here: Path) -> None:
    refused(explain("--layers", "0,22"), "no layer is called '22'", "Nearest names: 2")
    refused(explain("--layers", "0,0"), "same layer")


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("5", ["out of range", "0 to 4"]),
        ("-1", ["out of range"]),
        ("blue", ["ambiguous", "blue (2)", "blue (3)"]),
        ("gren", ["no class is called 'gren'", "Green (1)"]),
        ("sk", ["no class is called 'sk'", "sky, heaven (4)"]),
        ("", ["no class"]),
    ],
)
def test_bad_targets(here: Path, target: str, parts: list[str]) -> None:
    refused(explain("--target", target, "--labels", "labels.txt"), *parts)


def test_names_need_labels(here: Path) -> None:
    refused(explain("--target", "green"), "no names", "--labels")


def test_bad_labels(here: Path) -> None:
    refused(explain("--labels", "none.txt"), "none.txt", "no such file")
    Path("few.txt").write_text("one\ntwo\n")
    refused(explain("--labels", "few.txt"), "2 names", "5 outputs")
    Path("empty.txt").write_text("\n")
    refused(explain("--labels", "empty.txt"), "empty")
    refused(explain("--labels", "picture.png"), "not a text file")


def test_other_refusals(here: Path) -> None:
    refused(explain("--composite", "GammaFlt"), "did you mean GammaFlat?")
    refused(explain("--device", "nowhere"), "device 'nowhere'")
    refused(explain("--transform", f"{__name__}:flat"), "[C, H, W]", "(784,)")
    refused(explain("--transform", f"{HOME}:COLOURS"), "fails")
    box = ["--composite", "EpsilonGammaBox", "--transform", f"{HOME}:grey"]
    refused(explain(*box, model=f"{HOME}:grey_model"), "bounds")


def test_a_folder_that_is_a_file(here: Path) -> None:
    for out in ("picture.png", "picture.png/below"):
        result = run("explain", "picture.png", "--model", MODEL, "--out", out)
        assert result.exit_code == 2
        assert "is not a folder" in result.stderr


def test_debug_shows_the_traceback(here: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        explain("--debug", image="none.png")


def test_interrupted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report.plot, "overview", interrupt)
    result = explain()
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
    assert not Path("out").exists()
    assert not list(here.glob(".out*"))


def test_strangers_errors_are_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "report", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain()
