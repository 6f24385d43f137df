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
from nrm.placing import neuron_shape, resolve
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

    Raises:
        NeuronSetError: there are none, or they lie in different layers.
    """

    def __init__(self, sets: Sequence[NeuronSet], forward: Pass) -> None:
        if not sets:
            raise NeuronSetError("a layer is divided into at least one neuron set.")
        masks = [resolve(chosen, forward) for chosen in sets]
        variables = {variable for stops in masks for variable in stops}
        if len(variables) > 1:
            names = ", ".join(sorted(repr(variable.name) for variable in variables))
            raise NeuronSetError(
                f"sets given as a list lie in one layer, not in {names}. Give each layer a list of "
                "its own."
            )
        (variable,) = variables
        require_samples_apart(variable, forward.batch)
        super().__init__(variable, len(sets))
        self.sets = list(sets)
        self.masks = []
        for stops in masks:
            mask = stops[variable]
            self.masks.append(forward.output.new_ones(()) if mask is None else mask)

    def split(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        return torch.cat([message * self.masks[part] for part in chosen])

    def add_up(self, message: Tensor) -> Tensor:
        axis = self.variable.batch_axis
        found = []
        for mask in self.masks:
            inside = message * mask
            inside = inside.unsqueeze(1) if axis is None else inside.movedim(axis + 1, 1)
            found.append(inside.flatten(2).sum(2) if inside.dim() > 2 else inside)
        return torch.stack(found, -1)

    def set_of(self, part: int) -> NeuronSet:
        return self.sets[part]

    def covered(self, message: Tensor) -> Tensor:
        union = self.masks[0]
        for mask in self.masks[1:]:
            union = torch.maximum(union, mask)
        return message * union


def partition(parts: str | Sequence[NeuronSet], by: Division, forward: Pass) -> Partition:
    """The parts of a layer: neuron sets as they are; of a layer by name, its channels or neurons.

    Raises:
        NeuronSetError, QueryError: they cannot be told.
    """
    axis = by if isinstance(by, int) and not isinstance(by, bool) else None
    if axis is None and by not in ("channel", "neuron"):
        raise NeuronSetError(
            f"layers are divided by 'channel', 'neuron' or the number of an axis, not {by!r}."
        )
    if not isinstance(parts, str):
        return Sets(parts, forward)
    variable = forward.graph.variable(parts)
    require_samples_apart(variable, forward.batch)
    by_neuron = by == "neuron"
    found = Neurons(variable, forward) if by_neuron else Channels(variable, forward, axis)
    found.name = parts
    return found
