"""A small network, data of three classes, and what a run on them is compared with."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nrm.dataset import Results

LAYERS = ["1", "3"]
PAIR = ("1", "3")
ASKED: dict[str, Any] = {"k": 4, "batch": 8, "shard": 16, "joint": [PAIR], "readers": 0}
TABLES = ("parts", "classes", "histogram", "top", "joint", "samples", "skipped")


def network() -> nn.Module:
    """Two convolutions and a linear layer, always with the same weights."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 2 * 2, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 3)
    return model


def data(samples: int = 70) -> tuple[Tensor, Tensor]:
    """Inputs `[samples, 1, 6, 6]` and labels."""
    generator = torch.Generator().manual_seed(6)
    x = torch.rand((samples, 1, 6, 6), generator=generator)
    return x, torch.randint(0, 3, (samples,), generator=generator)


class Deadly:
    """A data set that kills the process that first reads some of its samples.

    Arguments:
        marks: a folder, where it notes which of them have killed.
    """

    def __init__(self, marks: Path, deadly: tuple[int, ...]) -> None:
        self.marks, self.deadly = marks, deadly
        self.x, self.y = data()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        mark = self.marks / f"killed{index}"
        if index in self.deadly and not mark.exists() and (self.marks / "armed").exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[index], int(self.y[index])


def assert_equal(one: Results, other: Results) -> None:
    """Bit for bit."""
    for name in TABLES:
        assert one.kept(name).equals(other.kept(name)), name
    assert one.samples == other.samples
    assert one.complete == other.complete
