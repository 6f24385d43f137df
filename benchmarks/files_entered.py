"""How many files of the library a reader passes who follows one call with a profiler.

    python benchmarks/files_entered.py

Counts the files of nrm in which any function runs, for `R(a, b)` on a small convolutional network
that was captured before, and for `nrm explain` from the command line's start to its result. What
runs when modules are imported is not counted.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import nrm

LIBRARY = Path(nrm.__file__).parent


def files_entered(call: Callable[[], Any]) -> list[str]:
    """The files of the library whose functions run in a call, by their path within it."""
    entered: set[str] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name != "<module>":
            entered.add(code.co_filename)

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    inside = (Path(name) for name in entered if name.startswith(str(LIBRARY)))
    return sorted(str(path.relative_to(LIBRARY)) for path in inside)


def model() -> nn.Module:
    """A small convolutional network; the command makes it by its name."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU()]
    pooled = nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*layers, pooled, nn.Flatten(), nn.Linear(20, 3)).eval()


def a_query() -> Callable[[], Any]:
    network = model()
    R = nrm.Explainer(network, nrm.composites.GammaFlat())(torch.rand(2, 3, 10, 10), target=1)
    a, b = nrm.channels("0", 1), nrm.channels("3", 2)
    R(a, b)  # what is worked out once
    return lambda: R(a, b)


def a_command(folder: Path) -> Callable[[], Any] | None:
    """`nrm explain`, on a picture of noise."""
    try:
        from PIL import Image

        from nrm.cli.app import app
    except ImportError as missing:
        sys.stdout.write(f"nrm explain: skipped, {missing.name} is not installed\n")
        return None
    pixels = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
    picture = folder / "picture.png"
    Image.fromarray(pixels).save(picture)
    sys.path.insert(0, str(Path(__file__).parent))
    arguments = ["explain", str(picture), "--model", "files_entered:model"]
    arguments += ["--out", str(folder / "out")]
    return lambda: app(arguments, standalone_mode=False)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        calls = {"R(a, b)": a_query(), "nrm explain": a_command(Path(folder))}
        for name, call in calls.items():
            if call is None:
                continue
            entered = files_entered(call)
            sys.stdout.write(f"{name}: {len(entered)} files\n")
            for path in entered:
                sys.stdout.write(f"    {path}\n")


if __name__ == "__main__":
    main()
