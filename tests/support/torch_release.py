"""What torch 2.6, the oldest release that is allowed, lacks: tests of it are skipped there."""

from __future__ import annotations

import pytest
import torch

OLDEST = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)

# Of the first there is no derivative; of the others none of their derivatives.
UNDERIVED = ("aten.aminmax", "aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")


def newer(lacks: str) -> pytest.MarkDecorator:
    """A mark of tests that need a newer torch, because the oldest one `lacks` something."""
    return pytest.mark.skipif(OLDEST, reason=f"torch 2.6 {lacks}")


def skip_underived(name: str, *names: str) -> None:
    """Skip the test of an operator whose derivative the oldest torch lacks.

    Arguments:
        names: those that this is about.
    """
    if OLDEST and name in names:
        pytest.skip(f"torch 2.6 has no such derivative of {name}")
