"""How the neurons of a layer are divided for joint relevances: channels, neurons, sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from nrm.channels import require_samples_apart, split_by_channel, sum_by_channel
from nrm.errors import NeuronSetError
from nrm.formulas import NeuronSet
from nrm.graph import Variable
from nrm.placing import neuron_shape, resolve
from nrm.program import Pass

Division = Literal["channel", "neuron"]
"""What a layer is divided into."""


class Partition(ABC):
    """Parts of one layer.

    Attributes:
        variable: the layer.
        size: how many parts there are.
    """

    def __init__(self, variable: Variable, size: int) -> None:
        self.variable, self.size = variable, size

    @abstractmethod
    def split(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        """The parts of a message `[1, *shape]` that are held by some: `[chosen, *shape]`."""

    @abstractmethod
    def add_up(self, message: Tensor) -> Tensor:
        """`[K, *shape]` summed over the neurons of each part: `[K, batch, parts]`."""


class Channels(Partition):
    """A part for each channel."""

    def __init__(self, variable: Variable, forward: Pass) -> None:
        blank = forward.output.new_zeros(()).expand(1, *forward.shape(variable))
        super().__init__(variable, sum_by_channel(blank, variable).shape[-1])

    def split(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        return split_by_channel(message, self.variable, chosen)

    def add_up(self, message: Tensor) -> Tensor:
        return sum_by_channel(message, self.variable)


class Neurons(Partition):
    """A part for each neuron, in the order in which they lie without the batch axis."""

    def __init__(self, variable: Variable, forward: Pass) -> None:
        super().__init__(variable, neuron_shape(variable, forward).numel())

    def split(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        flat = self.add_up(message)[0]
        picked = torch.zeros((len(chosen), *flat.shape), dtype=flat.dtype, device=flat.device)
        for part, neuron in zip(picked, chosen, strict=True):
            part[:, neuron] = flat[:, neuron]
        axis, shape = self.variable.batch_axis, list(message.shape[1:])
        if axis is None:
            return picked.view(-1, *shape)
        samples = shape.pop(axis)
        return picked.view(-1, samples, *shape).movedim(1, axis + 1)

    def add_up(self, message: Tensor) -> Tensor:
        if self.variable.batch_axis is None:
            return message.flatten(1).unsqueeze(1)
        return message.movedim(self.variable.batch_axis + 1, 1).flatten(2)


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
                f"the sets of one side of a pair lie in one layer, not in {names}."
            )
        (variable,) = variables
        require_samples_apart(variable, forward.batch)
        super().__init__(variable, len(sets))
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


def partition(parts: str | Sequence[NeuronSet], by: Division, forward: Pass) -> Partition:
    """The parts of a layer: neuron sets as they are; of a layer by name, its channels or neurons.

    Raises:
        NeuronSetError, QueryError: they cannot be told.
    """
    if by not in get_args(Division):
        raise NeuronSetError(f"layers are divided by 'channel' or 'neuron', not {by!r}.")
    if not isinstance(parts, str):
        return Sets(parts, forward)
    variable = forward.graph.variable(parts)
    require_samples_apart(variable, forward.batch)
    return Channels(variable, forward) if by == "channel" else Neurons(variable, forward)
