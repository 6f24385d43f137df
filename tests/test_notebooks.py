"""The notebooks of the site: they run from the top in a fresh Jupyter kernel, and are kept run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nrm[docs] is not installed")
nbclient = pytest.importorskip("nbclient", reason="nrm[docs] is not installed")
for package in ("ipykernel", "sklearn", "matplotlib"):
    pytest.importorskip(package, reason="nrm[docs] or nrm[demo] is not installed")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own
def test_it_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(file, as_version=4)
    kept = [kinds(cell) for cell in notebook.cells]
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", coalesce_streams=True, resources=where
    ).execute()  # raises where a cell does
    assert [kinds(cell) for cell in notebook.cells] == kept


def kinds(cell: Any) -> list[str]:
    """What a cell shows: text, pictures. Numbers may differ in their last digits."""
    shown = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
    return [kind for output in shown for kind in sorted(output.get("data", ["text"]))]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_in_order(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert file.stat().st_size < 100_000


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) >= 3
