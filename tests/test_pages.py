"""The pages: their Python blocks run as they are printed, one after the other."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support import pages

import nrm
from nrm.operators import table

pytest.importorskip("typer", reason="the command line's packages are not installed")
pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

HOWTO = Path(__file__).parents[1] / "docs" / "howto"
PAGES = [
    page
    for page in (pages.ROOT / "README.md", *sorted((pages.ROOT / "docs").rglob("*.md")))
    if "_build" not in page.parts and pages.blocks_of(page)
]


@pytest.fixture
def page_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module for the blocks of a page. What they register is gone again afterwards."""
    rows, named = dict(table._TABLE), dict(nrm.composites._BY_NAME)
    module = ModuleType("a_page")
    monkeypatch.setitem(sys.modules, "a_page", module)
    yield module
    for kept, before in ((table._TABLE, rows), (nrm.composites._BY_NAME, named)):
        kept.clear()
        kept.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_blocks_run(
    page: Path, page_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some save what they make
    pages.run(page, vars(page_module))


def test_hardly_any_block_is_left_out() -> None:
    blocks = [block for page in PAGES for block in pages.blocks_of(page)]
    assert len(blocks) > 40
    assert [block.skipped for block in blocks if block.skipped] == [
        "processes started anew would import what runs the pages"
    ]


def test_what_the_pages_define_works(page_module: ModuleType, tmp_path: Path) -> None:
    told = vars(page_module)
    for page in ("query", "experiment"):
        pages.run(HOWTO / f"{page}.md", told)
    for bias in ("drop", "input"):
        told["test_bypass"](bias)
    report = told["run"](told["Request"]("digits", tmp_path, samples=4))
    assert report.tables[0].lines == [(0, 0), (1, 1), (2, 4), (3, 9)]


# -- docs/architecture.md --------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def architecture() -> list[tuple[list[str], list[str]]]:
    """Of every line of the table the files, and all names that it has in backticks."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    lines = re.findall(r"^\| (`.*?) \| (.*) \| .*\|$", text, re.MULTILINE)
    ticked = re.compile(r"`([a-z_/]+)`")
    return [(ticked.findall(files), ticked.findall(files + what)) for files, what in lines]


def test_the_table_of_files_names_every_file() -> None:
    lines = architecture()
    first = [name.rstrip("/") for files, _ in lines for name in files]
    library = ROOT / "src" / "nrm"
    there = {path.stem for path in library.glob("*.py") if not path.stem.startswith("__")}
    folders = {path.parent.name for path in library.glob("*/__init__.py")}
    assert sorted(first) == sorted(there | folders | {"nrm_reproduce"})
    for files, told in lines:
        for folder in [name for name in files if name.endswith("/")]:
            modules = {path.stem for path in (library / folder).glob("*.py")} - {"__init__"}
            assert modules <= set(told), folder


def test_the_table_of_files_runs_as_imports_do() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if "layers" in contract)
    ours = [{name.rstrip("/") for name in files} for files, _ in architecture()]
    assert ours == [set(layer.split(" : ")) for layer in reversed(layers)] + [{"nrm_reproduce"}]


def test_the_glossary_says_where_things_are() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    places = re.findall(r"^\| \*\*.*\| (.*) \|$", text, re.MULTILINE)
    assert len(places) > 20
    for name in (name for place in places for name in re.findall(r"`([\w.]+)`", place)):
        found: object = nrm
        for part in ("Measure" + name[1:] if name.startswith("R.") else name).split("."):
            inside = f"{found.__name__}.{part}" if isinstance(found, ModuleType) else ""
            has = hasattr(found, part)
            found = getattr(found, part) if has else importlib.import_module(inside)
