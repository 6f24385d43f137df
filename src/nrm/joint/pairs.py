"""The joint relevance of all pairs of parts of two layers, and of all combinations of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from nrm.chunks import in_chunks, message_size
from nrm.errors import QueryError
from nrm.joint.contraction import Contraction, contracted_pairs, find_contraction
from nrm.joint.partitions import Channels, Neurons, Partition
from nrm.passing import bring_up, send
from nrm.placing import neuron_shape
from nrm.program import Pass

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
