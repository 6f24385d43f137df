"""What the command imports before it has anything to compute, and the words it lists."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line's packages are not installed")

import typer
from typer.testing import CliRunner

import nrm
from nrm import composites
from nrm.cli import commands
from nrm.cli.app import app
from nrm.cli.commands import COMPOSITES
from nrm.cli.models import find_composite

SOURCES = str(Path(nrm.__file__).parents[1])


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"], ["--version"], ["nope"]])
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from nrm.cli import main\n"
        f"sys.argv = ['nrm', *{arguments}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = ('torch', 'numpy', 'scipy', 'matplotlib', 'PIL', 'nrm.io', 'nrm.explainer')\n"
        "sys.exit(str([name for name in heavy if name in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": SOURCES},
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "[]"


def test_every_composite_that_is_listed_is_made() -> None:
    """And every one of the library is listed; tests may have registered others."""
    assert set(COMPOSITES) == {name for name in composites.names() if hasattr(composites, name)}
    assert find_composite("auto", None) is None
    for name in COMPOSITES:
        if name != "EpsilonGammaBox":
            assert type(find_composite(name.lower(), None)) is type(getattr(composites, name)())


def run_plugged(monkeypatch: pytest.MonkeyPatch, value: str, *arguments: str) -> Any:
    """A command line with one command of another package's, `nrm mine`."""
    entry = EntryPoint("mine", value, commands.GROUP)
    monkeypatch.setattr(commands, "_entries", lambda: (entry,))
    return CliRunner().invoke(app, list(arguments))


def greet(name: str, times: int = 1) -> None:
    """Say something."""
    typer.echo(f"hello {name} " * times)


def test_a_command_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    value = f"{__name__}:greet"
    assert "Say something." in run_plugged(monkeypatch, value, "--help").output
    said = run_plugged(monkeypatch, value, "mine", "you", "--times", "2")
    assert (said.exit_code, said.stdout) == (0, "hello you hello you \n")


@pytest.mark.parametrize("value", [f"{__name__}:nothing", "no.such.package:mine"])
def test_a_broken_command_of_another_package_breaks_no_other(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    listed = run_plugged(monkeypatch, value, "--help")
    assert listed.exit_code == 0
    assert "explain" in listed.output
    assert "mine" in listed.output
    said = run_plugged(monkeypatch, value, "mine", "you", "--times", "2")
    assert said.exit_code == 2
    assert said.stderr.startswith(f"error: nrm mine: {value} cannot be made a command: ")
    assert len(said.stderr.splitlines()) == 1
