"""Which channel of a layer the neurons on the way to it belong to.

Every neuron of the layer has the number of its channel. Step by step the neurons that lead to it,
or that it leads to, take over the number, as long as all those of one neuron are alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nrm.graph import Variable
from nrm.joint.bridges import Step
from nrm.neurons import channel_axis
from nrm.program import Pass

_NONE = -1
"""The number of no channel."""


def numbers_below(
    forward: Pass, upper: Variable, steps: Iterable[Step], axis: int
) -> Tensor | None:
    """The channels of a layer that those of another lead to, some steps below.

    Arguments:
        axis: of the lower layer's channels, counted from the end.

    Returns:
        for each channel of the lower layer a channel of the upper, or -1 if it leads to none;
        `None` where one of them leads to several.
    """
    numbers: Tensor | None = _own_numbers(forward, upper)
    for step in steps:
        numbers = None if numbers is None else _down(forward, step, numbers)
    return None if numbers is None else _by_channel(numbers, axis)


def numbers_above(
    forward: Pass, lower: Variable, steps: Iterable[Step], axis: int
) -> Tensor | None:
    """The channels of a layer behind those of another, some steps above: as `numbers_below`.

    Arguments:
        steps: the lowest first.
    """
    numbers: Tensor | None = _own_numbers(forward, lower)
    for step in steps:
        numbers = None if numbers is None else _up(forward, step, numbers)
    return None if numbers is None else _by_channel(numbers, axis)


def count_channels(forward: Pass, variable: Variable) -> int:
    return forward.shape(variable)[_axis(forward, variable)]


def _down(forward: Pass, step: Step, numbers: Tensor) -> Tensor | None:
    """The numbers of a step's parents, given those of what it computes."""
    if step.moves:
        wanted = [place == step.operand for place in range(len(step.operation.operands))]
        pulled = forward.propagations[step.operation].send_on(_digits(numbers), wanted)
        digits = pulled[step.operand]
        assert digits is not None
        return _from_digits(digits)
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


def _up(forward: Pass, step: Step, numbers: Tensor) -> Tensor | None:
    """The numbers of what a step computes, given those of its parents on the way."""
    shape = forward.shape(step.above)
    if step.moves:
        given: list[Tensor | None] = [None] * len(step.operation.operands)
        given[step.operand] = _digits(numbers)
        return _from_digits(forward.propagations[step.operation].send_up(given, shape))
    mixed = step.mixed_axes(numbers.dim())
    assert mixed is not None
    common = _in_common(numbers, mixed)
    if common is None:
        return None
    return (common.squeeze(mixed) if common.dim() > len(shape) else common).expand(shape)


_BASE = 64


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
    axis = _axis(forward, variable)
    numbers = torch.arange(shape[axis], device=forward.output.device, dtype=forward.output.dtype)
    return numbers.view(-1, *[1] * (len(shape) - 1 - axis)).expand(shape)


def _axis(forward: Pass, variable: Variable) -> int:
    """Where the channels lie in a variable's tensor."""
    shape = list(forward.shape(variable))
    batch = variable.batch_axis
    if batch is not None:
        del shape[batch]
    axis = channel_axis(variable, torch.Size(shape))
    return axis + 1 if batch is not None and axis >= batch else axis
