"""What is still open about formulas while a walk goes from the output to the inputs.

A *state* is what is left of some formulas, once it is known which of their sets the walk has
visited and which it can visit no more. Message passing keeps one message for each state: `2^k` for
k sets that interleave, fewer where sets lie above each other, because a message whose formulas are
settled stops, and one whose formulas all fail is dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import product

from nrm.formulas import Formula, NeuronSet, events_of
from nrm.graph import Graph, Variable
from nrm.masks import Mask

State = tuple[Formula | bool, ...]
"""What is left of each formula."""

_COMPARED = 2**11  # outcomes up to which states are compared by all that may still happen


class Automaton:
    """The states of formulas over sets that lie on a graph.

    Arguments:
        masks: of each neuron set at the variables where it lies; those in formulas are unions of
            them.
        keeps_failed: follow also walks of which no formula holds.
    """

    def __init__(
        self,
        graph: Graph,
        formulas: Sequence[Formula | bool],
        masks: Mapping[NeuronSet, Mapping[Variable, Mask]],
        keeps_failed: bool = False,
    ) -> None:
        self.graph, self.masks, self.keeps_failed = graph, masks, keeps_failed
        self._leading = {event: graph.leading_to(places) for event, places in masks.items()}
        self._order = {event: place for place, event in enumerate(masks)}
        self._of_member = {member: event for event in masks for member in event.members}
        self._within: dict[NeuronSet, list[NeuronSet]] = {}
        self._known: dict[object, State] = {}
        self._same: dict[State, State] = {}
        self._arrived: dict[tuple[State, Variable], State | None] = {}
        self._branches: dict[tuple[State, Variable], list[tuple[State, Mask]]] = {}
        self.root = self._normal(tuple(formulas))

    @cached_property
    def start(self) -> State | None:
        """The state at the output; `None`: no walk is of interest."""
        return self.arrive(self.root, self.graph.output)

    def arrive(self, state: State, variable: Variable) -> State | None:
        """The state of walks that come to a variable; `None`: they are of no interest."""
        key = (state, variable)
        if key not in self._arrived:
            self._arrived[key] = self._of_interest(self._without_missed(state, (variable,)))
        return self._arrived[key]

    def visit(self, state: State, variable: Variable) -> list[tuple[State, Mask]]:
        """The states in which walks leave a variable, and the neurons that leave in each.

        Neurons after which walks are of no interest are in none.
        """
        key = (state, variable)
        if key not in self._branches:
            regions: dict[State, Mask] = {state: None}
            for event in self._events(state):
                if variable in self.masks[event]:
                    regions = _split(regions, event, self.masks[event][variable])
            ahead = variable.producer.operands if variable.producer else ()
            left: dict[State, Mask] = {}
            for then, region in regions.items():
                settled = self._of_interest(self._without_missed(then, ahead))
                if settled is not None:
                    _join(left, settled, region)
            self._branches[key] = list(left.items())
        return self._branches[key]

    def _of_interest(self, state: State) -> State | None:
        if self.keeps_failed or any(left is not False for left in state):
            return state
        return None

    def _without_missed(self, state: State, ahead: Collection[Variable]) -> State:
        """What is left where none of the events can be visited that do not lie ahead."""
        missed = [e for e in self._events(state) if self._leading[e].isdisjoint(ahead)]
        if missed:
            state = _settled(state, dict.fromkeys(missed, False))
        return self._normal(state)

    def _events(self, state: State) -> list[NeuronSet]:
        """The events that a state still depends on, as it is written."""
        found = {event for chosen in events_of(state) for event in self._parts(chosen)}
        return sorted(found, key=self._order.__getitem__)

    def _parts(self, chosen: NeuronSet) -> list[NeuronSet]:
        """The events that a set is made of; they have no members in common."""
        if chosen not in self._within:
            near = dict.fromkeys(self._of_member[m] for m in chosen.members if m in self._of_member)
            self._within[chosen] = [event for event in near if chosen.holds_all_of(event)]
        return self._within[chosen]

    def _normal(self, state: State) -> State:
        """One state for all that say the same of what may still happen."""
        if state in self._same:
            return self._same[state]
        events = self._events(state)
        if 2 ** len(events) * len(state) > _COMPARED:
            return state
        outcomes: dict[tuple[bool, ...], State] = {}
        for happening in product((False, True), repeat=len(events)):
            outcomes[happening] = _settled(state, dict(zip(events, happening, strict=True)))
        for place, event in enumerate(events):
            if all(outcomes[h] == outcomes[_flipped(h, place)] for h in outcomes):
                found = self._normal(_given(state, event, False))  # it makes no difference
                break
        else:
            table = (*events, *outcomes.values())
            found = self._known.setdefault(table, state)
        self._same[state] = found
        return found


def is_settled(state: State) -> bool:
    """Whether it is known of every formula whether it holds."""
    return all(isinstance(left, bool) for left in state)


def _split(regions: dict[State, Mask], event: NeuronSet, mask: Mask) -> dict[State, Mask]:
    """Divide the neurons of each state by whether they are in an event."""
    split: dict[State, Mask] = {}
    for state, region in regions.items():
        seen = _given(state, event, True)
        if seen == state or mask is None:
            _join(split, seen, region)
            continue
        for then, part in ((seen, mask), (state, 1 - mask)):
            both = part if region is None else part * region
            if bool(both.any()):  # sets of one layer often exclude each other
                _join(split, then, both)
    return split


def _join(regions: dict[State, Mask], state: State, region: Mask) -> None:
    """Add disjoint neurons to those of a state."""
    if state in regions:
        before = regions[state]
        assert before is not None
        assert region is not None
        together = before + region
        region = None if bool((together == 1).all()) else together
    regions[state] = region


def _given(state: State, event: NeuronSet, visited: bool) -> State:
    return _settled(state, {event: visited})


def _settled(state: State, known: Mapping[NeuronSet, bool]) -> State:
    return tuple(left if isinstance(left, bool) else left.settled(known) for left in state)


def _flipped(happening: tuple[bool, ...], place: int) -> tuple[bool, ...]:
    return (*happening[:place], not happening[place], *happening[place + 1 :])
