"""Interpolation: a fixed map of positions whose weights differ from parent to parent.

The weights are read off the operator itself, axis by axis, and kept one by one, so that a rule may
put anything in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nrm.operators.averages import Averaging
from nrm.operators.base import Setting
from nrm.operators.call import Call
from nrm.operators.contribution import Contribution
from nrm.rules import Activation

_NOTHING = 1e-9
"""Weights of no more than this, in double precision, are zero but for rounding."""

_BASIS = 2**22  # elements at once, to read weights off the operator


class Interpolation(Averaging):
    """Linear (bilinear, trilinear) and bicubic interpolation, antialiased or not."""

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        x = values[0]
        key = f"{tuple(x.shape[2:])} {x.dtype} {x.device}"
        places = setting.kept(f"connected {key}", lambda: Positions.of(call, self.argument, x))
        native = places.weight

        def apply(factor: Tensor, weight: Tensor) -> Tensor:
            if weight is native:
                output: Tensor = call(**{self.argument: factor})
                return output
            return places.apply(factor, weight)

        return [
            Contribution(
                Activation(x),
                setting.weight("positions", native),
                apply,
                lambda factor: places.apply(factor, places.every),
                places.transpose,
                keeps_sign=True,
                every=places.every,
            )
        ]


@dataclass(frozen=True, eq=False)
class Positions:
    """A linear map of positions, the same for all channels, by its connections.

    Attributes:
        operand, output: the sizes of the last axes.
        rows, columns: `[connections]`, the output's and the operand's positions, sorted by row.
        weight, every: `[connections]`, the weights, and one for each.
        by_column: the order of the connections by the operand's positions.
    """

    operand: tuple[int, ...]
    output: tuple[int, ...]
    rows: Tensor
    columns: Tensor
    weight: Tensor
    every: Tensor
    by_column: Tensor

    @classmethod
    def of(cls, call: Call, argument: str, x: Tensor) -> Positions:
        """The map of a call, for an operand `[batch, channels, *positions]`."""
        operand = tuple(x.shape[2:])
        tables = [_along(call, argument, operand, axis) for axis in range(len(operand))]
        output = tuple(table.shape[0] for table in tables)
        rows, columns = torch.zeros((2, 1), dtype=torch.long)
        weight = torch.ones(1, dtype=torch.float64)
        for table in tables:  # the weights are products of those along each axis
            row, column = (table.abs() > _NOTHING).nonzero(as_tuple=True)
            rows = (rows[:, None] * table.shape[0] + row).flatten()
            columns = (columns[:, None] * table.shape[1] + column).flatten()
            weight = (weight[:, None] * table[row, column]).flatten()
        order = rows.argsort(stable=True)
        rows, columns, weight = (each[order].to(x.device) for each in (rows, columns, weight))
        weight = weight.to(x.dtype)
        by_column = columns.argsort(stable=True)
        return cls(operand, output, rows, columns, weight, torch.ones_like(weight), by_column)

    def apply(self, factor: Tensor, weight: Tensor) -> Tensor:
        """`[..., *operand]` to `[..., *output]`, the connections with any weight."""
        indices = torch.stack([self.rows, self.columns])
        return self._multiply(indices, weight, factor, self.output)

    def transpose(self, message: Tensor, weight: Tensor) -> Tensor:
        """`[..., *output]` to `[..., *operand]`."""
        indices = torch.stack([self.columns, self.rows])[:, self.by_column]
        return self._multiply(indices, weight[self.by_column], message, self.operand)

    def _multiply(
        self, indices: Tensor, weight: Tensor, factor: Tensor, sizes: tuple[int, ...]
    ) -> Tensor:
        given = self.operand if sizes is self.output else self.output
        matrix = torch.sparse_coo_tensor(
            indices,
            weight,
            (prod(sizes), prod(given)),
            is_coalesced=True,
            check_invariants=False,  # said, because torch warns where it is not
        )
        lead = factor.shape[: factor.dim() - len(given)]
        product: Tensor = torch.sparse.mm(matrix, factor.reshape(-1, prod(given)).mT)
        return product.mT.reshape(*lead, *sizes)


def _along(call: Call, argument: str, operand: tuple[int, ...], axis: int) -> Tensor:
    """`[output, operand]` positions along one axis: the weights, in double precision."""
    size = operand[axis]
    others = [1 if place == axis else length for place, length in enumerate(operand)]
    columns = []
    for begin in range(0, size, max(1, _BASIS // prod(operand))):
        chosen = torch.arange(begin, min(size, begin + max(1, _BASIS // prod(operand))))
        basis = torch.nn.functional.one_hot(chosen, size).to(torch.float64)
        along = [1] * len(operand)
        along[axis] = size
        # Constant along the other axes, where weights sum to one.
        points = basis.view(len(chosen), 1, *along).repeat(1, 1, *others)
        found = call(**{argument: points})
        line = found.movedim(2 + axis, 1).flatten(2)[..., 0]
        columns.append(line)
    return torch.cat(columns).mT
