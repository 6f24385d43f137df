"""All pairs of channels on the two sides of one weighted sum, in one step.

The relevance that passes over a weight `w[c', c, δ]` of a convolution is the weight times what its
gradient would be, for the contributing values as the input and the shared message as the output's
gradient. Added up over the kernel it is the joint relevance of an output and an input channel:
512 x 512 of them cost one gradient by the weight, not 512 backward passes.

Activations, pooling, concatenation and the like may lie between the weighted sum and the layers:
it is known there which channel each neuron belongs to. Below the weighted sum, what part of each
neuron's relevance goes on to the lower layer is a factor at the contributing values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.graph import Variable
from nrm.joint.bridges import Bridge, find_bridge
from nrm.joint.channel_numbers import count_channels, numbers_above, numbers_below
from nrm.passing import send
from nrm.program import Pass


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
    if forward.batch > 1 and not crossing.above.batch_axis == crossing.below.batch_axis == 0:
        return None
    with torch.inference_mode(False), torch.no_grad():
        nothing = forward.output.new_zeros((1, *forward.shape(crossing.above)))
        propagation = forward.propagations[crossing.operation]
        if propagation.by_channels(nothing, crossing.operand, 1) is None:
            return None
        rows = numbers_below(forward, upper, bridge.above, bridge.axis)
        columns = numbers_above(forward, lower, bridge.below[::-1], bridge.axis)
    return None if rows is None or columns is None else Contraction(bridge, rows, columns)


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
        arrived = send(forward, {upper: message}, {above: None})
        message = arrived.get(above, message.new_zeros((1, *forward.shape(above))))
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
            if step.passes_all_on:
                continue
            onward = forward.output.new_ones((1, *forward.shape(step.below)))
        masses: list[Tensor | None] = [None] * len(step.operation.operands)
        masses[step.operand] = onward
        propagation = forward.propagations[step.operation]
        onward = propagation.send_up(masses, forward.shape(step.above))
    return onward


def _gather(pairs: Tensor, numbers: Tensor, size: int, axis: int) -> Tensor:
    """Pairs of the bridge's channels added up by the channels of the layer they belong to."""
    if numbers.tolist() == list(range(size)):
        return pairs
    shape = list(pairs.shape)
    shape[axis] = size + 1  # those of no channel last
    added = pairs.new_zeros(shape).index_add_(axis, numbers % (size + 1), pairs)
    return added.narrow(axis, 0, size)
