"""How the neurons of a layer are divided for joint relevances: channels, neurons, sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nrm.channels import keep_channels, require_samples_apart, split_by_channel, sum_by_channel
from nrm.errors import NeuronSetError
from nrm.formulas import NeuronSet
from nrm.graph import Variable
from nrm.neurons import channels, neurons
from nrm.placing import neuron_shape, resolve, variables_of
from nrm.program import Pass

Division = Literal["channel", "neuron"] | int
"""What a layer is divided into; a number is that of an axis, not counting the batch: the nodes of
a graph, the tokens of a text."""


class Partition(ABC):
    """Parts of one layer.

    Attributes:
        variable: the layer.
        size: how many parts there are.
        name: the layer's, as it was given.
    """

    def __init__(self, variable: Variable, size: int) -> None:
        self.variable, self.size = variable, size
        self.name = variable.name

    @abstractmethod
    def split(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        """The parts of a message `[1, *shape]` that are held by some: `[chosen, *shape]`."""

    def keep(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        """The part of a message `[1, *shape]` that some parts, which do not overlap, hold
        together."""
        return self.split(message, chosen).sum(0, keepdim=True)

    @abstractmethod
    def add_up(self, message: Tensor) -> Tensor:
        """`[K, *shape]` summed over the neurons of each part: `[K, batch, parts]`."""

    @abstractmethod
    def set_of(self, part: int) -> NeuronSet:
        """One part, to query on with."""

    def covered(self, message: Tensor) -> Tensor:
        """The part of a message that is at neurons of any part."""
        return message

    @property
    def held(self) -> int:
        """Bytes of what is kept of the parts."""
        return 0


class Channels(Partition):
    """A part for each channel, or for each place of another axis, not counting the batch."""

    def __init__(self, variable: Variable, forward: Pass, axis: int | None = None) -> None:
        self.axis = axis
        blank = forward.output.new_zeros(()).expand(1, *forward.shape(variable))
        super().__init__(variable, sum_by_channel(blank, variable, axis).shape[-1])

    def split(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        return split_by_channel(message, self.variable, chosen, self.axis)

    def keep(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        return keep_channels(message, self.variable, chosen, self.axis)

    def add_up(self, message: Tensor) -> Tensor:
        return sum_by_channel(message, self.variable, self.axis)

    def set_of(self, part: int) -> NeuronSet:
        return channels(self.variable.name, part, axis=self.axis)


class Neurons(Partition):
    """A part for each neuron, in the order in which they lie without the batch axis."""

    def __init__(self, variable: Variable, forward: Pass) -> None:
        self.shape = neuron_shape(variable, forward)
        super().__init__(variable, self.shape.numel())

    def split(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        flat = self.add_up(message)[0]
        picked = torch.zeros((len(chosen), *flat.shape), dtype=flat.dtype, device=flat.device)
        for part, neuron in zip(picked, chosen, strict=True):
            part[:, neuron] = flat[:, neuron]
        return self.lay_out(picked)

    def lay_out(self, flat: Tensor) -> Tensor:
        """`[K, batch, neurons]` as a message `[K, *shape]`."""
        axis = self.variable.batch_axis
        if axis is None:
            return flat.reshape(len(flat), *self.shape)
        return flat.reshape(*flat.shape[:2], *self.shape).movedim(1, axis + 1)

    def add_up(self, message: Tensor) -> Tensor:
        if self.variable.batch_axis is None:
            return message.flatten(1).unsqueeze(1)
        return message.movedim(self.variable.batch_axis + 1, 1).flatten(2)

    def set_of(self, part: int) -> NeuronSet:
        place = np.unravel_index(part, self.shape)
        return neurons(self.variable.name, tuple(int(index) for index in place))


class Sets(Partition):
    """A part for each of some neuron sets of one layer: clusters, patches. They may overlap.

    Arguments:
        memory: bytes that masks may take, which are as large as the layer; those that do not fit
            are made whenever they are needed.

    Raises:
        NeuronSetError: there are none, they lie in different layers, or one is empty.
    """

    def __init__(self, sets: Sequence[NeuronSet], forward: Pass, memory: int) -> None:
        if not sets:
            raise NeuronSetError("a layer is divided into at least one neuron set.")
        graph = forward.graph
        lies = dict.fromkeys(v for chosen in sets for v in variables_of(chosen, graph))
        if len(lies) > 1:
            names = ", ".join(sorted(repr(variable.name) for variable in lies))
            raise NeuronSetError(
                f"sets given as a list lie in one layer, not in {names}. Give each layer a list of "
                "its own."
            )
        (variable,) = lies
        require_samples_apart(variable, forward.batch)
        super().__init__(variable, len(sets))
        self.sets, self._forward, self._memory = list(sets), forward, memory
        self._kept: dict[int, Tensor] = {}
        for part in range(self.size):  # all exist, and none is empty
            self._mask(part)

    def _mask(self, part: int) -> Tensor:
        """1 at the neurons of a part, broadcasting to messages."""
        if part in self._kept:
            return self._kept[part]
        mask = resolve(self.sets[part], self._forward)[self.variable]
        mask = self._forward.output.new_ones(()) if mask is None else mask
        if mask.nbytes <= self._memory:
            self._memory -= mask.nbytes
            self._kept[part] = mask
        return mask

    def split(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        held = message.new_empty((len(chosen), *message.shape[1:]))
        for row, part in zip(held, chosen, strict=True):
            torch.mul(message[0], self._mask(part).squeeze(0), out=row)
        return held

    def add_up(self, message: Tensor) -> Tensor:
        axis = self.variable.batch_axis
        found = []
        for part in range(self.size):
            inside = message * self._mask(part)
            inside = inside.unsqueeze(1) if axis is None else inside.movedim(axis + 1, 1)
            found.append(inside.flatten(2).sum(2) if inside.dim() > 2 else inside)
        return torch.stack(found, -1)

    def set_of(self, part: int) -> NeuronSet:
        return self.sets[part]

    def covered(self, message: Tensor) -> Tensor:
        union = self._mask(0)
        for part in range(1, self.size):
            union = torch.maximum(union, self._mask(part))
        return message * union

    @property
    def held(self) -> int:
        return sum(mask.nbytes for mask in self._kept.values())


def partition(
    parts: str | Sequence[NeuronSet], by: Division, forward: Pass, memory: int = 2**28
) -> Partition:
    """The parts of a layer: neuron sets as they are; of a layer by name, its channels or neurons.

    Arguments:
        memory: bytes that what is kept of the parts may take.

    Raises:
        NeuronSetError, QueryError: they cannot be told.
    """
    axis = by if isinstance(by, int) and not isinstance(by, bool) else None
    if axis is None and by not in ("channel", "neuron"):
        raise NeuronSetError(
            f"layers are divided by 'channel', 'neuron' or the number of an axis, not {by!r}."
        )
    if not isinstance(parts, str):
        return Sets(parts, forward, memory)
    variable = forward.graph.variable(parts)
    require_samples_apart(variable, forward.batch)
    by_neuron = by == "neuron"
    found = Neurons(variable, forward) if by_neuron else Channels(variable, forward, axis)
    found.name = parts
    return found
