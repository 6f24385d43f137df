"""A value as it is, with a share of its derivative: how a factor of a product takes its alpha."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gradient_share(value: Tensor, share: float) -> Tensor:
    """`value`, through which derivatives pass times `share`."""
    if share == 1 or not value.requires_grad:
        return value
    if share == 0:
        return value.detach()
    shared: Tensor = _Share.apply(value, share)  # type: ignore[no-untyped-call]
    return shared


class _Share(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, share: float) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.share = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.share, None
