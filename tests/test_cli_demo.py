"""`nrm demo`: what it writes, and that it learns the same every time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="the command line's packages are not installed")

from support.command_line import refused, run

from nrm.cli import demo


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo(here: Path, coarse: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.setattr(demo, "DIGITS", demo.DIGITS[-1:])  # one as the other
    result = run("demo", "--out", "shown", "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "recognises" in result.stdout
    for digit in demo.DIGITS:
        found = json.loads(Path(f"shown/digit_{digit}/result.json").read_text())
        assert found["target"] == digit
        assert found["worst_cut_deviation"] < 1e-5
        assert len(found["flows"]) == 4
        assert {p.name for p in Path(f"shown/digit_{digit}").iterdir()} == {
            *found["pictures"], "result.json"
        }  # fmt: skip


def test_the_demo_learns_the_same_every_time() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    before = torch.get_rng_state()
    one, two = demo.trained(1), demo.trained(1)
    assert torch.equal(one.model.conv1.weight, two.model.conv1.weight)  # type: ignore[arg-type]
    assert one.accuracy > 0.5
    assert torch.equal(before, torch.get_rng_state())


def test_the_demo_without_scikit_learn(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(run("demo", "--out", "out"), "pip install 'nrm[demo]'")
