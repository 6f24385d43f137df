"""How the neurons of a layer are divided for joint relevances: channels, neurons, sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nrm.contraction import Contraction, contracted_pairs, find_contraction
from nrm.engine import bring_up, in_chunks, message_size, send
from nrm.errors import NeuronSetError, QueryError
from nrm.formulas import NeuronSet
from nrm.graph import Variable
from nrm.masks import (
    keep_channels,
    neuron_shape,
    require_samples_apart,
    resolve,
    split_by_channel,
    sum_by_channel,
    variables_of,
)
from nrm.prepare import Pass
from nrm.sets import channels, neurons

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


# -- The joint relevance of all pairs of parts of two layers, and of all combinations of several.

Way = Literal["contraction", "backward", "forward"]
"""By one contraction, by a message from each part of the upper layer down, or by a forward message
from each part of the lower layer up."""
Method = Literal["auto", "contraction", "backward", "forward"]
"""How the joint relevances of all pairs are found."""


def all_pairs(
    forward: Pass,
    message: Tensor,
    upper: Partition,
    lower: Partition,
    memory: int,
    method: Method = "auto",
) -> Tensor:
    """`R(part of upper, part of lower)` of all pairs, from the message `[1, *shape]` at `upper`.

    By one contraction where a single weighted sum between two layers mixes channels and these are
    what layers are divided into, else by messages from the side with fewer parts.

    Returns:
        `[batch, parts of upper, parts of lower]`.

    Raises:
        QueryError: the method wanted does not do for these layers.
    """
    if method not in get_args(Method):
        raise QueryError(f"the method is one of {get_args(Method)}, not {method!r}")
    found = None
    if method in ("auto", "contraction"):
        found = contraction_between(forward, upper, lower)
    if found is not None:
        return contracted_pairs(forward, message, upper.variable, lower.variable, found)
    if method == "contraction":
        raise QueryError(
            f"between {upper.variable.name!r} and {lower.variable.name!r} there is not just one "
            "convolution or linear layer by which channels are joined. Use method='auto'."
        )
    if lower.variable not in forward.graph.upstream(upper.variable):  # no walk passes both
        batch = upper.add_up(message).shape[1]
        return message.new_zeros((batch, upper.size, lower.size))
    way = _fewer(upper, lower) if method == "auto" else method
    return (_forward if way == "forward" else _backward)(forward, message, upper, lower, memory)


def best_method(forward: Pass, upper: Partition, lower: Partition) -> Way:
    """How all pairs are found by default."""
    if contraction_between(forward, upper, lower) is not None:
        return "contraction"
    return _fewer(upper, lower)


def all_combinations(
    forward: Pass, message: Tensor, layers: Sequence[Partition], memory: int, method: Method
) -> Tensor:
    """`R(part, part, ...)` of all combinations of parts, one of each layer, from the output down.

    A message for each beginning of a combination down to the last two layers, which are joined as
    pairs.

    Arguments:
        message: `[1, *shape]` at the first layer.

    Returns:
        `[batch, parts of the first layer, parts of the second, ...]`.
    """
    first = layers[0]
    held = first.add_up(message)[0]
    if len(layers) == 1:
        return held
    if len(layers) == 2:
        return all_pairs(forward, message, first, layers[1], memory, method)
    found = message.new_zeros((len(held), *(layer.size for layer in layers)))
    alive = _alive(first, message)
    second = layers[1]

    def joined(chosen: Sequence[int]) -> None:
        arrived = send(
            forward, {first.variable: first.split(message, chosen)}, {second.variable: None}
        ).get(second.variable)
        if arrived is not None:
            left = max(1, memory - arrived.nbytes)
            for row, part in enumerate(chosen):
                below = arrived[row : row + 1]
                found[:, part] = all_combinations(forward, below, layers[1:], left, method)

    # Half of the memory, so that there is some for what goes on from each.
    each = message_size(forward, first.variable, second.variable)
    in_chunks(alive, max(1, memory // 2), each, joined)
    return found


def contraction_between(forward: Pass, upper: Partition, lower: Partition) -> Contraction | None:
    """How to find all pairs at once, if layers are divided by channels and it can be done."""
    if not _by_channels(upper, forward) or not _by_channels(lower, forward):
        return None
    return find_contraction(forward, upper.variable, lower.variable)


def _by_channels(part: Partition, forward: Pass) -> bool:
    """Whether the parts are channels, or neurons that are channels each."""
    if isinstance(part, Neurons):
        return len(neuron_shape(part.variable, forward)) == 1
    return isinstance(part, Channels) and part.axis is None


def _fewer(upper: Partition, lower: Partition) -> Literal["backward", "forward"]:
    """From which side messages are sent: where there are fewer parts."""
    return "forward" if lower.size < upper.size else "backward"


def _alive(layer: Partition, message: Tensor) -> list[int]:
    """The parts that hold any relevance."""
    found: list[int] = layer.add_up(message.abs())[0].sum(0).nonzero()[:, 0].tolist()
    return found


def _backward(
    forward: Pass, message: Tensor, upper: Partition, lower: Partition, memory: int
) -> Tensor:
    """One message for each part of `upper` that holds any relevance."""
    above, below = upper.variable, lower.variable
    pairs = message.new_zeros((upper.add_up(message).shape[1], upper.size, lower.size))

    def pulled(chosen: Sequence[int]) -> None:
        arrived = send(forward, {above: upper.split(message, chosen)}, {below: None})
        if below in arrived:
            pairs[:, chosen] = lower.add_up(arrived[below]).transpose(0, 1)

    in_chunks(_alive(upper, message), memory, message_size(forward, above, below), pulled)
    return pairs


def _forward(
    forward: Pass, message: Tensor, upper: Partition, lower: Partition, memory: int
) -> Tensor:
    """One forward message for each part of `lower`: `R(b | j)` of every neuron j of `upper`."""
    above, below = upper.variable, lower.variable
    ones = forward.output.new_ones((1, *forward.shape(below)))
    pairs = message.new_zeros((upper.add_up(message).shape[1], upper.size, lower.size))

    def pushed(chosen: Sequence[int]) -> None:
        onward = bring_up(forward, lower.split(ones, chosen), below, above)
        pairs[:, :, chosen] = upper.add_up(message * onward).permute(1, 2, 0)

    in_chunks(range(lower.size), memory, message_size(forward, above, below), pushed)
    return pairs
