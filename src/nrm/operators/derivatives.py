"""Operators by what their function is to first order, at the input or along a path to it.

For operators without a row, by request (`Explainer(fallback=LocalLinear())`, or a row that a user
registers), and for those with one under rules that are gradients (`rules.LocalLinear`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from nrm.operators.call import UNKNOWN, Call, Function, fill
from nrm.operators.propagation import Columns, Ends, Propagation, Setting, pull_back, refuse_failing
from nrm.operators.row import Operator
from nrm.rules import Normalized, Rule


class LocalLinear(Operator):
    """`T~_ij = x_i df_j/dx_i`, normalised by its sum: `R_in = x * VJP(R / JVP(x))`.

    Along a path (`rules.PathIntegrated`), the sum of `dx_i df_j/dx_i` over its steps. Columns that
    sum to (nearly) zero, where the function is constant to first order, end in a leaf.

    Arguments:
        function: what else is known of it.
        passes: the arguments that relevance may pass to; `None`: every tensor.
    """

    by_derivatives = True

    def __init__(
        self,
        kind: str = "local linear",
        function: Function = UNKNOWN,
        passes: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(kind)
        self.function, self.passes = function, passes

    def orphans(self, call: Call, operands: Sequence[tuple[str, Node]]) -> str | None:
        return "flat"

    def constant(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor | None:
        """What the late leaf adds to every neuron."""
        return None

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        values = [value.detach() for value in values]
        if setting.path:
            with torch.no_grad():
                output: Tensor = fill(call, values)()
            steps = [
                Step.between(call, before, after)
                for before, after in pairwise([*setting.path, values])
            ]
            return output, Linearised(steps, output, None, setting)
        step = Step.of(call, values, values)
        output = step.output.detach()
        added = self.constant(call, values, setting)
        return output, Linearised([step], output, added, setting)


class LinearMap(LocalLinear):
    """A linear map that goes by what has no row."""

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        output: Tensor = fill(call, ends.moves)()
        return output


class RootOfSquares(LocalLinear):
    """Norms and standard deviations, roots of a quadratic form `q`; and the form itself.

    Between two inputs a quadratic form has its derivative half way for a slope, and its root
    `Dq / (y + y')`.
    """

    def secant(self, call: Call, ends: Ends, setting: Setting) -> Tensor:
        name = str(call.target).partition(".")[2].partition(".")[0]
        order = call.get("ord", call.get("p", 2))
        if order not in (None, 2) or call.item not in (None, 0):
            return super().secant(call, ends, setting)
        pairs = zip(ends.before, ends.after, strict=True)
        middle = [(a.detach() + b.detach()) / 2 for a, b in pairs]
        points = [m + (d - d.detach()) for m, d in zip(middle, ends.moves, strict=True)]
        output: Tensor = fill(call, points)()
        if name.startswith("var"):
            return output
        low, high = (
            fill(call, [x.detach() for x in point])() for point in (ends.before, ends.after)
        )
        scale = 2 * output.detach() / (low + high)
        return output * torch.where(scale.isfinite(), scale, 0.0)


class ToFirstOrder(LocalLinear):
    """The operator of another row, by its own derivatives.

    Arguments:
        row: the other row. A bias that it adds stays one.
    """

    def __init__(self, row: Operator) -> None:
        super().__init__(row.kind)
        self.row, self.passes = row, row.passes

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return self.row.has_bias(call, operands, rule)

    def channel_axis(self, call: Call, inherited: int | None) -> int | None:
        return self.row.channel_axis(call, inherited)

    def acts_on_last_axis(self, call: Call) -> bool:
        return self.row.acts_on_last_axis(call)

    def constant(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor | None:
        if setting.late_leaf != "bias":
            return None
        return self.row.bias(call, values, setting.output_dim)


@dataclass
class Step:
    """A function at one point, with how far each operand moves there.

    Attributes:
        leaves, output: the point and the function's value, with a local autograd graph between.
        moves: `[*operand shape]` of each operand.
    """

    leaves: list[Tensor]
    output: Tensor
    moves: list[Tensor]

    @classmethod
    def of(cls, call: Call, point: Sequence[Tensor], moves: Sequence[Tensor]) -> Step:
        leaves = [value.detach().requires_grad_() for value in point]
        with torch.enable_grad():
            output = fill(call, leaves)()
            if not output.requires_grad:
                output = output + 0 * leaves[0].sum()
        # What is masked with -inf has no derivative, whatever it is.
        return cls(leaves, output, [torch.where(move.isfinite(), move, 0.0) for move in moves])

    @classmethod
    def between(cls, call: Call, before: Sequence[Tensor], after: Sequence[Tensor]) -> Step:
        """A step of a path, by its middle."""
        ends = list(zip(before, after, strict=True))
        return cls.of(call, [(a + b) / 2 for a, b in ends], [b - a for a, b in ends])

    def columns(self) -> Tensor:
        """`sum_i move_i df_j/dx_i`: the product of the Jacobian and moves."""
        with torch.enable_grad():  # by two transposed products
            # Ones: some derivatives are computed by way of logarithms of what is passed back.
            probe = torch.ones_like(self.output, requires_grad=True)
            gradients = torch.autograd.grad(
                self.output, self.leaves, probe, create_graph=True, materialize_grads=True
            )
            pairs = zip(gradients, self.moves, strict=True)
            along = torch.stack([(gradient * move).sum() for gradient, move in pairs]).sum()
            if not along.requires_grad:  # a step function is constant to first order
                return torch.zeros_like(self.output)
            (found,) = torch.autograd.grad(
                along, probe, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        return found.detach()


class Linearised(Propagation):
    """A function by its derivatives along some steps.

    Arguments:
        steps: their points and moves.
        output: the function's value at the input.
        added: what the late leaf adds; `None`: nothing.
    """

    exclusive = True

    def __init__(
        self, steps: Sequence[Step], output: Tensor, added: Tensor | None, setting: Setting
    ) -> None:
        self.steps, self.output, self.added, self.setting = steps, output, added, setting
        sums = torch.stack([step.columns() for step in steps]).sum(0)
        self.sums = sums if added is None else sums + added
        kind = torch.finfo(sums.dtype)
        size = torch.stack([output.abs(), *(step.output.detach().abs() for step in steps)]).amax(0)
        # Below a rounding error of the values, the sum is one.
        self.flat = self.sums.abs() <= (4 * kind.eps * size).clamp(min=kind.tiny**0.5)
        self.any_flat = bool(self.flat.any())
        self.divisor = torch.where(self.flat, 1.0, self.sums)

    def late_shape(self) -> torch.Size:
        return self.output.shape

    def pull(
        self, message: Tensor, wanted: Sequence[bool], normalized: Normalized = True
    ) -> list[Tensor | None]:
        if self.setting.strict and not message.requires_grad:
            # Columns of zero are no violation: what they take ends in a leaf.
            refuse_failing(
                message,
                (self.sums < 0) & ~self.flat,
                self.setting.address,
                "by its derivatives",
                "Choose a rule for it that takes none, or drop strict.",
            )
        if self.any_flat and not message.requires_grad:
            met = torch.where(self.flat, message, 0.0).abs().flatten(1).sum(1)
            self.vanished = max(self.vanished, float(met.max()))
        share = message / self.divisor if normalized else message
        share = torch.where(self.flat, 0.0, share)
        pulled: list[Tensor | None] = [None] * len(wanted)
        if any(wanted[:-1]):
            for step in self.steps:
                gradients = pull_back(step.output, step.leaves, share)
                for operand, gradient in enumerate(gradients):
                    if wanted[operand]:
                        product = gradient * step.moves[operand]
                        before = pulled[operand]
                        pulled[operand] = product if before is None else before + product
        if wanted[-1]:
            added = 0.0 if self.added is None else self.added
            pulled[-1] = torch.where(self.flat, message, share * added)
        return pulled

    def columns(self, message: Tensor, tolerance: float) -> Columns | None:
        mass = message.abs().sum(0)
        size = torch.maximum(self.sums.abs(), self.output.abs())
        ratio = torch.where(self.flat, 1.0, self.sums.abs() / size)
        reached = ratio[mass > 0]
        return Columns(
            self.setting.address,
            nearly_zero=float(mass[ratio < tolerance].sum()),
            negative=float(mass[(self.sums < 0) & ~self.flat].sum()),
            vanished=float(mass[self.flat].sum()),
            smallest=float(reached.min()) if reached.numel() else 1.0,
        )
