"""Whether an eager trace holds numbers that Python computed from the input.

`.item()`, `.tolist()` and numpy leave the trace, and what comes back is recorded as a constant. A
branch that Python took is one too, but small changes of the input do not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_CHANGES = {torch.float64: (1e-3, 1e-6), torch.float32: (1e-2, 1e-3)}
"""How much inputs are changed by, relative to their values."""

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}


def holds_numbers_of(
    inputs: Sequence[Tensor],
    model: Callable[[Sequence[Tensor]], Tensor],
    trace: Callable[[Sequence[Tensor]], Tensor],
) -> bool:
    """Whether a trace follows small changes of its inputs in another way than the model does.

    Where they part as soon as anything changes, and less the smaller the change is.

    Arguments:
        inputs: those of the trace; those that hold no real values stay as they are.
    """
    errors = []
    for place in range(2):
        changed = [_changed(x, place) for x in inputs]
        if all(new is old for new, old in zip(changed, inputs, strict=True)):
            return False
        try:
            expected, found = model(changed), trace(changed)
        except Exception:  # any code may stand behind a model; the trace is for other sizes
            return False
        if expected.shape != found.shape or expected.dtype not in _ROUNDING:
            return False
        size = float(expected.abs().max()) or 1.0
        errors.append(float((expected - found).abs().max()) / size)
        if not errors[-1] > _ROUNDING[expected.dtype]:
            return False
    return errors[0] > 3 * errors[1]


def _changed(x: Tensor, place: int) -> Tensor:
    """The input with all its values changed a little; zeros stay."""
    if x.dtype not in _CHANGES:
        return x
    seeded = torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=seeded, dtype=x.dtype) * 2 - 1
    return x * (1 + _CHANGES[x.dtype][place] * noise.to(x.device))
