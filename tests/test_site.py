"""The site: every page has its place, every public name its entry, and all of it is built."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import pytest

import nrm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(DOCS).with_suffix("").as_posix()
    for kind in ("*.md", "*.ipynb")
    for path in DOCS.rglob(kind)
    if "_build" not in path.parts and ".ipynb_checkpoints" not in path.parts
}


def contents() -> dict[str, list[str]]:
    """Of every page with contents the entries, which may be patterns."""
    found = {}
    for page in sorted(PAGES):
        path = DOCS / f"{page}.md"
        text = path.read_text() if path.exists() else ""  # else a notebook
        trees = re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.S | re.M)
        lines = [line for tree in trees for line in tree.splitlines()]
        found[page] = [line for line in lines if line and not line.startswith(":")]
    return {page: entries for page, entries in found.items() if entries}


def test_every_page_has_one_place() -> None:
    placed = []
    for page, entries in contents().items():
        folder = page.rpartition("/")[0]
        for entry in entries:
            pattern = f"{folder}/{entry}" if folder else entry
            fitting = [
                name
                for name in PAGES
                if fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
            ]
            # a pattern passes over what the same contents name by themselves
            by_name = {f"{folder}/{other}" if folder else other for other in entries}
            placed += [name for name in fitting if name == pattern or name not in by_name]
            assert fitting, f"{page} lists {entry}, which there is not"
    assert sorted(placed) == sorted(PAGES - {"index"})


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    told = set(re.findall(r"^\.\. auto\w+:: nrm\.(\w+)", text, re.M))
    modules = [name for name in told if name.islower() and not hasattr(nrm, f"_{name}")]
    for name in modules:
        told |= set(getattr(getattr(nrm, name), "__all__", ()))
        told |= {other for other in vars(getattr(nrm, name)) if not other.startswith("_")}
    assert set(nrm.__all__) <= told


def test_equations_name_what_there_is() -> None:
    text = (DOCS / "equations.md").read_text()
    rows = re.findall(r"^\| (?!eq\.|what|-)(.*) \|$", text, re.M)
    assert len(rows) > 25
    for row in rows:
        *_, code, tests = row.split(" | ")
        for name in re.findall(r"`(nrm\.[\w.]+)`", code):
            found(name)
        named = re.findall(r"`(test_\w+)\.(test_\w+)`", tests)
        assert named, row
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), f"{file}.{test}"


def found(name: str) -> object:
    """What a dotted name in nrm stands for."""
    part: object = nrm
    for at in name.split(".")[1:]:
        if isinstance(part, ModuleType) and not hasattr(part, at):
            part = importlib.import_module(f"{part.__name__}.{at}")
        else:
            part = getattr(part, at)
    return part


def test_every_picture_says_what_made_it() -> None:
    """And every picture is shown somewhere; the commands are looked up with all others."""
    text = (DOCS / "figures.md").read_text()
    told = set(re.findall(r"`([\w-]+\.(?:png|jpg|webp))`", text))
    there = {picture.name for picture in (DOCS / "pictures").iterdir()}
    assert told == there
    shown = "".join(page.read_text() for page in (ROOT / "README.md", *DOCS.rglob("*.md")))
    assert all(f"pictures/{name}" in shown for name in there)


def test_errors_are_all_told() -> None:
    text = (DOCS / "errors.md").read_text()
    classes = [kind for kind in vars(nrm.errors).values() if isinstance(kind, type)]
    refusals = {kind.__name__ for kind in classes if issubclass(kind, nrm.NrmError)}
    assert set(re.findall(r"^\| `(\w+Error)`", text, re.M)) == refusals - {"NrmError"}


def test_links_lead_somewhere() -> None:
    """Of README, CONTRIBUTING and all pages, to files and to headings in them."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    for page in (page for page in pages if "_build" not in page.parts):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
        text = re.sub(r"`[^`\n]*`", "code", text)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith(("http://", "https://", "mailto:")):
                continue
            file, _, heading = link.partition("#")
            aim = (page.parent / file) if file else page
            assert aim.exists(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", aim.read_text(), re.M)
                assert heading in map(slug, titles), f"{page.name}: {link}"


def slug(title: str) -> str:
    """The anchor of a heading, as MyST and most hosts make it."""
    title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_it_is_built_without_warnings(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(package, reason="nrm[docs] is not installed")
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "kept")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "site")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "R.heatmap" in (tmp_path / "site" / "measure.html").read_text()
    assert "Explainer" in (tmp_path / "site" / "api" / "measure.html").read_text()


def test_no_word_is_misspelt() -> None:
    pytest.importorskip("codespell_lib", reason="nrm[docs] is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
