"""Batch norm in evaluation mode: a fixed scale and shift per channel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.operators.base import Setting
from nrm.operators.call import Call
from nrm.operators.connections import OneParent
from nrm.operators.contribution import Contribution
from nrm.operators.layers import Elementwise
from nrm.rules import Activation, Rule


class BatchNorm(Elementwise):
    """Batch norm that no layer before it could take in (see `nrm.graph.folding`)."""

    passes = ("input",)

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return True

    def check(self, call: Call, operands: Sequence[tuple[str, Node]], address: str) -> None:
        if call.get("training") or call["running_mean"] is None:
            raise UnsupportedOperatorError(
                f"batch norm at {address!r} uses the statistics of the batch, which ties the "
                "samples of a batch together. Call model.eval(), and keep track_running_stats."
            )

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        scale, _ = scale_and_shift(**statistics(call))
        weight = _per_channel(scale, values[0].dim())
        return [
            Contribution(
                Activation(values[0]),
                setting.weight("scale", weight),
                torch.mul,
                lambda factor: factor,
                keeps_sign=True,
                connections=partial(OneParent, weight, values[0].shape),
            )
        ]

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        _, shift = scale_and_shift(**statistics(call))
        return _per_channel(shift, dim)


def statistics(call: Call) -> dict[str, Any]:
    """What decides scale and shift, by the names that `scale_and_shift` takes."""
    return {
        "gain": call["weight"],
        "offset": call["bias"],
        "mean": call["running_mean"],
        "variance": call["running_var"],
        "eps": call["eps"],
    }


def scale_and_shift(
    gain: Tensor | None, offset: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`(x - mean) / sqrt(variance + eps) * gain + offset` as `x * scale + shift`."""
    scale = torch.rsqrt(variance + eps)
    if gain is not None:
        scale = scale * gain
    shift = -mean * scale
    if offset is not None:
        shift = shift + offset
    return scale, shift


def _per_channel(value: Tensor, dim: int) -> Tensor:
    return value.view((1, -1) + (1,) * (dim - 2))
