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

State = tuple[Formula | bool, ...]
"""What is left of each formula."""

_COMPARED = 8  # events up to which states are compared by all that may still happen


class Automaton:
    """The states of formulas over sets that lie on a graph.

    Arguments:
        where: the variables of each neuron set, of which those in formulas are unions.
        keeps_failed: follow also walks of which no formula holds.
    """

    def __init__(
        self,
        graph: Graph,
        formulas: Sequence[Formula | bool],
        where: Mapping[NeuronSet, Collection[Variable]],
        keeps_failed: bool = False,
    ) -> None:
        self.graph, self.keeps_failed = graph, keeps_failed
        self._leading = {event: graph.leading_to(places) for event, places in where.items()}
        self.events_at: dict[Variable, list[NeuronSet]] = {}
        for event, places in where.items():
            for variable in places:
                self.events_at.setdefault(variable, []).append(event)
        self._known: dict[object, State] = {}
        self._same: dict[State, State] = {}
        self._settled: dict[tuple[State, Variable, bool], State] = {}
        self.root = self._normal(tuple(formulas))

    @cached_property
    def start(self) -> State | None:
        """The state at the output; `None`: no walk is of interest."""
        return self._of_interest(self._settle(self.root, self.graph.output, inclusive=True))

    def visit(self, state: State, event: NeuronSet) -> State:
        """The state of walks that visit an event."""
        return self._fix(state, event, True)

    def leave(self, state: State, variable: Variable) -> State | None:
        """The state of walks that have visited a variable; `None`: they are of no interest."""
        return self._of_interest(self._settle(state, variable, inclusive=False))

    def arrive(self, state: State, variable: Variable) -> State | None:
        """The state of walks that come to a variable; `None`: they are of no interest."""
        return self._of_interest(self._settle(state, variable, inclusive=True))

    def _of_interest(self, state: State) -> State | None:
        if self.keeps_failed or any(left is not False for left in state):
            return state
        return None

    def _settle(self, state: State, variable: Variable, inclusive: bool) -> State:
        """Without the events that lie neither further up nor (`inclusive`) at the variable."""
        key = (state, variable, inclusive)
        if key not in self._settled:
            operands = variable.producer.operands if variable.producer else ()
            ahead = (variable,) if inclusive else operands
            settled = state
            for event in self._events(state):
                if not any(v in self._leading[event] for v in ahead):
                    settled = self._fix(settled, event, False)
            self._settled[key] = settled
        return self._settled[key]

    def _fix(self, state: State, event: NeuronSet, visited: bool) -> State:
        return self._normal(_given(state, event, visited))

    def _events(self, state: State) -> list[NeuronSet]:
        """The events that a state still depends on, as it is written."""
        sets = events_of(state)
        return [event for event in self._leading if any(s.holds_all_of(event) for s in sets)]

    def _normal(self, state: State) -> State:
        """One state for all that say the same of what may still happen."""
        if state in self._same:
            return self._same[state]
        events = self._events(state)
        if len(events) > _COMPARED:
            return state
        outcomes: dict[tuple[bool, ...], State] = {}
        for happening in product((False, True), repeat=len(events)):
            outcomes[happening] = state
            for event, visited in zip(events, happening, strict=True):
                outcomes[happening] = _given(outcomes[happening], event, visited)
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


def _given(state: State, event: NeuronSet, visited: bool) -> State:
    return tuple(left if isinstance(left, bool) else left.given(event, visited) for left in state)


def _flipped(happening: tuple[bool, ...], place: int) -> tuple[bool, ...]:
    return (*happening[:place], not happening[place], *happening[place + 1 :])
