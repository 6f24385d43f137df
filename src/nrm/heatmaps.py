"""Heatmaps of many conditions, or of many targets, at once: their messages travel together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from nrm.answers import Answers
from nrm.condition import Condition
from nrm.engine import Messages, finite, in_chunks, message_size, send
from nrm.formulas import Formula, NeuronSet
from nrm.graph import Variable
from nrm.prepare import Pass
from nrm.query import Query, Starts, along, look_for_cancelling
from nrm.sets import Stops, resolve, variables_of

E = TypeVar("E")
Chain = tuple[NeuronSet, ...]
"""Neuron sets in the order in which walks meet them."""


def marginals_of_many(
    forward: Pass,
    starts: Starts,
    conditions: Sequence[Condition],
    variable: Variable,
    memory: int,
    advance: Callable[[int], None],
) -> Tensor:
    """Every neuron's relevance jointly with each condition: `[conditions, *shape]`.

    Chains of sets over the same layers travel together, as many at a time as the memory allows,
    their masks included; what lies above their first layer is passed once. Conditions that ask the
    same are answered once.

    Arguments:
        memory: bytes that the messages travelling at once may take.
        advance: called with the number of conditions just done.
    """
    found = forward.output.new_zeros((len(conditions), *forward.shape(variable)))
    chains: dict[Chain, list[int]] = {}
    others: dict[Condition, list[int]] = {}
    for place, condition in enumerate(conditions):
        chain = None
        if condition.counts_all:
            query = Query(forward, starts[True], [condition.formula])
            chain = query.chain_above(variable)
        if chain is None:
            others.setdefault(condition, []).append(place)
        else:
            chains.setdefault(tuple(chain), []).append(place)
    for condition, places in others.items():
        answers = Answers(forward, starts, condition)
        found[places] = answers.marginals([variable])[variable].unsqueeze(0).to(found)
        advance(len(places))
    groups: dict[tuple[frozenset[Variable], ...], list[Chain]] = {}
    for chain_ in chains:
        layers = tuple(frozenset(variables_of(chosen, forward.graph)) for chosen in chain_)
        groups.setdefault(layers, []).append(chain_)
    for layers, group in groups.items():
        _chains(forward, starts[True], layers, group, chains, variable, found, memory, advance)
    given: dict[Formula | bool, Answers] = {}
    for places in chains.values():
        for place in places:
            message = found[place]
            look_for_cancelling(forward, starts[True], {variable: message.unsqueeze(0)})
            condition = conditions[place]
            if condition.given:
                if condition.known not in given:
                    given[condition.known] = Answers(forward, starts, condition)
                found[place] = given[condition.known].divided(message, variable)
    return found


def marginals_of_targets(
    forward: Pass,
    explained: Sequence[E],
    starts: Callable[[E], Starts],
    condition: Condition,
    variable: Variable,
    memory: int,
    advance: Callable[[int], None],
) -> Tensor:
    """Every neuron's relevance jointly with a condition, for each of many explained outputs.

    Their messages travel together. Those at the output, which may be as long as a vocabulary for
    every token, are made when they set out.

    Arguments:
        explained: what each is.
        starts: the messages at the output, of one of them.

    Returns:
        `[explained, *shape]`.
    """
    found = forward.output.new_zeros((len(explained), *forward.shape(variable)))
    normalized, output = condition.normalized, forward.graph.output

    def travelled(chosen: Sequence[int]) -> None:
        each = (starts(explained[place]) for place in chosen)
        messages = torch.cat([start[normalized is True][output] for start in each])
        query = Query(forward, {output: messages}, [condition.formula], normalized)
        arrived = query.marginals([variable])[variable]
        found[list(chosen)] = finite(arrived).expand(len(chosen), *arrived.shape[1:]).to(found)
        advance(len(chosen))

    in_chunks(range(len(explained)), memory, message_size(forward, output, variable), travelled)
    return found


def _chains(
    forward: Pass,
    start: Messages,
    layers: tuple[frozenset[Variable], ...],
    group: Sequence[Chain],
    rows: Mapping[Chain, Sequence[int]],
    variable: Variable,
    found: Tensor,
    memory: int,
    advance: Callable[[int], None],
) -> None:
    """Chains over the same layers, with the rows of `found` where each one's result goes."""
    begin = forward.graph.output
    if layers and len(layers[0]) == 1:
        (begin,) = layers[0]
        start = send(forward, start, {begin: None})

    def travelled(chosen: Sequence[Chain]) -> None:
        same_depth = ([chain[depth] for chain in chosen] for depth in range(len(layers)))
        messages = along(forward, start, (_stacked(sets, forward) for sets in same_depth))
        arrived = send(forward, messages, {variable: None}).get(variable)
        if arrived is not None:
            each = finite(arrived).expand(len(chosen), *arrived.shape[1:]).to(found)
            for chain, marginal in zip(chosen, each, strict=True):
                found[rows[chain]] = marginal
        advance(sum(len(rows[chain]) for chain in chosen))

    sizes = (sum(forward.shape(v).numel() for v in lies) for lies in layers)
    masks = max(sizes, default=0) * forward.output.element_size()  # the most of one set
    in_chunks(group, memory, message_size(forward, begin, variable) + masks, travelled)


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
