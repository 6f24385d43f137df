"""The command line: what it writes and what it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("typer", reason="the command line's packages are not installed")

from matplotlib.figure import Figure
from PIL import Image
from support.command_line import HOME, MODEL, explain, fill, refused, run, tiny

import nrm
from nrm import io as files
from nrm.cli import report
from nrm.cli.commands import AUTO, COMPOSITES

DATA = Path(__file__).parents[2] / "shared" / "data"


ready = tiny()  # `module:instance`


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a picture, weights and labels."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- explain -------------------------------------------------------------------------------------


def test_explain_writes_everything(here: Path) -> None:
    result = explain(
        "--weights", "weights.safetensors", "--layers", "0, 2", "--target", "3", "--top", "2"
    )
    assert result.exit_code == 0, result.output
    assert "flow_2.png" in result.stdout
    assert "out/overview.png" in result.stdout.replace("\\", "/")
    assert "searching" in result.stderr
    drawn = ["flow_1.png", "flow_2.png", "heatmap.png", "input.png", "overview.png"]
    assert sorted(p.name for p in Path("out").iterdir()) == sorted([*drawn, "result.json"])
    for name in drawn:
        with Image.open(Path("out") / name) as image:
            assert min(image.size) >= 200
    assert not list(here.glob(".out*"))


def test_the_json_is_what_the_library_says(here: Path, undrawn: None) -> None:
    result = explain(
        "--weights", "weights.safetensors", "--layers", "2,0", "--target", "green", "--top", "2",
        "--labels", "labels.txt", "--bias", "input", "--composite", "epsilonplus", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout == Path("out/result.json").read_text(encoding="utf-8")
    found = json.loads(result.stdout)
    assert list(found) == [
        "image", "model", "layers", "composite", "bias", "target", "label", "explained",
        "probability", "probability_from", "logit", "worst_cut_deviation", "total_variation",
        "search", "gap", "visited", "flows", "outputs", "largest", "image_sha256", "transform",
        "weights", "output", "head", "device", "versions", "command", "fingerprint", "pictures",
    ]  # fmt: skip

    model = tiny()
    model.load_state_dict(torch.load("weights.pt"))
    x = files.imagenet(files.read_image(Path("picture.png")), 28).x
    R = nrm.Explainer(model.eval(), nrm.composites.EpsilonPlus(), bias="input")(x, target=1)
    flows = R.top("2", "0", k=2)
    assert found["target"] == 1
    assert found["label"] == "Green"
    assert found["logit"] == pytest.approx(float(R.output[0, 1]))
    assert found["probability"] == pytest.approx(float(R.output[0].softmax(0)[1]))
    assert found["layers"] == ["2", "0"]
    assert found["composite"] == repr(nrm.composites.EpsilonPlus())
    assert found["bias"] == "input"
    assert found["worst_cut_deviation"] < 1e-5
    assert found["total_variation"] >= 1 - 1e-5
    assert found["search"] == "exact"
    for k, (entry, flow) in enumerate(zip(found["flows"], flows, strict=True), start=1):
        assert entry["sets"] == {layer: [channel] for layer, channel in flow.parts.items()}
        assert entry["relevance"] == pytest.approx(flow.relevance, rel=1e-4)
        assert entry["share"] == pytest.approx(flow.share, rel=1e-4)
        assert entry["picture"] == f"flow_{k}.png"
    assert set(found["pictures"]) == {p.name for p in Path("out").glob("*.png")}


def test_without_layers_there_is_the_heatmap_only(here: Path, coarse: None) -> None:
    found = json.loads(explain("--json").stdout)
    assert found["flows"] == []
    assert found["search"] is None
    assert found["label"] is None
    assert found["pictures"] == ["heatmap.png", "input.png", "overview.png"]


@pytest.mark.parametrize("layers", ["2", "0,2,6"])
def test_one_layer_or_three(here: Path, coarse: None, layers: str) -> None:
    found = json.loads(explain("--layers", layers, "--top", "2", "--json").stdout)
    assert found["search"] == "exact"
    assert found["gap"] == 0
    assert [list(flow["sets"]) for flow in found["flows"]] == [layers.split(",")] * 2


def test_more_flows_than_the_overview_has_columns(
    here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def overview(picture: Any, total: Any, columns: Sequence[Any], *_: Any) -> Figure:
        shown.append(len(columns))
        return Figure()

    monkeypatch.setattr(report.plot, "overview", overview)
    monkeypatch.setattr(report, "MOST_COLUMNS", 2)
    found = json.loads(explain("--layers", "2,0", "--top", "3", "--json").stdout)
    assert len(found["flows"]) == 3
    assert "flow_3.png" in found["pictures"]
    assert shown == [2]


def test_fewer_combinations_than_asked_for(here: Path, undrawn: None) -> None:
    found = json.loads(explain("--layers", "2", "--top", "100", "--json").stdout)
    assert len(found["flows"]) == 4
    assert sum(flow["relevance"] for flow in found["flows"]) == pytest.approx(1, abs=1e-4)


def test_a_model_may_be_an_instance(here: Path, undrawn: None) -> None:
    assert explain("--json", model=f"{__name__}:ready").exit_code == 0


def test_a_transform_of_ones_own(here: Path, coarse: None) -> None:
    result = explain(
        "--transform", f"{HOME}:grey", "--layers", "0", "--json", model=f"{HOME}:grey_model"
    )
    assert result.exit_code == 0, result.output


def meanings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the colours of each overview mean, from here on."""
    meant: list[tuple[str, str]] = []

    def overview(*given: Any) -> Figure:
        meant.append(given[-1])
        return Figure()

    monkeypatch.setattr(report.plot, "overview", overview)
    return meant


def test_colours_change_their_meaning_with_the_sign_of_the_logit(
    here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant = meanings(monkeypatch)
    logits = tiny()(files.imagenet(files.read_image(Path("picture.png")), 28).x)[0]
    assert logits.min() < 0 < logits.max()
    for target in (logits.argmax(), logits.argmin()):
        assert explain("--target", str(int(target)), "--bias", "input").exit_code == 0
    assert meant == [("against", "for"), ("raises the logit", "lowers the logit")]


LOGITS = (2.5, -0.7, 1.0)


def ended_by(*last: nn.Module, logits: Sequence[float] = LOGITS) -> nn.Module:
    """A model whose logits for any picture are nearly these: its weights are small."""
    conv, linear = nn.Conv2d(3, 4, 9, 9), nn.Linear(4, len(logits))
    for layer, size in ((conv, 0.1), (linear, 1e-4)):
        nn.init.constant_(layer.weight, size)
    nn.init.zeros_(conv.bias)
    linear.bias.data = torch.tensor(logits)
    body = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, linear, *last).eval()


def _plain() -> nn.Module:
    return ended_by()


def _softmax() -> nn.Module:
    return ended_by(nn.Softmax(1))


def _log_softmax() -> nn.Module:
    return ended_by(nn.LogSoftmax(1))


def _sigmoid() -> nn.Module:
    return ended_by(nn.Sigmoid())


def _log_sigmoid() -> nn.Module:
    return ended_by(nn.LogSigmoid())


def _single() -> nn.Module:
    return ended_by(logits=(-3.0,))


def _single_sigmoid() -> nn.Module:
    return ended_by(nn.Sigmoid(), logits=(-3.0,))


def _softplus() -> nn.Module:
    return ended_by(nn.Softplus())


_SOFTMAX = [0.791747, 0.032275, 0.175977]  # exp(2.5), exp(-.7), exp(1) over their sum, 15.387
_SIGMOID = [0.924142, 0.331812, 0.731059]


@pytest.mark.parametrize(
    ("model", "target", "logit", "probability", "words"),
    [
        ("_plain", 0, 2.5, _SOFTMAX[0], r"softmax of the logits 0\.79.., logit 2\.50"),
        ("_softmax", 0, 2.5, _SOFTMAX[0], r"probability 0\.79.., logit 2\.50"),
        ("_softmax", 1, -0.7, _SOFTMAX[1], r"probability 0\.032., logit -0\.70"),
        ("_log_softmax", 2, 1.0, _SOFTMAX[2], r"probability 0\.17.., logit 1\.00"),
        ("_sigmoid", 1, -0.7, _SIGMOID[1], r"probability 0\.33.., logit -0\.70"),
        ("_log_sigmoid", 2, 1.0, _SIGMOID[2], r"probability 0\.73.., logit 1\.00"),
        ("_single", 0, -3.0, None, r"picture\.png: value -2\.99"),
        ("_single_sigmoid", 0, -3.0, 0.047426, r"picture\.png: probability 0\.047., logit -3\.00"),
        ("_softplus", 1, -0.7, None, r"class 1, value behind softplus -0\.\d+"),
    ],
)
def test_probabilities_are_what_the_model_says(
    here: Path,
    undrawn: None,
    model: str,
    target: int,
    logit: float,
    probability: float | None,
    words: str,
) -> None:
    result = explain("--target", str(target), model=f"{__name__}:{model}")
    assert result.exit_code == 0, result.output
    assert re.search(words, result.stdout)
    found = json.loads(Path("out/result.json").read_text(encoding="utf-8"))
    assert found["logit"] == pytest.approx(logit, abs=1e-2)
    assert found["probability"] == (
        None if probability is None else pytest.approx(probability, abs=1e-3)
    )


def test_the_legend_is_that_of_the_logit_behind(
    here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities are negative, also of a logit that is positive."""
    meant = meanings(monkeypatch)
    for model in ("_log_softmax", "_sigmoid"):
        for target in ("0", "1"):
            given = ["--target", target, "--bias", "input"]
            assert explain(*given, model=f"{__name__}:{model}").exit_code == 0
    assert meant == 2 * [("against", "for"), ("raises the logit", "lowers the logit")]


@pytest.mark.parametrize("name", [AUTO, *COMPOSITES])
def test_every_composite_has_its_name(
    here: Path, undrawn: None, captured_once: None, name: str
) -> None:
    ready = ["--weights", "weights.pt"]
    result = explain(*ready, "--composite", name, "--json", model=f"{__name__}:ready")
    assert result.exit_code == 0, result.output
    chosen = "GammaFlat" if name == "auto" else name
    assert json.loads(result.stdout)["composite"].startswith(chosen)


def test_a_composite_of_the_models_module(
    here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nrm.composites, "_BY_NAME", dict(nrm.composites._BY_NAME))
    (here / "a_model_with_rules.py").write_text(
        "from torch import nn\n"
        "from nrm.composites import Composite, composite\n"
        "from nrm.rules import Gamma\n"
        "@composite('Mine')\n"
        "def mine(gamma: float = 0.5) -> Composite:\n"
        "    return Composite([], Gamma(gamma), name=f'Mine({gamma})')\n"
        "@composite('Needy')\n"
        "def needy(gamma: float) -> Composite:\n"
        "    return Composite([], Gamma(gamma))\n"
        "def make() -> nn.Module:\n"
        "    layers = nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1352, 2)\n"
        "    return nn.Sequential(*layers)\n"
    )
    model = "a_model_with_rules:make"
    refused(explain("--composite", "Needy", model=model), "Needy cannot be made", "'gamma'")
    result = explain("--composite", "mine", "--json", model=model)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["composite"] == "Mine(0.5)"


# -- results appear complete or not at all -------------------------------------------------------


def test_a_failure_leaves_the_folder_as_it_was(
    here: Path, coarse: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert explain("--layers", "0", "--top", "1").exit_code == 0
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.plot, "overview", fail)
    result = explain("--layers", "2", "--top", "2", "--target", "2")
    assert result.exit_code == 2
    assert "error: No space left on device" in result.stderr
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before
    assert not list(here.glob(".out*"))


def test_results_replace_earlier_ones_and_nothing_else(here: Path, undrawn: None) -> None:
    assert explain("--layers", "0", "--top", "3").exit_code == 0
    Path("out/notes.txt").write_text("mine")
    Path("out/flow_9.png").write_text("mine too: no earlier result names it")
    assert explain("--layers", "0", "--top", "1").exit_code == 0
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "flow_1.png", "flow_9.png", "heatmap.png", "input.png", "notes.txt", "overview.png",
        "result.json",
    ]  # fmt: skip


def test_a_folder_in_the_way_of_a_file(here: Path, coarse: None) -> None:
    Path("out/overview.png").mkdir(parents=True)
    result = explain()
    assert result.exit_code == 2
    assert "overview.png is a folder" in result.stderr
    assert [p.name for p in Path("out").iterdir()] == ["overview.png"]


def test_the_folder_is_made_with_those_above_it(here: Path) -> None:
    with files.filled_at_once(Path("a/b/c"), last="z") as staging:
        (staging / "x").write_text("x")
        assert not Path("a").exists()
    assert Path("a/b/c/x").read_text() == "x"
    with pytest.raises(RuntimeError), files.filled_at_once(Path("d/e"), last="z") as staging:
        raise RuntimeError
    assert not Path("d").exists()


def test_a_folder_whose_parent_is_not_ours(
    here: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != here and real(path, mode))
    assert explain().exit_code == 0
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "heatmap.png", "input.png", "overview.png", "result.json",
    ]  # fmt: skip


# -- layers and the rest -------------------------------------------------------------------


def test_layers(here: Path) -> None:
    result = run("layers", "--model", MODEL, "--input-shape", "1,3,28,28", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["2"]["kind"] == "conv"
    assert rows["2"]["shape"] == [4, 11, 11]
    assert rows["2"]["channel_axis"] == 0
    assert rows["2"]["cut"] is True
    table = run("layers", "--model", MODEL, "--input-shape", "1,3,28,28").stdout
    for name, row in rows.items():
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [name]]
        assert row["module"] in line
        assert " x ".join(map(str, row["shape"])) in line


def deep() -> nn.Module:
    """A model with a long name."""
    model = tiny()
    for part in ("block" * 9, "branch" * 9):
        model = nn.Sequential()
        model.add_module(part, tiny())
    outer = nn.Sequential()
    outer.add_module("stage" * 12, model)
    return outer


def test_long_names_are_not_cut_off(here: Path) -> None:
    options = ["--model", f"{__name__}:deep", "--input-shape", "1,3,28,28"]
    names = [row["name"] for row in json.loads(run("layers", *options, "--json").stdout)]
    assert max(map(len, names)) > 100
    table = run("layers", *options).stdout
    assert all(f"{name} " in table for name in names)


def test_layers_refuses(here: Path) -> None:
    for shape in ("1,3,x", "", "1,0,3"):
        refused(run("layers", "--model", MODEL, "--input-shape", shape), "positive integers")
    refused(run("layers", "--model", MODEL, "--input-shape", "1,1,28,28"), "fails on inputs")


def test_without_the_extras() -> None:
    code = (
        "import sys\n"
        "from nrm.cli import main\n"
        "for package in ('typer', 'rich', 'matplotlib', 'PIL', 'safetensors'):\n"
        "    for name in list(sys.modules):\n"
        "        if name.startswith(('nrm.cli.', 'nrm.plot')) or name.split('.')[0] == package:\n"
        "            del sys.modules[name]\n"
        "    sys.modules[package] = None\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 2\n"
        "    del sys.modules[package]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"error: {package} is not installed: pip install 'nrm[cli]'"
        for package in ("typer", "rich", "matplotlib", "PIL", "safetensors")
    ]


def test_models_of_torchvision_without_torchvision(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    refused(explain(model="torchvision.models:squeezenet1_0"), "pip install 'nrm[vision]'")


def test_torchvision_that_does_not_fit_is_mended_with_a_warning() -> None:
    code = (
        "import sys, warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    try:\n"
        "        import torchvision\n"
        "    except ModuleNotFoundError:\n"
        "        sys.exit(3)\n"
        "    except RuntimeError:\n"
        "        fits = False\n"
        "    else:\n"
        "        fits = True\n"
        "    from nrm.torchvision_mismatch import MISMATCH, import_torchvision\n"
        "    first, second = import_torchvision(), import_torchvision()\n"
        "said = [w for w in seen if str(w.message) == MISMATCH]\n"
        "assert len(said) == (0 if fits else 1), seen\n"
        "assert first is second is sys.modules['torchvision']\n"
        "first.models.squeezenet1_0()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("torchvision is not installed")
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"nrm {nrm.__version__}\n"


# -- the real thing ------------------------------------------------------------------------------


def test_squeezenet_sees_a_tench(
    torchvision_models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = DATA / "squeezenet" / "squeezenet1_0.safetensors"
    picture = DATA / "imagenet" / "n01440764_tench.JPEG"
    if not (weights.exists() and picture.exists()):
        pytest.skip("../shared/data does not hold SqueezeNet's weights and ImageNet's pictures")
    monkeypatch.chdir(tmp_path)
    result = run(
        "explain", picture, "--model", "torchvision.models:squeezenet1_0", "--weights", weights,
        "--target", "tench", "--layers", "features.9,features.10", "--top", "1", "--json",
        "--size", "128",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["target"] == 0
    assert found["label"] == "tench"
    assert found["probability"] > 0.99
    assert found["worst_cut_deviation"] < 1e-5
    assert found["flows"][0]["relevance"] > 0.005
    assert Path("out/overview.png").stat().st_size > 100_000
