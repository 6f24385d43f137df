"""What takes the place of removed activations: zero, a mean, or values of one's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import QueryError
from nrm.graph import Graph, Variable
from nrm.tensors import check_dense, like

Removal = str | float | Mapping[str, str | float | Tensor]
"""What takes the place of removed activations."""


def by_variable(
    removal: Removal, graph: Graph
) -> str | float | dict[Variable, str | float | Tensor]:
    """The removal, with variables in the place of their names.

    Raises:
        QueryError: it is none.
    """
    if isinstance(removal, Mapping):
        return {graph.variable(layer): value for layer, value in removal.items()}
    if removal in ("zero", "mean"):
        return removal
    number = isinstance(removal, Real) and not isinstance(removal, bool)
    if number and math.isfinite(float(removal)):
        return float(removal)
    raise QueryError(
        "removal is 'zero', 'mean', a number or a mapping of layers to numbers or tensors, not "
        f"{removal!r}."
    )


def replacement(
    removal: str | float | dict[Variable, str | float | Tensor], variable: Variable, value: Tensor
) -> Tensor:
    """`[neurons]`, what the activations of a variable become.

    Arguments:
        value: of the sample.

    Raises:
        QueryError: it has another shape, or is not finite.
    """
    shape = variable.neuron_shape(value.shape)
    given = removal.get(variable, "zero") if isinstance(removal, dict) else removal
    if isinstance(given, str) and given == "mean":
        return _means(value.reshape(shape), variable).reshape(-1)
    if isinstance(given, str) and given == "zero":
        given = 0.0
    wrong = isinstance(given, str | bool | complex)
    if wrong or (isinstance(given, Tensor) and (given.is_complex() or given.dtype is torch.bool)):
        raise QueryError(
            f"the removal of {variable.name!r} is 'zero', 'mean', a number or a tensor, not "
            f"{given!r}."
        )
    if isinstance(given, Tensor):
        check_dense(given, f"the removal of {variable.name!r}", QueryError)
    found = like(given, value).detach().clone()  # callers reuse theirs
    if found.shape not in (torch.Size(), shape):
        raise QueryError(
            f"the removal of {variable.name!r} has shape {tuple(found.shape)}, its neurons "
            f"{tuple(shape)} (without the batch)."
        )
    if not bool(torch.isfinite(found).all()):
        raise QueryError(f"the removal of {variable.name!r} holds NaN or infinite values.")
    return found.expand(shape).reshape(-1)


def _means(values: Tensor, variable: Variable) -> Tensor:
    """For each neuron the mean of its channel; of all, where channels have one neuron each."""
    shape = values.shape
    axes = tuple(range(values.dim()))
    if values.dim() > 1:
        along = variable.channel_axis_of(shape)
        rest = tuple(axis for axis in axes if axis != along)
        if math.prod(shape[axis] for axis in rest) > 1:
            axes = rest
    return values.mean(axes, keepdim=True).expand(shape) if axes else values


# -- Families of neuron sets, laid out so that many sets are removed from many copies at once.


@dataclass(frozen=True, eq=False)
class Picked:
    """The neurons of one variable that each set of a family has.

    Attributes:
        index: `[elements]`, the neurons, set after set.
        owner: `[elements]`, the set that each belongs to.
        begin, count: `[sets]`, where the neurons of a set are among the elements.
        single: each set is one neuron.
    """

    index: Tensor
    owner: Tensor
    begin: Tensor
    count: Tensor
    single: bool

    @classmethod
    def of(cls, indices: Sequence[Tensor], device: torch.device) -> Picked:
        count = torch.tensor([len(index) for index in indices])
        owner = torch.repeat_interleave(torch.arange(len(indices)), count)
        begin = count.cumsum(0) - count
        tensors = (torch.cat(list(indices)), owner, begin, count)
        index, owner, begin, count = (t.to(device) for t in tensors)
        return cls(index, owner, begin, count, bool((count == 1).all()))

    def sums(self, values: Tensor) -> Tensor:
        """`[rows, sets]`, values `[rows, neurons]` added up over each set."""
        if self.single:
            return values.index_select(1, self.index)
        found = values.new_zeros(len(values), len(self.count))
        at_once = max(values.shape[1], 1)  # sets may have neurons in common
        for begin in range(0, len(self.index), at_once):
            part = slice(begin, begin + at_once)
            found.index_add_(1, self.owner[part], values.index_select(1, self.index[part]))
        return found

    def put(self, values: Tensor, chosen: Tensor, removed: Tensor) -> None:
        """Put the removed values in the place of the neurons of the chosen sets.

        Arguments:
            values: `[rows, neurons]`, changed in place.
            chosen: `[rows]`, the number of a set, from one on; zero: none.
            removed: `[neurons]`.
        """
        rows = chosen.nonzero()[:, 0]
        sets = chosen[rows] - 1
        if self.single:
            index = self.index[sets]
        else:
            count = self.count[sets]
            ends = count.cumsum(0)
            rows = torch.repeat_interleave(rows, count)
            within = torch.arange(len(rows), device=rows.device)
            shift = torch.repeat_interleave(self.begin[sets] - ends + count, count)
            index = self.index[within + shift]
        values[rows, index] = removed[index]


@dataclass(frozen=True, eq=False)
class Family:
    """Neuron sets, by the nodes of their variables."""

    size: int
    picked: dict[Node, Picked]

    def __len__(self) -> int:
        return self.size
