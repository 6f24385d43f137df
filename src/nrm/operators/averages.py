"""Sums with fixed weights: means, sums, average pooling, cumulative sums, folding.

Each says which parents a neuron has, by adding them up with weight one, and what the weight is. So
rules act on the weights of single connections: the flat rule puts one in their place, w2 squares
them. Interpolation, whose weights differ from parent to parent, reads them off the operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from nrm.operators.call import UNKNOWN, Call, Function
from nrm.operators.propagation import Contribution, Setting
from nrm.operators.sums import WeightedSum
from nrm.rules import Activation
from nrm.tensors import like

_Sum = Callable[[Tensor], Tensor]


class Averaging(WeightedSum):
    """`y_j = v_j sum_i x_i` over the neurons i that an operator adds up for j, with fixed `v_j`.

    Arguments:
        argument: the name of the operand.
        along: it adds up along the axes in `dim`, or along all.
        positions: it adds up positions, which lie along so many of the last axes.
        keeps_channels: whether the channel axis stays where it is; so it does with `positions`.
        function: what else is known of it.
    """

    affine = True

    def __init__(
        self,
        kind: str,
        argument: str,
        *,
        along: bool = False,
        positions: int | None = None,
        keeps_channels: bool = False,
        function: Function = UNKNOWN,
    ) -> None:
        super().__init__(kind)
        self.argument, self.along, self.positions = argument, along, positions
        self.keeps_channels = keeps_channels or positions is not None
        self.function = function
        self.passes = (argument,)

    def channel_axis(self, call: Call, inherited: int | None) -> int | None:
        return inherited if self.keeps_channels else None

    def mixed_axes(self, call: Call, dim: int) -> list[int] | None:
        """Those along which neurons are added up, which the output has no more or has in other
        sizes."""
        if self.along:
            told = call.get("dim")
            axes = range(dim) if told is None else [told] if isinstance(told, int) else told
            return sorted(axis % dim for axis in axes) or list(range(dim))
        return None if self.positions is None else list(range(dim - self.positions, dim))

    def acts_by_channel(self, call: Call, dim: int) -> bool:
        return self.positions is not None and dim == 2 + self.positions

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        x = values[0]
        add_up, weight = self._fixed(call, x)
        return [
            Contribution(
                Activation(x),
                setting.weight("fixed", setting.kept(f"fixed {tuple(x.shape)} {x.dtype}", weight)),
                lambda factor, weight: add_up(factor) * weight,
                add_up,
                keeps_sign=True,
            )
        ]

    def _fixed(self, call: Call, x: Tensor) -> tuple[_Sum, Callable[[], Tensor]]:
        """How a call adds its operand up with weight one, and what makes `v_j`, broadcastable."""

        def run(factor: Tensor) -> Tensor:
            output: Tensor = call(**{self.argument: factor})
            return output

        if self.function.role == "mean":
            along: dict[str, Any] = {"dtype": call["dtype"]}
            if call.get("dim") is not None:
                along |= {"dim": call["dim"], "keepdim": call["keepdim"]}

            def add_up(factor: Tensor) -> Tensor:
                return torch.sum(factor, **along)

            def share() -> Tensor:
                sums = add_up(x.new_empty((), device="meta").expand(x.shape))
                return like(sums.numel() / x.numel(), x)

            return add_up, share
        if self.positions is None:
            return run, lambda: x.new_ones(())
        if "output_size" in call.arguments:  # adaptive
            sizes = _adaptive_sizes(x.shape[-self.positions :], call["output_size"], x)
            return lambda factor: run(factor) * sizes, sizes.reciprocal
        windows = _windows(call, self.positions)
        shape = (*(1,) * (x.dim() - self.positions), *x.shape[-self.positions :])

        def divided() -> Tensor:
            # Padding may count, windows may reach beyond: the operator itself says by how much it
            # divides what there is in each.
            ones = x.new_ones(shape)
            return run(ones) / windows(ones)

        return windows, divided


def _windows(call: Call, axes: int) -> _Sum:
    """What an average pooling adds up."""
    if axes > 1:
        return lambda factor: call(self=factor, divisor_override=1)
    size, stride, padding = (
        [int(entry) for entry in call[name]] for name in ("kernel_size", "stride", "padding")
    )

    def add_up(factor: Tensor) -> Tensor:  # in one dimension there is no divisor to override
        row = F.avg_pool2d(
            factor.unsqueeze(-2),
            (1, *size),
            (1, *(stride or size)),
            (0, *padding),
            call["ceil_mode"],
            call["count_include_pad"],
            divisor_override=1,
        )
        return row.squeeze(-2)

    return add_up


def _adaptive_sizes(given: Sequence[int], wanted: Sequence[int], x: Tensor) -> Tensor:
    """How many neurons each window of an adaptive pooling has."""
    sizes = x.new_ones(())
    for size, parts in zip(given, wanted, strict=True):
        each = [
            math.ceil((part + 1) * size / parts) - part * size // parts for part in range(parts)
        ]
        sizes = sizes.unsqueeze(-1) * like(each, x)
    return sizes


# -- Interpolation: a fixed map of positions whose weights differ from parent to parent.
# The weights are read off the operator itself, axis by axis, and kept one by one, so that a rule
# may put anything in their place.

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


class Sampling(Interpolation):
    """`grid_sample` at constant places; what lies outside is padded."""

    def __init__(self) -> None:
        super().__init__("interpolation", "input", keeps_channels=True)

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        return "outside"

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        x = values[0]
        places = Positions.at_places(call, x)
        native = places.weight

        def apply(factor: Tensor, weight: Tensor) -> Tensor:
            if weight is native:
                output: Tensor = call(input=factor)
                return output
            return places.apply(factor.transpose(0, 1), weight).transpose(0, 1)

        return [
            Contribution(
                Activation(x),
                setting.weight("places", native),
                apply,
                lambda factor: apply(factor, places.every),
                lambda message, weight: places.transpose(message.transpose(1, 2), weight).transpose(
                    1, 2
                ),
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

    @classmethod
    def at_places(cls, call: Call, x: Tensor) -> Positions:
        """The map of `grid_sample`, for `x` `[batch, channels, *positions]`.

        Other places are read in every sample, so that its positions are those of the batch.
        """
        # The parents of a place are neighbours: coloured in turn, no two have one colour, and a
        # picture of one colour tells the weight of one parent, and times its index who it is.
        sizes, axes = tuple(x.shape[2:]), x.dim() - 2
        turn = 4 if call["interpolation_mode"] == 2 else 2
        index = torch.meshgrid(*(torch.arange(n, device=x.device) for n in sizes), indexing="ij")
        colour = torch.stack([i % turn * turn**axis for axis, i in enumerate(index)]).sum(0)
        each = [torch.nn.functional.one_hot(colour, turn**axes).movedim(-1, 0)]
        each += [each[0] * i for i in index]
        pictures = torch.cat(each).to(x.dtype).expand(len(x), -1, *sizes)
        weight, *found = call(input=pictures).split(turn**axes, 1)
        there = weight.abs() > 4 * torch.finfo(x.dtype).eps
        batch, _, *place = there.nonzero(as_tuple=True)
        output = tuple(weight.shape[2:])
        rows, columns, weight_of = batch, batch, weight[there]
        for axis in range(axes):
            rows = rows * output[axis] + place[axis]
            parent = (found[axis][there] / weight_of).round().long()
            columns = columns * sizes[axis] + parent.clamp(0, sizes[axis] - 1)
        order = rows.argsort(stable=True)
        rows, columns, weight_of = rows[order], columns[order], weight_of[order]
        return cls(
            (len(x), *sizes), (len(x), *output), rows, columns, weight_of,
            torch.ones_like(weight_of), columns.argsort(stable=True),
        )  # fmt: skip

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
