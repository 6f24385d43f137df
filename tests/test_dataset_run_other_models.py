"""Runs over pictures of any size, and with tensors of a model beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="nrm[dataset] is not installed")

import torch
from support.dataset import data
from torch import Tensor, nn

import nrm
from nrm.dataset import relmax
from nrm.errors import InputError

pytestmark = pytest.mark.usefixtures("captured_once")


class AnySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("by", ["neuron", 1])
def test_parts_that_are_others_in_other_samples_are_skipped(tmp_path: Path, by: Any) -> None:
    """Place 5 of a picture of 6 x 8 is no place 5 of one of 8 x 6, however many there are."""
    explainer = nrm.Explainer(AnySize().eval())
    generator = torch.Generator().manual_seed(1)
    sizes = [(6, 8), (6, 8), (8, 6), (6, 9), (6, 8)]
    x = [torch.rand(1, *size, generator=generator) for size in sizes]
    found = relmax(explainer, x, ["conv"], tmp_path, by=by, batch=2, shard=3, k=2)
    skipped = [number for number, _, reason in found.skipped if "in the first sample" in reason]
    kept = [0, 1, 4] if by == "neuron" else [0, 1, 3, 4]  # rows are as many in 6 x 9
    assert skipped == [number for number in range(5) if number not in kept]
    assert found.samples == len(kept)
    means = []
    for number in kept:
        R = explainer(x[number][None])
        means.append(R.marginal("conv").flatten() if by == "neuron" else
                     R.marginal("conv").sum((0, 1, 3)))  # fmt: skip
    np.testing.assert_allclose(
        found.statistics("conv")["mean"].to_numpy(), torch.stack(means).mean(0).detach().numpy(),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    by_channel = relmax(explainer, x, ["conv"], tmp_path / "channels", batch=2, shard=3, k=2)
    assert by_channel.samples == 5


class Beside(nn.Module):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.shift = torch.full((1, 1, 1, 1), value)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x + self.shift)).mean((2, 3)))


class Scaled:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, item: Any) -> Any:
        return item[0] * self.by, int(item[1])


def test_what_reads_and_what_lies_beside_weights_tell_runs_apart(tmp_path: Path) -> None:
    x, y = data(6)
    torch.manual_seed(0)
    model = Beside(0.0).eval()
    relmax(nrm.Explainer(model), (x, y), ["conv"], tmp_path, read=Scaled(1.0))
    relmax(nrm.Explainer(model), (x, y), ["conv"], tmp_path, read=Scaled(1.0))
    with pytest.raises(InputError, match="another run"):
        relmax(nrm.Explainer(model), (x, y), ["conv"], tmp_path, read=Scaled(2.0))
    other = Beside(0.5).eval()
    other.load_state_dict(model.state_dict())
    with pytest.raises(InputError, match="weights is"):
        relmax(nrm.Explainer(other), (x, y), ["conv"], tmp_path, read=Scaled(1.0))
