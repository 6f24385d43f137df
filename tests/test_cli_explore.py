"""`nrm explore`: what it opens, what it refuses, and that it ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer", reason="the command line's packages are not installed")
pytest.importorskip("fastapi", reason="the explorer's packages are not installed")

from PIL import Image
from typer.testing import CliRunner

import nrm
from nrm.cli import opening
from nrm.cli.app import app
from nrm.explore import serving
from nrm.explore.answers import Columns, Request
from nrm.explore.opened import Opened, pictures
from nrm.explore.serving import running
from nrm.explore.session import Sessions
from nrm.io import imagenet, read_image

MODEL = f"{__name__}:tiny"
SOURCES = str(Path(nrm.__file__).parents[1])


def tiny() -> nn.Module:
    """Always the same network, for pictures of 16 x 16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolution = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3))
        return nn.Sequential(*convolution, nn.ReLU(), nn.Flatten(), nn.Linear(5 * 14 * 14, 3))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["explore", *arguments])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["x.png"], "PICTURES has no effect without --model"),
        (["--weights", "w.pt"], "--weights has no effect without --model"),
        (["--model", MODEL], "name a picture"),
        (["--model", MODEL, "nothing.png"], "no such file"),
        (["--port", "1", "--port", "2"], "given 2 times"),
    ],
)
def test_what_is_refused(arguments: list[str], why: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert why in result.stderr


def opened_by(picture: Path, size: int = 16, transform: str = "imagenet") -> Opened:
    return opening.pictures(
        MODEL, None, [picture], ["a", "b", "c"], transform, size, "GammaFlat(0.1)",
        lambda text: None,
    )  # fmt: skip


def halves(image: Image.Image) -> Tensor:
    """A transform of one's own."""
    small = np.array(image.resize((16, 16)), dtype=np.float32)
    return torch.from_numpy(small).permute(2, 0, 1) / 510


@pytest.mark.parametrize("transform", ["imagenet", f"{__name__}:halves"])
def test_the_script_of_a_picture_gives_its_numbers(
    picture: Path, transform: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """For one that was named, and for one that was sent, which the script is given."""
    opened = opened_by(picture, transform=transform)
    session = Sessions(opened).new()
    number = session.add(picture.read_bytes(), "sent.png")
    request = Request.read({"columns": ["1"], "selection": {"layer": "3", "channels": [2]}})
    for which in (0, number):
        parts = list(session.answer(which, request, session.turn()))
        (columns,) = (part for part in parts if isinstance(part, Columns))
        monkeypatch.setattr(sys, "argv", ["explored.py", str(picture)])
        exec(session.script(which, request), {})
        assert f"R(selection) = {columns.total.value:.6f}" in capsys.readouterr().out
    model = nrm.Explainer(tiny().eval(), nrm.composites.GammaFlat(0.1))
    if transform == "imagenet":
        x = imagenet(read_image(picture), 16).x
        right = float(model(x)(nrm.channels("3", 2)))
        assert columns.total.value == pytest.approx(right, abs=1e-6)


def test_a_run_over_a_data_set_is_opened(tmp_path: Path) -> None:
    """Its pictures, and for a channel the samples in which it is most relevant."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    chance = np.random.default_rng(1)
    for k in range(4):
        values = chance.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / "data" / f"{k}.png")
    arguments = ["relmax", "--model", MODEL, "--data", str(tmp_path / "data"), "--layers", "1,3"]
    arguments += ["--transform", f"{__name__}:halves", "--out", str(tmp_path / "run"), "--quiet"]
    done = CliRunner().invoke(app, [*arguments, "--k", "3"])
    assert done.exit_code == 0, done.output
    opened = opening.results(tmp_path / "run", lambda text: None)
    assert [one.name for one in opened.inputs] == [f"{k}.png" for k in range(4)]
    session = Sessions(opened).new()
    assert session.columns(0)[1] == ["1", "3"]
    samples = session.references("3", 2)
    kept = nrm.open_results(tmp_path / "run").references("3", 2)
    assert [(one.name, one.value) for one in samples] == [(one.name, one.value) for one in kept]
    image = read_image(tmp_path / "data" / samples[0].name)
    R = nrm.Explainer(tiny().eval())(halves(image)[None], target=kept[0].explained)
    right = R.heatmap(nrm.channels("3", 2))[0].sum(0)
    assert torch.allclose(torch.tensor(samples[0].relevance), right, atol=1e-6)
    for layer, channel in (("5", 0), ("3", -1), ("3", "2"), (None, None)):
        with pytest.raises(nrm.errors.NrmError):
            session.references(layer, channel)
    result = run("--results", str(tmp_path / "run"), "--model", MODEL)
    assert "--model has no effect beside --results" in result.stderr
    assert run("--results", str(tmp_path)).exit_code == 2


def test_it_is_kept_as_a_file(picture: Path, tmp_path: Path) -> None:
    result = run(
        str(picture), "--model", MODEL, "--size", "16", "--keep", str(tmp_path / "kept.html")
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "kept.html").read_text().startswith("<!DOCTYPE html>")
    result = run(str(picture), "--model", MODEL, "--size", "16", "--keep", str(tmp_path))
    assert result.exit_code == 2
    assert "it is a folder" in result.stderr


def test_a_port_that_is_taken_is_refused(picture: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(nrm.errors.InputError, match="cannot be listened at"):
            serving.serve(opened_by(picture), port=other.getsockname()[1], browse=False)


def test_pictures_that_are_there_are_opened_from_python() -> None:
    x = torch.rand(2, 3, 16, 16)
    opened = pictures(nrm.Explainer(tiny().eval()), x)
    with running(opened) as address:
        where = urlsplit(address)
        connection = http.client.HTTPConnection(where.netloc)
        connection.request("POST", f"{where.path}api/open", "{}")
        found = json.loads(connection.getresponse().read())
        connection.close()
    assert [one["name"] for one in found["inputs"]] == ["picture 0", "picture 1"]
    with pytest.raises(nrm.errors.InputError, match=r"\[N, C, H, W\]"):
        pictures(opened.explainer, x[0])


def test_names_by_which_a_server_may_be_called() -> None:
    assert serving._names("127.0.0.1") == {"127.0.0.1", "localhost"}
    assert serving._names("10.1.2.3") == {"10.1.2.3"}
    assert {socket.gethostname(), "127.0.0.1"} <= serving._names("0.0.0.0")


def test_the_command_tells_its_address_and_ends(picture: Path) -> None:
    """As a person starts and ends it."""
    command = [sys.executable, "-m", "nrm", "explore", str(picture), "--no-browser"]
    process = subprocess.Popen(
        [*command, "--model", MODEL, "--size", "16"], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, cwd=Path(__file__).parent, env=os.environ | {"PYTHONPATH": SOURCES},
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    where = urlsplit(address)
    assert where.hostname == "127.0.0.1"
    connection = http.client.HTTPConnection(where.netloc)
    connection.request("GET", where.path)
    assert connection.getresponse().status == 200
    connection.close()
    process.send_signal(signal.SIGINT)
    _, wrong = process.communicate(timeout=30)
    assert "Traceback" not in wrong
