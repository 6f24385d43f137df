"""The joint relevance of all pairs of parts of two layers."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from nrm.contraction import Contraction, contracted_pairs, find_contraction
from nrm.errors import QueryError
from nrm.partitions import Channels, Neurons, Partition
from nrm.passing import send
from nrm.placing import neuron_shape
from nrm.program import Pass

Method = Literal["auto", "contraction", "messages"]
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

    By one contraction where there is a single weighted sum between two layers divided by
    channels, else by messages.

    Returns:
        `[batch, parts of upper, parts of lower]`.

    Raises:
        QueryError: the method wanted does not do for these layers.
    """
    if method not in get_args(Method):
        raise QueryError(f"the method is one of {get_args(Method)}, not {method!r}")
    found = None if method == "messages" else _contraction(forward, upper, lower)
    if found is not None:
        return contracted_pairs(forward, message, upper.variable, lower.variable, found)
    if method == "contraction":
        raise QueryError(
            f"between {upper.variable.name!r} and {lower.variable.name!r} there is not just one "
            "convolution or linear layer by which channels are joined. Use method='auto'."
        )
    return _by_messages(forward, message, upper, lower, memory)


def best_method(
    forward: Pass, upper: Partition, lower: Partition
) -> Literal["contraction", "messages"]:
    """How all pairs are found by default."""
    return "messages" if _contraction(forward, upper, lower) is None else "contraction"


def _contraction(forward: Pass, upper: Partition, lower: Partition) -> Contraction | None:
    if not _by_channels(upper, forward) or not _by_channels(lower, forward):
        return None
    return find_contraction(forward, upper.variable, lower.variable)


def _by_channels(part: Partition, forward: Pass) -> bool:
    """Whether the parts are channels, or neurons that are channels each."""
    if isinstance(part, Neurons):
        return len(neuron_shape(part.variable, forward)) == 1
    return isinstance(part, Channels)


def _by_messages(
    forward: Pass, message: Tensor, upper: Partition, lower: Partition, memory: int
) -> Tensor:
    """One message for each part of `upper` that holds any relevance, a chunk at a time."""
    held = upper.add_up(message.abs())[0]
    alive = torch.nonzero(held.sum(0))[:, 0].tolist()
    above, below = upper.variable, lower.variable
    if below not in forward.graph.upstream(above):
        alive = []  # side by side: no walk passes both
    pairs = message.new_zeros((len(held), upper.size, lower.size))
    largest = max(
        forward.shape(variable).numel()
        for variable in forward.graph.variables
        if min(below.index, above.index) <= variable.index <= above.index
    )
    chunk = max(1, memory // (4 * largest * message.element_size()))
    for begin in range(0, len(alive), chunk):
        chosen = alive[begin : begin + chunk]
        arrived = send(forward, {above: upper.split(message, chosen)}, {below: None})
        if below in arrived:
            pairs[:, chosen] = lower.add_up(arrived[below]).transpose(0, 1)
    return pairs
