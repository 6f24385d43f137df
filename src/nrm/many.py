"""Many conditions at once: one pass for all conditions on the same layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from nrm.chunks import in_chunks, message_size
from nrm.formulas import NeuronSet
from nrm.graph import Variable
from nrm.passing import Messages, finite, send
from nrm.placing import Stops, resolve, variables_of
from nrm.program import Pass

Chain = tuple[NeuronSet, ...]
"""Neuron sets in the order in which walks meet them."""


def marginals_of_chains(
    forward: Pass,
    start: Messages,
    chains: Mapping[Chain, Sequence[int]],
    variable: Variable,
    found: Tensor,
    memory: int,
    advance: Callable[[int], None],
) -> None:
    """Every neuron's relevance jointly with each chain of sets above it.

    Chains over the same layers travel together, as many at a time as the memory allows, their
    masks included; what lies above their first layer is passed once.

    Arguments:
        chains: with the rows of `found` where the result goes.
        found: `[rows, *shape]`, zero.
        memory: bytes that the messages travelling at once may take.
        advance: called with the number of rows just done.
    """
    groups: dict[tuple[frozenset[Variable], ...], list[Chain]] = {}
    for chain in chains:
        layers = tuple(frozenset(variables_of(chosen, forward.graph)) for chosen in chain)
        groups.setdefault(layers, []).append(chain)
    for layers, group in groups.items():
        first, begin = start, forward.graph.output
        if layers and len(layers[0]) == 1:
            (begin,) = layers[0]
            first = send(forward, start, {begin: None})

        def travelled(
            chosen: Sequence[Chain], first: Messages = first, depths: int = len(layers)
        ) -> None:
            messages = first
            for depth in range(depths):
                stops = _stacked([chain[depth] for chain in chosen], forward)
                messages = send(forward, messages, stops)
            arrived = send(forward, messages, {variable: None}).get(variable)
            if arrived is not None:
                each = finite(arrived).expand(len(chosen), *arrived.shape[1:])
                for chain, marginal in zip(chosen, each, strict=True):
                    found[chains[chain]] = marginal
            advance(sum(len(chains[chain]) for chain in chosen))

        size = message_size(forward, begin, variable) + _mask_size(layers, forward)
        in_chunks(group, memory, size, travelled)


def _mask_size(layers: Sequence[frozenset[Variable]], forward: Pass) -> int:
    """The most bytes that the masks of one set of a chain take."""
    sizes = (sum(forward.shape(variable).numel() for variable in lies) for lies in layers)
    return max(sizes, default=0) * forward.output.element_size()


def _stacked(sets: Sequence[NeuronSet], forward: Pass) -> Stops:
    """The masks of sets over the same variables, one for each message; one if all are the same."""
    rows: dict[NeuronSet, list[int]] = {}
    for row, chosen in enumerate(sets):
        rows.setdefault(chosen, []).append(row)
    if len(rows) == 1:
        return resolve(sets[0], forward)
    stacked: Stops = {}
    for chosen, places in rows.items():
        for variable, mask in resolve(chosen, forward).items():
            known = stacked.setdefault(variable, None)
            if mask is None:  # the whole variable: ones
                continue
            if known is None:
                known = mask.new_ones((len(sets), *mask.shape[1:]))
            elif mask.shape[1:] != known.shape[1:]:  # one of them differs by sample
                shape = map(max, mask.shape[1:], known.shape[1:])
                known = known.expand(len(sets), *shape).clone()
            known[places] = mask
            stacked[variable] = known
    return stacked
