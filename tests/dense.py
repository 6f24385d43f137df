"""The measure from dense matrices: every connection of a small network, written out and multiplied.

`R(i|j)` of one operation is found one neuron j at a time: what a unit of relevance there gives to
every parent. All else is products of these matrices, and sums by hand over places counted from the
batch axis. Nothing of message passing, partitions, contractions or bounds takes part.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nrm.graph import Operation, Variable
from nrm.measure import Measure


class Dense:
    """All connections of a measure's network.

    Arguments:
        absolute: `|R(i|j)|` in the place of `R(i|j)`.
    """

    def __init__(self, R: Measure, absolute: bool = False) -> None:
        self.R, self.graph, self.forward = R, R.graph, R.forward_pass
        self.absolute = absolute
        self._known: dict[Operation, list[Tensor]] = {}

    def connections(self, operation: Operation) -> list[Tensor]:
        """For each operand `[neurons of the output, neurons of the operand]`, batch included."""
        if operation not in self._known:
            shape = self.forward.shape(operation.output)
            rows: list[list[Tensor]] = []
            for neuron in range(shape.numel()):
                unit = self.forward.output.new_zeros(shape.numel())
                unit[neuron] = 1
                wanted = [True] * len(operation.operands)
                pulled = self.forward.propagations[operation].pull(unit.view(1, *shape), wanted)
                rows.append([part.flatten().clone() for part in pulled if part is not None])
            found = [torch.stack(columns) for columns in zip(*rows, strict=True)]
            self._known[operation] = [m.abs() for m in found] if self.absolute else found
        return self._known[operation]

    def between(self, upper: Variable, lower: Variable) -> Tensor:
        """`[neurons of upper, neurons of lower]`: `R(i|j)` over all walks between the two."""
        sizes = {v: self.forward.shape(v).numel() for v in self.graph.variables}
        found = {upper: torch.eye(sizes[upper], dtype=self.forward.output.dtype)}
        for variable in self.graph.variables[upper.index : lower.index : -1]:
            if variable not in found or variable.producer is None:
                continue
            matrices = self.connections(variable.producer)
            for operand, matrix in zip(variable.producer.operands, matrices, strict=True):
                found[operand] = found.get(operand, 0) + found[variable] @ matrix
        return found.get(lower, torch.zeros(sizes[upper], sizes[lower]).to(found[upper]))

    def relevance(self, variable: Variable) -> Tensor:
        """`[neurons]`, where the explained neuron of each sample has relevance one."""
        start = torch.zeros(self.forward.shape(self.graph.output).numel()).to(self.forward.output)
        for neuron, (sample, place) in enumerate(self.places(self.graph.output)):
            start[neuron] = float(place == (int(self.R.target[sample]),))
        return start @ self.between(self.graph.output, variable)

    def joint(self, *layers: Variable) -> Tensor:
        """`[neurons of the first, of the second, ...]`, from the output down, batch included."""
        found = self.relevance(layers[0])
        for upper, lower in itertools.pairwise(layers):
            found = found[..., None] * self.between(upper, lower)
        return found

    def places(self, variable: Variable) -> list[tuple[int, tuple[int, ...]]]:
        """The sample and the place of every element, in the order in which they lie."""
        found = []
        for index in itertools.product(*map(range, self.forward.shape(variable))):
            if variable.batch_axis is None:
                found.append((0, index))
            else:
                rest = index[: variable.batch_axis] + index[variable.batch_axis + 1 :]
                found.append((index[variable.batch_axis], rest))
        return found

    def by_part(self, table: Tensor, axis: int, parts: list[int]) -> Tensor:
        """A table whose axis of neurons is added up by the part that each belongs to."""
        shape = list(table.shape)
        shape[axis] = max(parts) + 1
        return table.new_zeros(shape).index_add_(axis, torch.tensor(parts), table)
