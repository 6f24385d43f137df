"""Steps of enumerated walks from component to component, for the oracle."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from support.oracle import Neuron

Walks = list[tuple[frozenset[Neuron], float]]


def steps(
    visited: Collection[Neuron],
    order: Mapping[str, int],
    owner: Mapping[Neuron, str],
    leaves: Mapping[str, str],
) -> list[tuple[str, str]]:
    """The steps (sender, receiver) of one walk, from the output down.

    Arguments:
        order: of variables, parents first.
        owner: the component of each neuron that is in one.
        leaves: the sender that each leaf is.
    """
    found, last = [], "output"
    for neuron in sorted(visited, key=lambda n: -order[n[0]]):
        here = owner.get(neuron, leaves.get(neuron[0]))
        if here is not None and here != last:
            found.append((here, last))
            last = here
    return found


def edges_of(
    walks: Walks,
    order: Mapping[str, int],
    owner: Mapping[Neuron, str],
    leaves: Mapping[str, str],
) -> dict[tuple[str, str], float]:
    """The relevance of every step, by sender and receiver."""
    found: dict[tuple[str, str], float] = {}
    for visited, relevance in walks:
        for step in steps(visited, order, owner, leaves):
            found[step] = found.get(step, 0.0) + relevance
    return found


def kept(
    walks: Walks,
    allowed: Collection[tuple[str, str]],
    order: Mapping[str, int],
    owner: Mapping[Neuron, str],
    leaves: Mapping[str, str],
) -> float:
    """The relevance of the walks all of whose steps are allowed."""
    return sum(
        relevance
        for visited, relevance in walks
        if all(step in allowed for step in steps(visited, order, owner, leaves))
    )
