"""The command line run in this process, and a model that it explains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from nrm.cli import app as commands

HOME = __name__
"""Of the models and transforms here, for `--model` and `--transform`."""
MODEL = f"{HOME}:tiny"
COLOURS = ["red", "Green", "blue", "blue", "sky, heaven"]


def tiny() -> nn.Module:
    """A classifier of five classes for colour pictures of 28 x 28."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip


def fill(folder: Path) -> None:
    """A picture, weights and labels."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    torch.manual_seed(1)
    state = {name: torch.randn_like(value) * 0.3 for name, value in tiny().state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    torch.save(state, folder / "weights.pt")
    (folder / "labels.txt").write_text("\n".join(COLOURS) + "\n")


def grey(image: Image.Image) -> Tensor:
    """A transform to one channel of 28 x 28."""
    return torch.from_numpy(np.array(image.convert("L").resize((28, 28)))).float()[None] / 255


def grey_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 3))


def run(*arguments: object) -> Any:
    """`nrm` with these arguments; what it raises is raised here."""
    return CliRunner().invoke(commands.app, [str(a) for a in arguments], catch_exceptions=False)


def explain(*more: str, image: str = "picture.png", model: str = MODEL) -> Any:
    size = [] if "--transform" in more or "--size" in more else ["--size", "28"]
    return run("explain", image, "--model", model, *size, "--out", "out", *more)


def refused(result: Any, *parts: str) -> None:
    """One line on stderr that says these things, exit code 2, nothing on stdout or on disk."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.endswith("…")]
    notes = [line for line in lines if line.startswith("no --weights")]
    assert len(lines) - len(notes) == 1, lines
    assert lines[-1].startswith("error: ")
    for part in parts:
        assert part in lines[-1]
    assert "Traceback" not in result.stderr
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))
