"""Many conditions at once: one pass for all conditions on the same layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nrm.graph import Variable
from nrm.passing import Messages, send
from nrm.placing import Stops
from nrm.program import Pass

Chain = Sequence[Stops]
"""Neuron sets in the order in which walks meet them."""


def marginals_of_chains(
    forward: Pass,
    start: Messages,
    chains: Sequence[Chain],
    variable: Variable,
    memory: int,
    advance: Callable[[int], None],
) -> Tensor:
    """`[chains, *shape]`: every neuron's relevance jointly with each chain of sets above it.

    Chains over the same layers travel together, as many at a time as the memory allows; what lies
    above their first layer is passed once.

    Arguments:
        memory: bytes that the messages travelling at once may take, roughly.
        advance: called with the number of chains just done.
    """
    found = forward.output.new_zeros((len(chains), *forward.shape(variable)))
    groups: dict[tuple[frozenset[Variable], ...], list[int]] = {}
    for place, chain in enumerate(chains):
        groups.setdefault(tuple(frozenset(stops) for stops in chain), []).append(place)
    largest = max(forward.shape(v).numel() for v in forward.graph.variables)
    chunk = max(1, memory // (4 * largest * found.element_size()))
    for layers, places in groups.items():
        first = start
        if layers:
            first = send(forward, start, dict.fromkeys(layers[0])) if len(layers[0]) == 1 else start
        for begin in range(0, len(places), chunk):
            chosen = places[begin : begin + chunk]
            messages = first
            for depth in range(len(layers)):
                messages = send(forward, messages, _stacked([chains[c][depth] for c in chosen]))
            arrived = send(forward, messages, {variable: None}).get(variable)
            if arrived is not None:
                found[chosen] = arrived.expand(len(chosen), *arrived.shape[1:])
            advance(len(chosen))
    return found


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
