"""The command `nrm`: what is given is read or refused, and nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer", reason="the command line's packages are not installed")

import typer.main
from PIL import Image
from safetensors.torch import save_file
from support.command_line import run

import nrm
from nrm import io
from nrm.cli import app as commands
from nrm.cli import models
from nrm.cli.commands import CommandError, one_line_errors

SOURCES = str(Path(nrm.__file__).parents[1])
MODEL = f"{__name__}:tiny"


def tiny() -> nn.Module:
    """A classifier of four classes for colour pictures of 14 x 14, its weights random each time."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(), nn.Conv2d(5, 3, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 4),
    )  # fmt: skip


class Hungry(nn.Module):
    """Wants more memory than any machine has, or fails for the want of it in another way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "torch":
            return torch.empty(2**60, dtype=torch.uint8)
        if self.how == "numpy":
            return torch.as_tensor(np.empty(2**60, dtype=np.uint8))
        if self.how == "python":
            bytearray(2**62)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def of_torch() -> nn.Module:
    return Hungry("torch")


def of_numpy() -> nn.Module:
    return Hungry("numpy")


def of_python() -> nn.Module:
    return Hungry("python")


def of_cuda() -> nn.Module:
    return Hungry("cuda")


def hungry_factory() -> nn.Module:
    bytearray(2**62)
    return tiny()


def small(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((14, 14)))).permute(2, 0, 1).float() / 255


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a picture and weights."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    torch.manual_seed(1)
    save_file(tiny().state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def explain(*more: object, model: str = MODEL, out: str = "out") -> Any:
    given = ["--weights", "weights.safetensors"] if model == MODEL else []
    size = [] if {"--transform", "--size"} & set(more) else ["--size", "14"]
    return run("explain", "picture.png", "--model", model, *given, *size, "--out", out, *more)


def refused(result: Any, *parts: str) -> None:
    """One line on stderr that says these things, exit code 2."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.endswith("…")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


# -- options -------------------------------------------------------------------------------------


def single_options() -> list[tuple[str, str]]:
    """Every option of every command that has one value."""
    found = []
    group: Any = typer.main.get_command(commands.app)
    for name in group.list_commands(None):
        for parameter in group.get_command(None, name).params:
            several = parameter.multiple or getattr(parameter, "is_flag", False)
            if parameter.param_type_name == "option" and not several:
                found.append((name, max(parameter.opts, key=len)))
    return found


def test_there_are_single_options() -> None:
    options = single_options()
    assert {("explain", "--labels"), ("layers", "--model"), ("demo", "--epochs")} <= set(options)
    several = {("explain", "--layers"), ("explain", "--target"), ("reproduce", "--layers")}
    assert (several | {("layers", "--json")}).isdisjoint(options)


@pytest.mark.parametrize(("command", "option"), single_options())
def test_an_option_given_twice_is_refused(command: str, option: str, here: Path) -> None:
    for more in ([option, "1", option, "2"], [f"{option}=1", option, "1"]):
        refused(run(command, *more), f"{option} is given 2 times")
    assert sorted(os.listdir()) == ["picture.png", "weights.safetensors"]


def test_a_flag_may_be_said_twice(here: Path) -> None:
    shape = ["--input-shape", "1,3,14,14"]
    assert run("layers", "--model", MODEL, *shape, "--json", "--json").exit_code == 0


def test_layers_given_several_times_are_all_meant(here: Path, undrawn: None) -> None:
    together = json.loads(explain("--layers", "0,2", "--top", "2", "--json").stdout)
    apart = json.loads(explain("--layers", "0", "--layers", "2", "--top", "2", "--json").stdout)
    assert apart["layers"] == ["0", "2"]
    assert apart["flows"] == together["flows"]


@pytest.mark.parametrize("layers", ["", ",", "0,", "0,,2", " "])
def test_layers_without_a_name(here: Path, layers: str) -> None:
    refused(explain("--layers", layers), "--layers")


def test_options_that_nothing_reads_are_refused(here: Path, undrawn: None) -> None:
    own = ["--transform", f"{__name__}:small"]
    refused(explain(*own, "--size", "14"), "--size has no effect", f"{__name__}:small")
    refused(explain("--top", "5"), "--top has no effect", "--layers")
    refused(explain("--search-seconds", "60"), "--search-seconds has no effect")
    assert explain("--layers", "0", "--search-seconds", "nan").exit_code == 2
    assert explain(*own).exit_code == 0


@pytest.mark.parametrize("size", [4097, 100_000, 10**30])
def test_sizes_are_bounded(here: Path, size: int) -> None:
    refused(explain("--size", size), f"--size {size}", "4096")


@pytest.mark.parametrize(
    "shape",
    ["-1,3,14,14", "0", "1,3,-14,14", "1,3,20000,20000", "9" * 40, "9" * 5000, ",".join("1" * 13)],
)
def test_input_shapes_are_bounded(here: Path, shape: str) -> None:
    refused(run("layers", "--model", MODEL, "--input-shape", shape), "--input-shape")


@pytest.mark.parametrize("device", ["meta", "", "cuda:99", "nowhere", "cpu:x"])
def test_devices_that_hold_no_numbers(here: Path, device: str) -> None:
    refused(explain("--device", device), f"device '{device}'")
    refused(run("layers", "--model", MODEL, "--device", device), f"device '{device}'")


# -- what a result was made from -----------------------------------------------------------------


def test_results_say_what_they_were_made_from(here: Path, undrawn: None) -> None:
    found = json.loads(explain("--json").stdout)
    assert found["image_sha256"] == hashlib.sha256(Path("picture.png").read_bytes()).hexdigest()
    weights = found["weights"]
    assert weights["source"] == "file"
    assert weights["file"] == "weights.safetensors"
    digest = hashlib.sha256(Path("weights.safetensors").read_bytes()).hexdigest()
    assert weights["sha256"] == digest
    versions = found["versions"]
    assert versions["nrm"] == nrm.__version__
    assert versions["torch"] == torch.__version__
    assert versions["python"] == platform.python_version()
    assert versions["numpy"] == np.__version__
    assert found["transform"] == {"name": "imagenet", "input": [1, 3, 14, 14]}
    assert found["device"] == "cpu"
    assert found["command"][:5] == ["nrm", "explain", "picture.png", "--model", MODEL]
    assert found["command"][-1] == "--json"
    before = Path("out/result.json").read_bytes()
    explain("--json")
    assert Path("out/result.json").read_bytes() == before


def test_random_weights_are_told_from_those_of_a_file(here: Path, undrawn: None) -> None:
    arguments = ["explain", "picture.png", "--model", MODEL, "--size", "14", "--json"]
    one, two = (json.loads(run(*arguments).stdout)["weights"] for _ in range(2))
    given = json.loads(explain("--json").stdout)["weights"]
    for weights in (one, two):
        assert weights["source"] == "factory"
        assert weights["file"] is None
        assert weights["sha256"] is None
    assert len({w["values_sha256"] for w in (one, two, given)}) == 3
    assert json.loads(explain("--json").stdout)["weights"] == given


# -- names, links, and files that cannot be -------------------------------------------------------


@pytest.mark.parametrize("label", [r"$\bad{$ $x^2$", "a\x1b[2Jb {%s}", "x" * 5000])
def test_labels_are_shown_as_they_are(here: Path, label: str) -> None:
    Path("labels.txt").write_text("\n".join([label, "b", "c", "d"]))
    result = explain("--labels", "labels.txt", "--target", "0", "--layers", "0", "--top", "1")
    assert result.exit_code == 0, result.output
    assert label.replace("\x1b", "\ufffd") in result.stdout
    assert "\x1b" not in result.stdout
    for name in ("heatmap.png", "overview.png"):
        with Image.open(Path("out") / name) as image:
            assert max(image.size) < 6000


def test_names_that_are_no_text(here: Path, undrawn: None) -> None:
    name = os.fsdecode(b"b\xff.png")
    try:
        Path("picture.png").rename(name)
    except OSError:
        pytest.skip("this file system takes no such names")
    result = run("explain", name, "--model", MODEL, "--size", "14", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("out/result.json").read_text("utf-8"))["image"] == "b\ufffd.png"


def test_links_that_lead_nowhere(here: Path, undrawn: None) -> None:
    Path("loop").symlink_to("loop")
    for out in ("loop", "loop/below"):
        refused(explain(out=out), "--out", "loop")
    refused(explain("--labels", "loop"), "labels loop")
    refused(run("explain", "loop", "--model", MODEL), "picture loop")
    refused(run("explain", "picture.png", "--model", MODEL, "--weights", "loop"), "weights loop")
    Path("later").symlink_to("made/with/it")  # a link to what is not there yet is none of these
    assert explain(out="later").exit_code == 0
    assert Path("made/with/it/result.json").exists()


def test_places_where_no_folder_can_be(here: Path) -> None:
    refused(explain(out="picture.png/below"), "is not a folder")
    refused(explain(out="a" * 300), "--out", "too long")
    refused(run("explain", "picture.png", "--model", MODEL, "--weights", "."), "is a folder")
    Path("empty").mkdir()
    refused(run("explain", "empty", "--model", MODEL), "folder empty: no picture in it")
    if os.access("/proc", os.W_OK):
        refused(explain(out="/proc/out"), "--out /proc/out")


@pytest.mark.parametrize("name", ["of_torch", "of_numpy", "of_python", "of_cuda"])
def test_running_out_of_memory(here: Path, name: str) -> None:
    model = f"{__name__}:{name}"
    shape = ["--input-shape", "1,3,14,14"]
    for result in (explain("--json", model=model), run("layers", "--model", model, *shape)):
        refused(result, "there is not enough memory")
    if name == "of_cuda":
        refused(result, "for 20.00 GiB")
    assert not Path("out").exists()


def test_a_factory_that_runs_out_of_memory(here: Path) -> None:
    refused(explain("--json", model=f"{__name__}:hungry_factory"), "there is not enough memory")


def test_a_reader_that_goes_away() -> None:
    """`nrm layers | head`: typer ends the command without a word."""
    with pytest.raises(BrokenPipeError), one_line_errors(debug=False):
        raise BrokenPipeError


def test_a_warning_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with one_line_errors(debug=False):
            for text in ("one\nline", "one  line", "another"):
                warnings.warn(text, UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: one line\nwarning: another\n"


# -- the import path -----------------------------------------------------------------------------

EVIL = "print('this ran'); raise SystemExit(9)\n"


def hear_interrupts() -> None:
    """What is started in the background by a script is deaf to them, and so are its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def process(*arguments: str, path: object = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """A Python of its own, in the working folder."""
    places = os.pathsep.join(filter(None, [str(path), SOURCES]))
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": places},
        preexec_fn=hear_interrupts if os.name == "posix" else None, **options,
    )  # fmt: skip


def test_the_working_folder_is_searched_last(here: Path) -> None:
    for package in ("torch", "torchvision", "typer", "numpy", "PIL"):
        Path(f"{package}.py").write_text(EVIL)
    Path("a_model_beside_the_picture.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Linear(3, 2))\n"
    )
    command = ["layers", "--model", "a_model_beside_the_picture:make", "--input-shape", "1,3"]
    done = process("-m", "nrm", *command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Linear" in done.stdout
    assert "this ran" not in done.stdout


def test_a_module_beside_the_picture_is_in_no_ones_place(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(here))])
    Path("colorsys.py").write_text(EVIL)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert models.find_attribute("colorsys:rgb_to_hsv")(0, 0, 0) == (0.0, 0.0, 0)
    assert sys.path[-1] == str(here)
    with pytest.raises(CommandError, match="no module"):
        models.find_attribute("nowhere_at_all:make")


# -- interrupted, ended, killed ------------------------------------------------------------------

INTERRUPTED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
SCRIPT = "import sys\nfrom nrm.cli import main\nsys.exit(main())\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("way", ["python -m nrm", "nrm"])
def test_interrupted_while_torch_is_imported(here: Path, way: str) -> None:
    """A torch that presses Ctrl-C stands first on the import path."""
    Path("first").mkdir()
    Path("first/torch.py").write_text(INTERRUPTED)
    Path("nrm").write_text(SCRIPT)
    start = ["-m", "nrm"] if way != "nrm" else ["nrm"]
    done = process(*start, "layers", "--model", MODEL, path=here / "first")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupted_while_the_commands_are_imported(here: Path) -> None:
    Path("first").mkdir()
    Path("first/typer.py").write_text(INTERRUPTED)
    done = process("-m", "nrm", "--version", path=here / "first")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupts_of_a_program_that_imports_nrm_are_its_own(here: Path) -> None:
    Path("first").mkdir()
    Path("first/torch.py").write_text(INTERRUPTED)
    code = "try:\n import nrm; nrm.Explainer\nexcept KeyboardInterrupt:\n print('mine')\n"
    done = process("-c", code, path=here / "first")
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\n", "")
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)


ENDED = """
import os, signal, sys
from pathlib import Path
from nrm import io
from nrm.cli import clean_up_when_ended
clean_up_when_ended()
with io.filled_at_once(Path("out"), last="z") as staging:
    (staging / "half").write_text("x")
    print(sorted(os.listdir()))
    sys.stdout.flush()
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_what_an_ended_run_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM leaves nothing; what SIGKILL leaves is removed by the next run."""
    monkeypatch.chdir(tmp_path)
    done = process("-c", ENDED, "SIGTERM")
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "terminated\n")
    assert "-nrm-" in done.stdout
    assert os.listdir() == []
    assert process("-c", ENDED, "SIGKILL").returncode == -signal.SIGKILL
    (left,) = os.listdir()
    assert left.startswith(".out-nrm-")

    keep = [
        ".out-nrm-abcdefgh",  # of the same name, and not as ours are made
        ".out-abcdefgh",
        ".outer-nrm-abcdefgh",
        "out-nrm-abcdefgh",
        ".out-nrm-just_now",  # somebody is about to lock it
    ]
    for name in keep:
        Path(name).mkdir()
    for name in keep[:4]:
        Path(name, "in-use").write_text("")
    Path(keep[0], "mine").write_text("")
    with io.filled_at_once(Path("out"), last="z") as staging:
        assert not Path(left).exists()
        (staging / "z").write_text("whole")
        with io.filled_at_once(Path("out"), last="z"):  # two runs at once
            assert staging.exists()
    assert Path("out/z").read_text() == "whole"
    assert sorted(os.listdir()) == sorted([*keep, "out"])


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_litter_is_found_where_the_folders_above_are_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".c-nrm-abcdefgh/files").mkdir(parents=True)
    Path(".c-nrm-abcdefgh/in-use").write_text("")
    with io.filled_at_once(Path("a/b/c"), last="z") as staging:
        (staging / "z").write_text("")
    assert os.listdir() == ["a"]
