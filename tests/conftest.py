"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import nrm.explainer

torch.set_num_threads(1)  # networks are small; two threads that wait for each other are slower
# torch.export makes so many objects that a fifth of its time goes into looking for garbage.
gc.set_threshold(100_000, 10, 10)


QUICK = ("query_walks", "formulas", "measure", "measure_laws", "rules")
"""The files of `make quick` in this folder, of whose tests it runs those on three networks."""
QUICK_NETWORKS = ("MLP", "Conv", "Residual")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import what `make quick` leaves out: that takes longer than some of its tests."""
    if config.option.markexpr != "quick" or collection_path.suffix != ".py":
        return None  # as otherwise
    return not _is_quick(collection_path) or None


def _is_quick(path: Path) -> bool:
    return path.parent == Path(__file__).parent and path.stem.removeprefix("test_") in QUICK


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` runs."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        network = parameters.params.get("network") if parameters is not None else None
        # torchvision alone takes seconds to import
        heavy = "torchvision_models" in getattr(item, "fixturenames", ())
        if _is_quick(item.path) and network in (None, *QUICK_NETWORKS) and not heavy:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="session")
def torchvision_models() -> ModuleType:
    """torchvision's models, also where its compiled operators do not fit the installed torch."""
    pytest.importorskip("typer", reason="the command line's packages are not installed")
    from nrm.torchvision_mismatch import import_torchvision

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torchvision's compiled operators", RuntimeWarning)
        try:
            torchvision = import_torchvision()
        except ModuleNotFoundError as error:
            pytest.skip(f"torchvision is not installed: {error}")
    models: ModuleType = torchvision.models
    return models


@pytest.fixture(scope="module")
def captures() -> dict[Any, Any]:
    """What `captured_once` keeps for the tests of a file."""
    return {}


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch, captures: dict[Any, Any]) -> None:
    """Capture a model once for all explainers of a file: it takes longest, whatever the rule."""
    itself = nrm.explainer.capture

    def capture(call: Any, batch_axis: int | None, *options: Any) -> Any:
        shapes = tuple((tuple(x.shape), x.dtype) for x in call.tensors)
        key = (id(call.model), shapes, batch_axis, *call.key)
        if key not in captures:  # with the model, so that its id stays its own
            captures[key] = call.model, itself(call, batch_axis, *options)
        return captures[key][1]

    monkeypatch.setattr(nrm.explainer, "capture", capture)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line draws everything, with few pixels: those take longest."""
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 20)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures are empty, where a test reads what was computed: drawing takes longer."""
    from matplotlib.figure import Figure

    from nrm.cli import report

    monkeypatch.setattr(report.plot, "single", lambda *_, **__: Figure())
    monkeypatch.setattr(report.plot, "overview", lambda *_, **__: Figure())
    monkeypatch.setattr(report.plot, "save", lambda figure, path: path.touch())
