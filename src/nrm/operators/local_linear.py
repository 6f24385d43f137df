"""The fallback for operators without a row: what the function is to first order at its input.

Only by request (`Explainer(fallback=LocalLinear())`, or a row that a user registers).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from nrm.operators.base import Columns, Operator, Propagation, Setting, fill, pull_back
from nrm.operators.call import Call


class LocalLinear(Operator):
    """`T~_ij = x_i df_j/dx_i`, normalised by its sum: `R_in = x * VJP(R / JVP(x))`.

    Columns that sum to (nearly) zero, where the function is constant to first order, end in a
    leaf.
    """

    def __init__(self, kind: str = "local linear") -> None:
        super().__init__(kind)

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        return "flat"

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        leaves = [value.detach().requires_grad_() for value in values]
        with torch.enable_grad():
            output = fill(call, leaves)()
            if not output.requires_grad:
                output = output + 0 * leaves[0].sum()
            # The product of the Jacobian and x, by two transposed products.
            probe = torch.zeros_like(output, requires_grad=True)
            gradients = torch.autograd.grad(
                output, leaves, probe, create_graph=True, materialize_grads=True
            )
            along = sum((g * x.detach()).sum() for g, x in zip(gradients, leaves, strict=True))
            assert isinstance(along, Tensor)
            columns = torch.zeros_like(output)  # a step function is constant to first order
            if along.requires_grad:
                columns = torch.autograd.grad(
                    along, probe, retain_graph=True, allow_unused=True, materialize_grads=True
                )[0]
        return output.detach(), Linearised(leaves, output, columns.detach(), setting.address)


class Linearised(Propagation):
    def __init__(self, leaves: list[Tensor], output: Tensor, columns: Tensor, address: str) -> None:
        self.leaves, self.output, self.sums, self.address = leaves, output, columns, address
        floor = torch.finfo(columns.dtype).tiny ** 0.5
        self.constant = columns.abs() <= floor
        self.divisor = torch.where(self.constant, 1.0, columns)

    def late_shape(self) -> torch.Size:
        return self.output.shape

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: bool = True
    ) -> list[Tensor | None]:
        constant = torch.where(self.constant, message, 0.0)
        share = torch.where(self.constant, 0.0, message / self.divisor) if normalized else message
        gradients = pull_back(self.output, self.leaves, share)
        pulled: list[Tensor | None] = [
            gradient * leaf.detach() if want else None
            for gradient, leaf, want in zip(gradients, self.leaves, wanted[:-1], strict=True)
        ]
        return [*pulled, constant if wanted[-1] else None]

    def columns(self, message: Tensor, tolerance: float) -> Columns | None:
        mass = message.abs().sum(0)
        size = torch.maximum(self.sums.abs(), self.output.detach().abs())
        ratio = torch.where(self.constant, 1.0, self.sums.abs() / size)
        reached = ratio[mass > 0]
        return Columns(
            self.address,
            nearly_zero=float(mass[ratio < tolerance].sum()),
            negative=float(mass[(self.sums < 0) & ~self.constant].sum()),
            vanished=float(mass[self.constant].sum()),
            smallest=float(reached.min()) if reached.numel() else 1.0,
        )
