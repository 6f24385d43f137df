"""The one way between two layers, and the weighted sum on it by which channels are joined."""

from __future__ import annotations

from dataclasses import dataclass

from nrm.graph import Graph, Operation, Variable
from nrm.operators import Identity, Product, Routing
from nrm.operators.averages import Averaging
from nrm.operators.layers import Elementwise, Layer


@dataclass(frozen=True)
class Step:
    """An operation that all walks between two layers pass.

    Attributes:
        operand: the place among its operands over which they all leave it.
    """

    operation: Operation
    operand: int

    @property
    def above(self) -> Variable:
        """What it computes."""
        return self.operation.output

    @property
    def below(self) -> Variable:
        """Its parents on the way."""
        return self.operation.operands[self.operand]

    @property
    def moves(self) -> bool:
        """Whether every neuron has its parent anywhere."""
        return isinstance(self.operation.operator, Routing)

    def mixed_axes(self, dim: int) -> list[int] | None:
        """The axes of its `dim` along which parents may lie; `None` where it is not known.

        Along all others a neuron and its parents have the same place.
        """
        operator = self.operation.operator
        if isinstance(operator, Averaging | Layer):
            return operator.mixed_axes(self.operation.call, dim)
        return [] if isinstance(operator, Identity | Elementwise | Product) else None

    @property
    def passes_all_on(self) -> bool:
        """Whether the relevance of every neuron goes to its one parent, all of it."""
        return isinstance(self.operation.operator, Identity)


@dataclass(frozen=True)
class Bridge:
    """The one operation between two layers that may join any channels.

    Attributes:
        crossing: that operation.
        above, below: the others on the way, which keep channels apart, the highest first.
    """

    crossing: Step
    above: tuple[Step, ...]
    below: tuple[Step, ...]

    @property
    def axis(self) -> int | None:
        """Where its weight has channels, of parents and output, counted from the end."""
        operator, call = self.crossing.operation.operator, self.crossing.operation.call
        return -1 if operator.acts_on_last_axis(call) else operator.channel_axis(call, None)


def find_bridge(graph: Graph, upper: Variable, lower: Variable) -> Bridge | None:
    """The one operation that may join any channels of two layers, if there is just one.

    A convolution of single channels, if there is nothing else.
    """
    steps = _steps(graph, upper, lower)
    crossings = [place for place, step in enumerate(steps) if not _keeps_apart(step)]
    if not crossings:
        crossings = [
            p for p, step in enumerate(steps) if isinstance(step.operation.operator, Layer)
        ]
    if len(crossings) != 1:
        return None
    (place,) = crossings
    return Bridge(steps[place], tuple(steps[:place]), tuple(steps[place + 1 :]))


def _keeps_apart(step: Step) -> bool:
    return step.moves or step.mixed_axes(len(step.below.shape)) is not None


def _steps(graph: Graph, upper: Variable, lower: Variable) -> list[Step]:
    """The way from one layer down to another; none, where there are several or there is none."""
    steps: list[Step] = []
    variable = upper
    while variable is not lower:
        operation = variable.producer
        if operation is None:
            return []
        ways = [
            place
            for place, operand in enumerate(operation.operands)
            if operand is lower or lower in graph.upstream(operand)
        ]
        if len(ways) != 1:
            return []
        steps.append(Step(operation, ways[0]))
        variable = operation.operands[ways[0]]
    return steps
