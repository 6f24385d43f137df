"""Families of neuron sets, laid out so that many sets are removed from many copies at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node


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
