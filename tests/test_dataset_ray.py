"""Runs on a Ray cluster on this machine: the same results, also where a worker dies."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="nrm[dataset] is not installed")
pytest.importorskip("ray", reason="nrm[ray] is not installed")

from support.dataset import ASKED, LAYERS, Deadly, assert_equal, data, network

import nrm
from nrm.dataset import relmax
from nrm.errors import InputError


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_cluster_gives_the_same_and_a_worker_that_dies_costs_its_shard(tmp_path: Path) -> None:
    explainer = nrm.Explainer(network())
    whole = relmax(explainer, data(), LAYERS, tmp_path / "whole", **ASKED)
    marks = tmp_path / "marks"
    marks.mkdir()
    deadly = Deadly(marks, (20,))
    (marks / "armed").touch()
    found = relmax(explainer, deadly, LAYERS, tmp_path / "out", ray=True, **ASKED)
    assert (marks / "killed20").exists()
    assert_equal(found, whole)


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ray: no cluster at auto"):
        relmax(nrm.Explainer(network()), data(), LAYERS, tmp_path / "out", ray="auto", **ASKED)
