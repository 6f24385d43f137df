"""Heatmaps of a run are what the run computed: in its units, by its explainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.dataset import LAYERS, data, network
from torch import nn

import nrm
from nrm import composites
from nrm.dataset import pictures, relmax
from nrm.errors import InputError, TargetError


def test_heatmaps_are_in_the_units_of_the_run(tmp_path: Path) -> None:
    model, (x, y) = network(), data(20)
    explainer = nrm.Explainer(model)
    for scale in ("normalized", "logit"):
        run = relmax(explainer, (x, y), LAYERS, tmp_path / scale, k=3, scale=scale)
        found = run.heatmaps(explainer, (x, y), "3", 1)
        assert found.scale == scale
        for one, heatmap in zip(found.references, found.heatmaps, strict=True):
            assert float(heatmap.sum()) == pytest.approx(one.value, rel=1e-4)
        shares = run.heatmaps(explainer, (x, y), "3", 1, conditional=True)
        assert shares.scale == "normalized"
        known = [float(one.value != 0) for one in shares.references]
        assert shares.heatmaps.sum((1, 2, 3)).tolist() == pytest.approx(known, rel=1e-4)
        notes = [text.get_text() for text in pictures.references(found).texts]
        assert any("raises the explained output" in note for note in notes) is (scale == "logit")


def test_another_explainer_is_refused(tmp_path: Path) -> None:
    """Its heatmaps would not add up to what stands beside them."""
    model, samples = network(), data(20)
    run = relmax(nrm.Explainer(model), samples, LAYERS, tmp_path / "run", k=3)
    for other in (
        nrm.Explainer(model, composites.LRPZero()),
        nrm.Explainer(model, bias="input"),
        nrm.Explainer(model, head="keep"),
    ):
        with pytest.raises(InputError, match="explainer with other settings"):
            run.heatmaps(other, samples, "3", 1)
    run.heatmaps(nrm.Explainer(model, check="output"), samples, "3", 1)


def test_batches_along_another_axis_are_refused_by_that(tmp_path: Path) -> None:
    class Series(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # [steps, batch, features]
            found: torch.Tensor = self.b(torch.relu(self.a(x)).sum(0))
            return found

    explainer = nrm.Explainer(Series().eval(), batch_axis=1)
    with pytest.raises(TargetError, match="along the first axis"):
        relmax(explainer, torch.rand(4, 5, 3), ["a"], tmp_path / "run")
