"""Words of the command line: composites with parameters, hints, help, completion."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the command line's packages are not installed")

from support.command_line import run

import nrm
from nrm import io
from nrm.cli import models
from nrm.cli.commands import CommandError
from nrm.cli.models import find_composite


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- composites with parameters --------------------------------------------------------------------

BOUNDS = io.imagenet_bounds()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("GammaFlat(gamma=0.5)", "GammaFlat(0.5)"),
        (" GammaFlat( 1 ) ", "GammaFlat(1)"),
        ("EpsilonGammaFlat(1e-3, gamma=.5)", "EpsilonGammaFlat(0.001, 0.5)"),
        ("EpsilonGammaBox(epsilon=0.25)", "EpsilonGammaBox(0.25, 0.25)"),
        ("EpsilonGammaBox(-2, 2)", "EpsilonGammaBox(1e-06, 0.25)"),
        ("Occlusion(False)", "Occlusion(rest_to_bias=False)"),
        ("IntegratedGradients(steps=4)", "IntegratedGradients(steps=4)"),
        ("LRPZero()", "LRPZero()"),
    ],
)
def test_composites_as_text(text: str, name: str) -> None:
    assert repr(find_composite(text, BOUNDS)) == name


def test_bounds_of_the_box() -> None:
    for text, low in (("EpsilonGammaBox(-2, 2)", -2), ("EpsilonGammaBox(gamma=0.5)", BOUNDS[0])):
        made = find_composite(text, BOUNDS)
        assert made is not None
        assert torch.equal(torch.as_tensor(vars(made.choices[0][1])["low"]), torch.as_tensor(low))
    assert find_composite("EpsilonGammaBox(0, 1)", None) is not None
    with pytest.raises(CommandError, match="needs the bounds"):
        find_composite("EpsilonGammaBox(gamma=0.1)", None)


RUNS = "__import__('pathlib').Path('ran').touch()"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("GammaFlt(0.1)", "did you mean GammaFlat.* there are auto, GammaFlat, EpsilonPlus"),
        ("GammaFlat(0.1, 0.2)", "too many positional arguments. Parameters: gamma=0.25"),
        ("GammaFlat(gama=0.1)", "unexpected keyword argument 'gama'. Parameters: gamma=0.25"),
        ("GammaFlat('x')", "gamma"),
        ("GammaFlat(-1)", "gamma"),
        ("GammaFlat(1e999)", "gamma"),
        ("EpsilonGammaBox(0.5)", "missing a required argument: 'high'"),
        ("EpsilonGammaBox(low=0)", "missing a required argument: 'high'"),
        ("LRPAll(3)", "cannot be made"),
        ("auto(3)", "takes no parameters"),
        (f"GammaFlat({RUNS})", "give a name"),
        (f"{RUNS}", "give a name"),
        ("GammaFlat(*[1])", "give a name"),
        ("GammaFlat(**{'gamma': 1})", "give a name"),
        ("GammaFlat(0.1", "give a name"),
        ("GammaFlat(0.1).rule(3)", "give a name"),
        ("a.b(3)", "give a name"),
        ("GammaFlat(x)", "give a name"),
        ("GammaFlat(" + "(" * 9999 + ")", "give a name"),
        ("GammaFlat(\0)", "give a name"),
        ("", "no composite is called ''"),
    ],
)
def test_composites_that_are_refused(here: Path, text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message) as refused:
        find_composite(text, BOUNDS)
    assert len(str(refused.value).splitlines()) == 1
    assert not Path("ran").exists()


# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mymodel.py:make", "mymodel:make"),
        ("./mymodel.py:make", "mymodel:make"),
        ("parts/mymodel.py:make", "parts.mymodel:make"),
        ("/parts/mymodel.py:make", "mymodel:make, with /parts on PYTHONPATH"),
        ("mymodel.py", "mymodel:"),
    ],
)
def test_paths_of_python_files_are_no_modules(here: Path, name: str, hint: str) -> None:
    Path("mymodel.py").write_text("")
    with pytest.raises(CommandError, match="did you mean") as refused:
        models.find_attribute(name)
    assert hint in str(refused.value)


def test_pictures_of_relevance_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "nrm.plot", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib.* pip install 'nrm\[cli\]'"):
        importlib.import_module("nrm.plot")


@pytest.mark.parametrize("command", [[], ["explain"], ["layers"], ["demo"], ["reproduce"]])
def test_h_is_help(command: list[str]) -> None:
    short, long = (run(*command, option) for option in ("-h", "--help"))
    assert (short.exit_code, short.output) == (0, long.output)
    if not command:
        for code in ("0 done", "1 an error", "2 something", "130 interrupted", "143 told"):
            assert code in " ".join(short.output.split())


def test_completion_needs_no_torch() -> None:
    """As the shell asks for it."""
    code = (
        "import sys\n"
        "from nrm.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
    )
    for words, expected in (
        ("nrm ", {"explain", "layers", "demo", "tokens", "relmax", "explore", "reproduce"}),
        ("nrm explain --composite Gam", {"GammaFlat"}),
    ):
        asked = {"_NRM_COMPLETE": "complete_bash", "COMP_WORDS": words}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False,
            env=os.environ | asked | {
                "COMP_CWORD": str(len(words.split(" ")) - 1),
                "PYTHONPATH": str(Path(nrm.__file__).parents[1]),
            },
        )  # fmt: skip
        assert set(done.stdout.split()) == expected, done.stderr
