"""Values as they are, with derivatives of another size: what relevance over value passes by.

The values are those of the operators themselves, to the last bit: where something cancels to zero
for messages it does so for derivatives, and the two ways (`nrm.telescope`) agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nrm.operators.memory import smaller_than


def gradient_share(value: Tensor, share: float) -> Tensor:
    """`value`, through which derivatives pass times `share`: how a factor takes its alpha."""
    if share == 1 or not value.requires_grad:
        return value
    if share == 0:
        return value.detach()
    return with_slope(value, value, share)


def with_slope(x: Tensor, output: Tensor, slope: Tensor | float) -> Tensor:
    """`output`, through which derivatives pass to `x` times `slope`."""
    shown: Tensor = _Slope.apply(x, output, slope)  # type: ignore[no-untyped-call]
    return shown


def with_transpose(x: Tensor, output: Tensor, transpose: Callable[[Tensor], Tensor]) -> Tensor:
    """`output`, through which derivatives pass to `x` by a linear map."""
    shown: Tensor = _Transpose.apply(x, output, transpose)  # type: ignore[no-untyped-call]
    return shown


def column_floor(dtype: torch.dtype) -> float:
    """A column whose sum is no larger than this vanishes, whatever the rule."""
    return torch.finfo(dtype).tiny


def without_vanished(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sums, through which no derivative passes where they vanish.

    A neuron whose contributions cancel has no relevance to pass on, but its derivative does not
    vanish with it.

    Returns:
        the same values; and where they are not zero but count as zero (`None`: nowhere, as far as
        is known without waiting for a device).
    """
    seen, floor = value.detach(), column_floor(value.dtype)
    if value.device.type == "cpu":
        at = smaller_than(seen, floor)
        if at is None:
            return value, None
        small = bool((seen[at] != 0).any())
        kept = torch.ones(seen.shape, dtype=torch.bool)
        kept[at] = False
    else:
        kept, small = seen.abs() > floor, True
    return with_slope(value, value, kept), (~kept & (seen != 0)) if small else None


class _Slope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, output: Tensor, slope: Tensor | float) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | float], output: Tensor
    ) -> None:
        ctx.slope = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient * ctx.slope, None, None


class _Transpose(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, output: Tensor, transpose: Callable[[Tensor], Tensor]) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Callable[[Tensor], Tensor]], output: Tensor
    ) -> None:
        ctx.transpose = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.transpose(gradient), None, None
