"""All pairs of channels on the two sides of one weighted sum, in one step.

The relevance that passes over a weight `w[c', c, δ]` of a convolution is the weight times what its
gradient would be, for the contributing values as the input and the shared message as the output's
gradient. Added up over the kernel it is the joint relevance of an output and an input channel:
512 x 512 of them cost one gradient by the weight, not 512 backward passes.

Activations, pooling, concatenation and the like may lie between the weighted sum and the layers, if
it is known there which channel of a layer each neuron leads to or comes from. Below the weighted
sum, what part of each neuron's relevance goes on to the lower layer is a factor at the contributing
values.

So there are three steps: the one way between the layers, and the weighted sum on it (`Bridge`);
which channels its own channels belong to (`Contraction`); all pairs (`contracted_pairs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.engine import send_between
from nrm.graph import Graph, Operation, Variable
from nrm.prepare import Pass
from nrm.tensors import full_precision

# -- The one way between two layers, and the weighted sum on it by which channels are joined.


@dataclass(frozen=True)
class Passage:
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
        return self.operation.operator.moves

    def mixed_axes(self, dim: int) -> list[int] | None:
        """The axes of its `dim` along which parents may lie; `None` where it is not known."""
        return self.operation.operator.mixed_axes(self.operation.call, dim)

    @property
    def keeps_channels_apart(self) -> bool:
        """Whether it may be known which channel each of its neurons belongs to."""
        return self.moves or self.mixed_axes(len(self.below.shape)) is not None

    def push(self, forward: Pass, mass: Tensor) -> Tensor:
        """`F(j) = sum_i R(i|j) F(i)` over the parents on the way: `[K, *shape above]`."""
        masses: list[Tensor | None] = [None] * len(self.operation.operands)
        masses[self.operand] = mass
        return forward.propagations[self.operation].send_up(masses, forward.shape(self.above))

    def pull(self, forward: Pass, message: Tensor) -> Tensor:
        """`m(i) = sum_j R(i|j) m(j)` at the parents on the way: `[K, *shape below]`.

        Arguments:
            message: it may be overwritten.
        """
        wanted = [place == self.operand for place in range(len(self.operation.operands))]
        pulled = forward.propagations[self.operation].send_on(message, wanted)[self.operand]
        assert pulled is not None
        return pulled


@dataclass(frozen=True)
class Bridge:
    """The one operation between two layers that may join any channels.

    Attributes:
        crossing: that operation.
        above, below: the others on the way, which keep channels apart, the highest first.
    """

    crossing: Passage
    above: tuple[Passage, ...]
    below: tuple[Passage, ...]

    @property
    def axis(self) -> int | None:
        """Where its weight has channels, of parents and output, counted from the end."""
        operator, call = self.crossing.operation.operator, self.crossing.operation.call
        return -1 if operator.acts_on_last_axis(call) else operator.channel_axis(call, None)


def find_bridge(graph: Graph, upper: Variable, lower: Variable) -> Bridge | None:
    """The one operation that may join any channels of two layers, if there is just one.

    A convolution of single channels, if there is nothing else.
    """
    steps = _way(graph, upper, lower)
    crossings = [place for place, step in enumerate(steps) if not step.keeps_channels_apart]
    if not crossings:
        crossings = [p for p, step in enumerate(steps) if step.operation.operator.is_layer]
    if len(crossings) != 1:
        return None
    (place,) = crossings
    return Bridge(steps[place], tuple(steps[:place]), tuple(steps[place + 1 :]))


def _way(graph: Graph, upper: Variable, lower: Variable) -> list[Passage]:
    """The way from one layer down to another; none, where there are several or there is none."""
    steps: list[Passage] = []
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
        steps.append(Passage(operation, ways[0]))
        variable = operation.operands[ways[0]]
    return steps


# -- Which channel of a layer the neurons on the way to it belong to.
# Every neuron of the layer has the number of its channel. Step by step the neurons that lead to it,
# or that it leads to, take over the number, as long as all those of one neuron are alike.

_NONE = -1
"""The number of no channel."""


def _numbers(
    forward: Pass,
    layer: Variable,
    steps: Iterable[Passage],
    follow: Callable[[Pass, Passage, Tensor], Tensor | None],
    axis: int,
) -> Tensor | None:
    """The channels of a layer that those of another, some steps away, lead to or come from.

    Arguments:
        steps: from the layer on.
        follow: `_down` or `_up`, one step.
        axis: of the other layer's channels, counted from the end.

    Returns:
        for each channel of the other layer one of this one, or -1 if it leads to none; `None`
        where one of them leads to several.
    """
    numbers: Tensor | None = _own_numbers(forward, layer)
    for step in steps:
        numbers = None if numbers is None else follow(forward, step, numbers)
    return None if numbers is None else _by_channel(numbers, axis)


def _down(forward: Pass, step: Passage, numbers: Tensor) -> Tensor | None:
    """The numbers of a step's parents, given those of what it computes."""
    if step.moves:
        return _from_digits(step.pull(forward, _digits(numbers)))
    parents = forward.shape(step.below)
    mixed = step.mixed_axes(len(parents))
    assert mixed is not None
    if len(parents) > numbers.dim():  # those axes were dropped
        sizes = [1 if axis in mixed else size for axis, size in enumerate(parents)]
        numbers = numbers.reshape(sizes)
    added = numbers.dim() - len(parents)
    copied = [axis for axis, size in enumerate(parents) if size == 1 or axis in mixed]
    common = _in_common(numbers, [*range(added), *(added + axis for axis in copied)])
    return None if common is None else common.reshape(common.shape[added:]).expand(parents)


def _up(forward: Pass, step: Passage, numbers: Tensor) -> Tensor | None:
    """The numbers of what a step computes, given those of its parents on the way."""
    shape = forward.shape(step.above)
    if step.moves:
        return _from_digits(step.push(forward, _digits(numbers)))
    mixed = step.mixed_axes(numbers.dim())
    assert mixed is not None
    common = _in_common(numbers, mixed)
    if common is None:
        return None
    return (common.squeeze(mixed) if common.dim() > len(shape) else common).expand(shape)


_BASE = 64
"""Of the digits in which channels are counted while neurons are moved about."""


def _digits(numbers: Tensor) -> Tensor:
    """One, and each of two digits with its square: `[5, *shape]`, small enough to add exactly.

    Nothing of a neuron without a number.
    """
    numbered = (numbers != _NONE).to(numbers.dtype)
    numbers = numbers * numbered
    low, high = numbers % _BASE, numbers // _BASE
    return torch.stack([numbered, low, low.square(), high, high.square()])


def _from_digits(added: Tensor) -> Tensor | None:
    """The numbers behind sums of digits, if those that were added are all alike."""
    count = added[0]
    if not torch.equal(count, count.round()):
        return None  # winners that tie, of which each has a part
    if float(added.abs().max()) * max(1.0, float(count.max())) >= 1 / torch.finfo(added.dtype).eps:
        return None  # not exact
    numbers = torch.zeros_like(count)
    for place, (total, squares) in enumerate(((added[1], added[2]), (added[3], added[4]))):
        if not torch.equal(squares * count, total.square()):
            return None
        numbers += _BASE**place * total / torch.where(count > 0, count, 1)
    return torch.where(count > 0, numbers, _NONE)


def _in_common(numbers: Tensor, axes: list[int]) -> Tensor | None:
    """The number of all neurons along some axes, which become of size one, if all are alike.

    Those without a number count for nothing.
    """
    if not axes:
        return numbers
    highest = numbers.amax(axes, keepdim=True)
    if bool(((numbers != _NONE) & (numbers != highest)).any()):
        return None
    return highest


def _by_channel(numbers: Tensor, axis: int) -> Tensor | None:
    """`[channels]`: the number of each channel's neurons, if they are all alike."""
    along = axis % numbers.dim()
    common = _in_common(numbers, [other for other in range(numbers.dim()) if other != along])
    return None if common is None else common.flatten().long()


def _own_numbers(forward: Pass, variable: Variable) -> Tensor:
    """The channel of every neuron, shaped like the variable."""
    shape = forward.shape(variable)
    neurons = variable.neuron_shape(shape)
    along = variable.channel_axis_of(neurons)
    numbers = forward.output.new_tensor(range(neurons[along]))
    laid = numbers.view([-1 if axis == along else 1 for axis in range(len(neurons))])
    return variable.restored(laid[None, None], forward.batch)[0].expand(shape)


def count_channels(forward: Pass, variable: Variable) -> int:
    """How many channels a variable has."""
    neurons = variable.neuron_shape(forward.shape(variable))
    return neurons[variable.channel_axis_of(neurons)]


# -- All pairs.


@dataclass(frozen=True)
class Contraction:
    """How channels of two layers meet at the one weighted sum between them.

    Attributes:
        rows, columns: for every channel of the bridge's output, and of its parents, the channel
            of the upper and of the lower layer it belongs to, or -1.
    """

    bridge: Bridge
    rows: Tensor
    columns: Tensor


def find_contraction(forward: Pass, upper: Variable, lower: Variable) -> Contraction | None:
    """How to find all pairs of channels of two layers at once, for this input.

    Returns:
        `None` where there is more than one weighted sum between the layers that mixes channels,
        or its weights are not those of channels.
    """
    bridge = find_bridge(forward.graph, upper, lower)
    if bridge is None or bridge.axis is None:
        return None
    crossing = bridge.crossing
    ends = (crossing.above, crossing.below)
    if forward.batch > 1 and any(v.batch_axis != 0 or v.shared != (1, 1) for v in ends):
        return None
    with torch.inference_mode(False), torch.no_grad():
        nothing = forward.output.new_zeros((1, *forward.shape(crossing.above)))
        propagation = forward.propagations[crossing.operation]
        if propagation.by_channels(nothing, crossing.operand, 1) is None:
            return None
        rows = _numbers(forward, upper, bridge.above, _down, bridge.axis)
        columns = _numbers(forward, lower, bridge.below[::-1], _up, bridge.axis)
    return None if rows is None or columns is None else Contraction(bridge, rows, columns)


@full_precision()
def contracted_pairs(
    forward: Pass,
    message: Tensor,
    upper: Variable,
    lower: Variable,
    found: Contraction,
    onward: Tensor | None = None,
) -> Tensor:
    """`R(channel of upper, channel of lower)` of all pairs, from the message at `upper`.

    Arguments:
        onward: `[1, *shape of lower]`, factors at the neurons of `lower`.

    Returns:
        `[batch, channels of upper, channels of lower]`.
    """
    crossing = found.bridge.crossing
    above = crossing.above
    if above is not upper:
        message = send_between(forward, message, upper, above)
    with torch.inference_mode(False), torch.no_grad():
        reaching = _reaching(forward, found.bridge, onward)
        propagation = forward.propagations[crossing.operation]
        by_sample = propagation.by_channels(
            message.clone(),
            crossing.operand,
            forward.batch,
            None if reaching is None else reaching[0],
        )
        assert by_sample is not None
        rows, columns = (count_channels(forward, layer) for layer in (upper, lower))
        return torch.stack(
            [
                _gather(_gather(passed, found.rows, rows, 0), found.columns, columns, 1)
                for passed in by_sample
            ]
        )


def _reaching(forward: Pass, bridge: Bridge, onward: Tensor | None) -> Tensor | None:
    """The part of each parent's relevance at the bridge that reaches the lower layer, there times
    `onward`: `[1, *shape]`; `None`: all of it."""
    for step in bridge.below[::-1]:
        if onward is None:
            if step.operation.operator.one_parent:
                continue
            onward = forward.output.new_ones((1, *forward.shape(step.below)))
        onward = step.push(forward, onward)
    return onward


def _gather(pairs: Tensor, numbers: Tensor, size: int, axis: int) -> Tensor:
    """Pairs of the bridge's channels added up by the channels of the layer they belong to."""
    if numbers.tolist() == list(range(size)):
        return pairs
    shape = list(pairs.shape)
    shape[axis] = size + 1  # those of no channel last
    added = pairs.new_zeros(shape).index_add_(axis, numbers % (size + 1), pairs)
    return added.narrow(axis, 0, size)
