"""The commands that README, CONTRIBUTING and the pages name: each is there, with its options."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="the command line's packages are not installed")
pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

import typer

from nrm.cli.app import app
from nrm_reproduce.command import ALL, EXPERIMENTS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts),
]
BEGINNINGS = (
    r"(?:nrm [a-z]|python -m [a-z]|python [a-z]+/|\.venv/bin/python |make [a-z]|pip install )"
)
_COMMANDS: Any = typer.main.get_command(app)


def commands() -> Iterator[tuple[str, str]]:
    """Every page and command in it: lines of blocks, and code in sentences."""
    for page in PAGES:
        text = page.read_text()
        fences = re.findall(r"^```(.*?)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for block in (block for language, block in fences if language in ("", "sh")):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(BEGINNINGS, line):
                    yield page.name, line.split("  #")[0]
        sentences = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(rf"`({BEGINNINGS}[^`]*)`", sentences):
            yield page.name, code


MADE_UP = {"nrm mine", "nrm reproduce squares --samples 4 --out out"}
"""What a page tells to add."""
FOUND = sorted(found for found in set(commands()) if found[1].strip() not in MADE_UP)


def options_of(command: str) -> list[str]:
    return re.findall(r"(?<=\s)--[a-z][a-z-]*", command)


@pytest.mark.parametrize(("page", "command"), FOUND, ids=[f"{p}: {c}"[:70] for p, c in FOUND])
def test_it_exists(page: str, command: str) -> None:
    words = command.split()
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1].rstrip(",") in targets
    elif words[0] == "pip":
        with open(ROOT / "pyproject.toml", "rb") as file:
            extras = tomllib.load(file)["project"]["optional-dependencies"]
        named = re.findall(r"nrm\[([\w,]+)\]", command)
        assert all(extra in extras for names in named for extra in names.split(","))
    elif words[0] == "nrm":
        found = _COMMANDS.get_command(typer.Context(_COMMANDS), words[1])
        assert found is not None, words[1]
        nested = getattr(found, "commands", {})
        found = nested.get(words[2] if len(words) > 2 else "", nested.get("run", found))
        known = {name for parameter in found.params for name in parameter.opts} | {"--help"}
        assert set(options_of(command)) <= known
        if words[1] == "reproduce" and len(words) > 2:
            assert words[2] in (*EXPERIMENTS, ALL, "NAME", "--help")
    else:
        file = module_file(words[2]) if words[1] == "-m" else ROOT / words[1]
        assert file.exists(), file
        told = file.read_text() if file.parent.name != "nrm_reproduce" else "--data --out"
        for option in options_of(command):
            assert f'"{option}"' in told, option


def module_file(name: str) -> Path:
    """The file that `python -m` runs."""
    places = [base / name.replace(".", "/") for base in (ROOT, ROOT / "src")]
    for place in places:
        for file in (place.with_suffix(".py"), place / "__main__.py"):
            if file.exists():
                return file
    return places[0]


def test_there_are_many() -> None:
    """The pages are read as they are written: a change of their form is no reason to find none."""
    assert len(FOUND) > 40
