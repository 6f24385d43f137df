"""The joint relevance of all pairs of parts of two layers, and of all combinations of several.

A layer is divided into parts (a `Partition`): its channels, its neurons, or neuron sets. All pairs
are found by one contraction where a single weighted sum mixes channels between the two layers
(`nrm.contraction`), else by a message from each part of one of them. Of more layers than two,
messages begin all combinations down to the last two, which are joined as pairs.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nrm.contraction import Contraction, contracted_pairs, find_contraction
from nrm.engine import in_chunks, message_size, push_between, send_between
from nrm.errors import NeuronSetError, QueryError
from nrm.formulas import Formula, NeuronSet, as_set
from nrm.graph import Variable
from nrm.prepare import Pass
from nrm.sets import channels, neurons, resolve, variables_of

Division = Literal["channel", "neuron"] | int
"""What a layer is divided into; a number is that of an axis, not counting the batch: the nodes of
a graph, the tokens of a text."""
Method = Literal["auto", "contraction", "backward", "forward"]
"""How the joint relevances of all pairs are found: by one contraction, by a message from each part
of the upper layer down, or by a forward message from each part of the lower layer up."""


# -- How a layer is divided.


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
    def largest(self, values: Tensor) -> Tensor:
        """The largest of `[K, *shape]` among the neurons of each part: `[K, batch, parts]`."""

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


class ByChannel(Partition):
    """A part for each channel, or for each place of another axis.

    Arguments:
        axis: that other axis, not counting the batch.

    Raises:
        QueryError: the layer has no such axis.
        NeuronSetError: it has no channels.
    """

    def __init__(self, variable: Variable, forward: Pass, axis: int | None = None) -> None:
        shape = variable.neuron_shape(forward.shape(variable))
        along = variable.axis_of(shape, axis)
        super().__init__(variable, shape[along])
        self.axis = axis
        self._along = along + 2  # in the canonical view

    def split(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        split = message.new_zeros((len(chosen), *message.shape[1:]))
        parts, (whole,) = self.variable.canonical(split), self.variable.canonical(message)
        along = self._along - 1
        for part, channel in zip(parts, chosen, strict=True):
            part.narrow(along, channel, 1).copy_(whole.narrow(along, channel, 1))
        return split

    def keep(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        kept = message.new_zeros(self.size)
        kept[list(chosen)] = 1
        axes = self.variable.canonical(message).dim()
        laid = kept.view([-1 if axis == self._along else 1 for axis in range(axes)])
        batch = self.variable.canonical(message).shape[1]
        return message * self.variable.restored(laid, batch)

    def add_up(self, message: Tensor) -> Tensor:
        by_channel = self.variable.canonical(message).movedim(self._along, 2)
        return by_channel.reshape(*by_channel.shape[:3], -1).sum(-1)

    def largest(self, values: Tensor) -> Tensor:
        by_channel = self.variable.canonical(values).movedim(self._along, 2)
        return by_channel.reshape(*by_channel.shape[:3], -1).amax(-1)

    def set_of(self, part: int) -> NeuronSet:
        return channels(self.variable.name, part, axis=self.axis)


class ByNeuron(Partition):
    """A part for each neuron, in the order in which they lie without the batch axis."""

    def __init__(self, variable: Variable, forward: Pass) -> None:
        self.shape = variable.neuron_shape(forward.shape(variable))
        super().__init__(variable, self.shape.numel())

    def split(self, message: Tensor, chosen: Sequence[int]) -> Tensor:
        flat = self.add_up(message)[0]
        picked = torch.zeros((len(chosen), *flat.shape), dtype=flat.dtype, device=flat.device)
        for part, neuron in zip(picked, chosen, strict=True):
            part[:, neuron] = flat[:, neuron]
        return self.lay_out(picked)

    def lay_out(self, flat: Tensor) -> Tensor:
        """`[K, batch, neurons]` as a message `[K, *shape]`."""
        return self.variable.restored(flat.reshape(*flat.shape[:2], *self.shape), flat.shape[1])

    def add_up(self, message: Tensor) -> Tensor:
        view = self.variable.canonical(message)
        return view.reshape(*view.shape[:2], -1)

    def largest(self, values: Tensor) -> Tensor:
        return self.add_up(values)

    def set_of(self, part: int) -> NeuronSet:
        place = np.unravel_index(part, self.shape)
        return neurons(self.variable.name, tuple(int(index) for index in place))


class BySet(Partition):
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
        variable.require_samples_apart(forward.batch)
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
        batch = self._forward.batch
        return torch.stack(
            [
                self.variable.per_sample(message * self._mask(part), batch)
                for part in range(self.size)
            ],
            -1,
        )

    def largest(self, values: Tensor) -> Tensor:
        view = self.variable.canonical
        found = [
            view(values.masked_fill(self._mask(part) == 0, -torch.inf)).flatten(2).amax(-1)
            for part in range(self.size)
        ]
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
        return BySet(parts, forward, memory)
    variable = forward.graph.variable(parts)
    variable.require_samples_apart(forward.batch)
    by_neuron = by == "neuron"
    found = ByNeuron(variable, forward) if by_neuron else ByChannel(variable, forward, axis)
    found.name = parts
    return found


# -- All pairs.


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
    pairs = _pairs_from_below if way == "forward" else _pairs_from_above
    return pairs(forward, message, upper, lower, memory)


def best_method(forward: Pass, a: Parts, b: Parts, by: Division) -> Method:
    """How all pairs of the parts of two layers are found where it is left open."""
    _, (upper, lower) = from_the_output(partitions(forward, [a, b], by, 0))
    if contraction_between(forward, upper, lower) is not None:
        return "contraction"
    return _fewer(upper, lower)


def contraction_between(forward: Pass, upper: Partition, lower: Partition) -> Contraction | None:
    """How to find all pairs at once, if layers are divided by channels and it can be done."""
    if not _by_channels(upper) or not _by_channels(lower):
        return None
    return find_contraction(forward, upper.variable, lower.variable)


def _by_channels(part: Partition) -> bool:
    """Whether the parts are channels, or neurons that are channels each."""
    if isinstance(part, ByNeuron):
        return len(part.shape) == 1
    return isinstance(part, ByChannel) and part.axis is None


def _fewer(upper: Partition, lower: Partition) -> Method:
    """From which side messages are sent: where there are fewer parts."""
    return "forward" if lower.size < upper.size else "backward"


def _alive(layer: Partition, message: Tensor) -> list[int]:
    """The parts that hold any relevance."""
    found: list[int] = layer.add_up(message.abs())[0].sum(0).nonzero()[:, 0].tolist()
    return found


def _pairs_from_above(
    forward: Pass, message: Tensor, upper: Partition, lower: Partition, memory: int
) -> Tensor:
    """One message for each part of `upper` that holds any relevance."""
    above, below = upper.variable, lower.variable
    pairs = message.new_zeros((upper.add_up(message).shape[1], upper.size, lower.size))

    def pulled(chosen: Sequence[int]) -> None:
        arrived = send_between(forward, upper.split(message, chosen), above, below)
        pairs[:, chosen] = lower.add_up(arrived).transpose(0, 1)

    in_chunks(_alive(upper, message), memory, message_size(forward, above, below), pulled)
    return pairs


def _pairs_from_below(
    forward: Pass, message: Tensor, upper: Partition, lower: Partition, memory: int
) -> Tensor:
    """One forward message for each part of `lower`: `R(b | j)` of every neuron j of `upper`."""
    above, below = upper.variable, lower.variable
    ones = forward.output.new_ones((1, *forward.shape(below)))
    pairs = message.new_zeros((upper.add_up(message).shape[1], upper.size, lower.size))

    def pushed(chosen: Sequence[int]) -> None:
        onward = push_between(forward, lower.split(ones, chosen), below, above)
        pairs[:, :, chosen] = upper.add_up(message * onward).permute(1, 2, 0)

    in_chunks(range(lower.size), memory, message_size(forward, above, below), pushed)
    return pairs


# -- All combinations.


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
    above, below = first.variable, layers[1].variable
    if below not in forward.graph.upstream(above):  # no walk passes both
        return found

    def joined(chosen: Sequence[int]) -> None:
        arrived = send_between(forward, first.split(message, chosen), above, below)
        left = max(1, memory - arrived.nbytes)
        for row, part in enumerate(chosen):
            onward = arrived[row : row + 1]
            found[:, part] = all_combinations(forward, onward, layers[1:], left, method)

    # Half of the memory, so that there is some for what goes on from each.
    each = message_size(forward, above, below)
    in_chunks(_alive(first, message), max(1, memory // 2), each, joined)
    return found


# -- layers as a query names them ------------------------------------------------------------------

Parts = str | Iterable[NeuronSet]
"""A layer by name, or sets of its neurons."""


def partitions(
    forward: Pass, layers: Sequence[Parts], by: Division, memory: int
) -> list[Partition]:
    """The parts of layers; a quarter of the memory is for what is kept of them."""
    each = memory // (4 * max(1, len(layers)))
    return [partition(_parts(layer), by, forward, each) for layer in layers]


def from_the_output(layers: Sequence[Partition]) -> tuple[list[int], list[Partition]]:
    """Layers from the output down, and before that the place where each was given."""
    order = sorted(range(len(layers)), key=lambda place: -layers[place].variable.index)
    sides = [layers[place] for place in order]
    for upper, lower in itertools.pairwise(sides):
        if upper.variable is lower.variable:
            raise QueryError(f"{upper.name!r} twice: combinations are of different layers.")
    return order, sides


def _parts(parts: Parts) -> str | list[NeuronSet]:
    if isinstance(parts, Formula):
        return [as_set(parts)]
    if not isinstance(parts, Iterable):
        raise QueryError(f"a side of pairs is a layer or neuron sets of one, not {parts!r}.")
    return parts if isinstance(parts, str) else [as_set(chosen) for chosen in parts]
