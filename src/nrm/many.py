"""Many conditions at once: one pass for all conditions on the same layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nrm.chunks import in_chunks, message_size
from nrm.graph import Variable
from nrm.passing import Messages, send
from nrm.placing import Stops
from nrm.program import Pass

Chain = Sequence[Stops]
"""Neuron sets in the order in which walks meet them."""


def marginals_of_chains(
    forward: Pass,
    start: Messages,
    chains: Mapping[int, Chain],
    variable: Variable,
    found: Tensor,
    memory: int,
    advance: Callable[[int], None],
) -> None:
    """Every neuron's relevance jointly with each chain of sets above it.

    Chains over the same layers travel together, as many at a time as the memory allows; what lies
    above their first layer is passed once.

    Arguments:
        chains: by the row of `found` where the result goes.
        found: `[rows, *shape]`, zero.
        memory: bytes that the messages travelling at once may take.
        advance: called with the number of chains just done.
    """
    groups: dict[tuple[frozenset[Variable], ...], list[int]] = {}
    for row, chain in chains.items():
        groups.setdefault(tuple(frozenset(stops) for stops in chain), []).append(row)
    for layers, rows in groups.items():
        first, begin = start, forward.graph.output
        if layers and len(layers[0]) == 1:
            (begin,) = layers[0]
            first = send(forward, start, {begin: None})

        def travelled(
            chosen: Sequence[int], first: Messages = first, depths: int = len(layers)
        ) -> None:
            messages = first
            for depth in range(depths):
                messages = send(forward, messages, _stacked([chains[c][depth] for c in chosen]))
            arrived = send(forward, messages, {variable: None}).get(variable)
            if arrived is not None:
                found[chosen] = arrived.expand(len(chosen), *arrived.shape[1:])
            advance(len(chosen))

        in_chunks(rows, memory, message_size(forward, begin, variable), travelled)


def _stacked(sets: Sequence[Stops]) -> Stops:
    """The masks of sets over the same variables, one for each message."""
    stacked: Stops = {}
    for variable in sets[0]:
        masks = [stops[variable] for stops in sets]
        known = [mask for mask in masks if mask is not None]
        if not known:
            stacked[variable] = None
            continue
        shape = [max(sizes) for sizes in zip(*(mask.shape for mask in known), strict=True)]
        ones = known[0].new_ones(()).expand(shape)
        stacked[variable] = torch.cat(
            [ones if mask is None else mask.expand(shape) for mask in masks]
        )
    return stacked
