"""All pairs of channels on the two sides of one weighted sum, in one step.

The relevance that passes over a weight `w[c', c, δ]` of a convolution is the weight times what its
gradient would be, for the contributing values as the input and the shared message as the output's
gradient. Added up over the kernel it is the joint relevance of an output and an input channel:
512 x 512 of them cost one gradient by the weight, not 512 backward passes.

Activations, pooling, concatenation and the like may lie between the weighted sum and the layers:
neurons have one parent there, so that it is known which channel each of them belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.graph import Graph, Operation, Variable
from nrm.neurons import channel_axis
from nrm.operators import Identity, Routing
from nrm.passing import send
from nrm.program import Pass

_NONE = -1
"""The number of no channel."""


@dataclass(frozen=True)
class Bridge:
    """The one operation between two layers where neurons have several parents.

    Attributes:
        operand: the place among its operands over which all walks to the lower layer go.
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
    def axis(self) -> int | None:
        """Where its weight has channels, of parents and output, counted from the end."""
        operator, call = self.operation.operator, self.operation.call
        return -1 if operator.acts_on_last_axis(call) else operator.channel_axis(call, None)


def find_bridge(graph: Graph, upper: Variable, lower: Variable) -> Bridge | None:
    """The one operation with several parents between two layers, if there is just one."""
    found: Bridge | None = None
    variable = upper
    while variable is not lower:
        operation = variable.producer
        if operation is None:
            return None
        ways = [
            place
            for place, operand in enumerate(operation.operands)
            if operand is lower or lower in graph.upstream(operand)
        ]
        if len(ways) != 1:
            return None
        if not isinstance(operation.operator, Identity | Routing):
            if found is not None:
                return None
            found = Bridge(operation, ways[0])
        variable = operation.operands[ways[0]]
    return found


@dataclass(frozen=True)
class Contraction:
    """How channels of two layers meet at the one weighted sum between them.

    Attributes:
        rows, columns: for every channel of the bridge's output, and of its parents, the channel
            of the upper and of the lower layer it belongs to.
    """

    bridge: Bridge
    rows: Tensor
    columns: Tensor


def find_contraction(forward: Pass, upper: Variable, lower: Variable) -> Contraction | None:
    """How to find all pairs of channels of two layers at once, for this input.

    Returns:
        `None` where there is more than one weighted sum between the layers, or its weights are
        not those of channels.
    """
    bridge = find_bridge(forward.graph, upper, lower)
    if bridge is None or bridge.axis is None:
        return None
    if forward.output.dtype in (torch.float16, torch.bfloat16):
        return None  # channels cannot be numbered
    above, below = bridge.above, bridge.below
    if forward.batch > 1 and not above.batch_axis == below.batch_axis == 0:
        return None
    nothing = forward.output.new_zeros((1, *forward.shape(above)))
    propagation = forward.propagations[bridge.operation]
    if propagation.by_weight(nothing, bridge.operand, 1) is None:
        return None
    rows = _numbers_above(forward, upper, above, bridge.axis)
    columns = _numbers_below(forward, lower, below, bridge.axis)
    return None if rows is None or columns is None else Contraction(bridge, rows, columns)


def contracted_pairs(
    forward: Pass, message: Tensor, upper: Variable, lower: Variable, found: Contraction
) -> Tensor:
    """`R(channel of upper, channel of lower)` of all pairs, from the message at `upper`.

    Returns:
        `[batch, channels of upper, channels of lower]`.
    """
    bridge, above = found.bridge, found.bridge.above
    if above is not upper:
        arrived = send(forward, {upper: message}, {above: None})
        message = arrived.get(above, message.new_zeros((1, *forward.shape(above))))
    with torch.inference_mode(False), torch.no_grad():
        propagation = forward.propagations[bridge.operation]
        by_sample = propagation.by_weight(message.clone(), bridge.operand, forward.batch)
        assert by_sample is not None
        pairs = []
        for passed in by_sample:
            joined = passed.flatten(2).sum(2) if passed.dim() > 2 else passed
            joined = _by_channels(joined, len(found.columns))
            joined = _gather(joined, found.rows, _channels(forward, upper), 0)
            pairs.append(_gather(joined, found.columns, _channels(forward, lower), 1))
        return torch.stack(pairs)


def _by_channels(passed: Tensor, inputs: int) -> Tensor:
    """`[outputs, inputs of a group]` as `[outputs, inputs]`."""
    outputs, of_group = passed.shape
    groups = inputs // of_group
    if groups == 1:
        return passed
    blocks = passed.view(groups, outputs // groups, of_group)
    joined: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return joined


def _gather(pairs: Tensor, numbers: Tensor, size: int, axis: int) -> Tensor:
    """Pairs of the bridge's channels added up by the channels of the layer they belong to."""
    if numbers.tolist() == list(range(size)):
        return pairs
    shape = list(pairs.shape)
    shape[axis] = size + 1  # those of no channel last
    added = pairs.new_zeros(shape).index_add_(axis, numbers % (size + 1), pairs)
    return added.narrow(axis, 0, size)


def _numbers_above(forward: Pass, upper: Variable, above: Variable, axis: int) -> Tensor | None:
    """For every channel of the bridge's output, the channel of the upper layer it leads to."""
    numbers = _number_of_neurons(forward, upper)
    if _same_shape(upper, above):
        return _of_channels(numbers, numbers >= 0, axis)
    # How many neurons of the upper layer have it for a parent, and their channels: all alike?
    arrived = send(forward, {upper: _digits(numbers)}, {above: None}).get(above)
    if arrived is None:
        return None
    count = arrived[0]
    found = _from_digits(arrived, count)
    return None if found is None else _of_channels(found, count > 0, axis)


def _numbers_below(forward: Pass, lower: Variable, below: Variable, axis: int) -> Tensor | None:
    """For every channel of the bridge's parents, the channel of the lower layer behind it."""
    numbers = _number_of_neurons(forward, lower)
    if _same_shape(below, lower):
        return _of_channels(numbers, numbers >= 0, axis)
    masses = {lower: _digits(numbers)}
    on_the_way = forward.graph.upstream(below) | {below}
    for variable in forward.graph.variables[lower.index + 1 : below.index + 1]:
        operation = variable.producer
        if operation is None or variable not in on_the_way:
            continue
        given = [masses.get(operand) for operand in operation.operands]
        if any(mass is not None for mass in given):
            propagation = forward.propagations[operation]
            masses[variable] = propagation.push(given, forward.shape(variable))
    count = masses[below][0]
    if not bool(((count == 1) | (count == 0)).all()):
        return None
    # A neuron beside others of its channel that has no parent in the lower layer: padding.
    found = _from_digits(masses[below], count)
    return None if found is None else _of_channels(found, torch.ones_like(count) > 0, axis)


_BASE = 64


def _digits(numbers: Tensor) -> Tensor:
    """One, and each of two digits with its square: `[5, *shape]`, small enough to add exactly."""
    low, high = numbers % _BASE, numbers // _BASE
    return torch.stack([torch.ones_like(numbers), low, low.square(), high, high.square()])


def _from_digits(added: Tensor, count: Tensor) -> Tensor | None:
    """The numbers behind sums of digits, if those that were added are all alike."""
    if float(added.abs().max()) * max(1.0, float(count.max())) >= 1 / torch.finfo(added.dtype).eps:
        return None  # not exact
    numbers = torch.zeros_like(count)
    for place, (total, squares) in enumerate(((added[1], added[2]), (added[3], added[4]))):
        if not torch.equal(squares * count, total.square()):
            return None
        numbers += _BASE**place * total / count.clamp(min=1)
    return torch.where(count > 0, numbers, _NONE)


def _same_shape(upper: Variable, lower: Variable) -> bool:
    """Whether only functions of one neuron each lie between."""
    variable = upper
    while variable is not lower:
        operation = variable.producer
        if operation is None or not isinstance(operation.operator, Identity):
            return False
        if operation.operands[0].shape != variable.shape:
            return False
        variable = operation.operands[0]
    return True


def _number_of_neurons(forward: Pass, variable: Variable) -> Tensor:
    """The channel of every neuron, shaped like the variable."""
    shape = forward.shape(variable)
    axis = _axis(forward, variable)
    numbers = torch.arange(shape[axis], device=forward.output.device, dtype=forward.output.dtype)
    return numbers.view(-1, *[1] * (len(shape) - 1 - axis)).expand(shape).contiguous()


def _of_channels(numbers: Tensor, known: Tensor, axis: int) -> Tensor | None:
    """`[channels]`, the number of each channel's neurons, if all that is known is alike."""
    size = numbers.shape[axis]
    by_channel = numbers.movedim(axis, 0).reshape(size, -1)
    counts = known.movedim(axis, 0).reshape(size, -1)
    highest = torch.where(counts, by_channel, _NONE).amax(1, keepdim=True)
    if bool((counts & (by_channel != highest)).any()):
        return None
    return highest[:, 0].long()


def _channels(forward: Pass, variable: Variable) -> int:
    return forward.shape(variable)[_axis(forward, variable)]


def _axis(forward: Pass, variable: Variable) -> int:
    """Where the channels lie in a variable's tensor."""
    shape = list(forward.shape(variable))
    batch = variable.batch_axis
    if batch is not None:
        del shape[batch]
    axis = channel_axis(variable, torch.Size(shape))
    return axis + 1 if batch is not None and axis >= batch else axis
