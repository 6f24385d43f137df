"""What is still open about formulas while a walk goes from the output to the inputs.

A *state* is what is left of some formulas, once it is known which of their sets the walk has
visited and which it can visit no more. Message passing keeps one message for each state. States
are functions in a decision diagram, so that two that say the same of what may still happen are one
state, however the formulas are written: "an odd number of these sets" has two, "at least three"
four, and a chain of sets that all have to be visited one.

The diagram is written out here. `dd`, the kept package for them, knows choices of two values only
(sets of one layer that exclude each other are one choice of many values, without which "the walk
stays at one token" has exponentially many states), calls itself once for each choice, and would
bring two further packages to a library that needs torch and numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, reduce
from itertools import product
from threading import RLock

from nrm.errors import QueryError
from nrm.formulas import All, Compound, Formula, NeuronSet, Not, Odd, Some, parts_first
from nrm.graph import Graph, Variable
from nrm.masks import Mask

FAILS, HOLDS = 0, 1
"""The functions of the diagram that depend on no choice."""

State = tuple[int, ...]
"""What is left of each formula: a function of the diagram."""

_SIZES = 2**21, 2**25
"""Bytes that a diagram may take, roughly: at first, and if it is too small in any order. Some
seconds of work."""

_NODE = 300
"""Bytes that a node takes beside what it leads to."""


class TooLargeError(Exception):
    """A diagram is larger than it may be."""


class Diagram:
    """Functions of choices that are true or false, each of them once.

    A choice has a value from 0 on. A function is a number: that of a node, which looks at one
    choice and goes on to another node for each of its values. Nodes look at choices in one order
    for all, none looks in vain, and no two are alike, so that two functions are equal exactly if
    their numbers are (a reduced ordered decision diagram, Bryant 1986). Nothing here calls itself,
    since a diagram may be as deep as there are choices.

    Arguments:
        ways: how many values each choice has, in the order in which nodes look at them.
        size: bytes that it may take, roughly.
    """

    def __init__(self, ways: Sequence[int], size: int = _SIZES[-1]) -> None:
        self._ways, self._room = ways, size
        # Of each node: the choice, where it leads, and the choices looked at from there on, as the
        # bits of a number. A node's number is larger than those of the nodes it leads to.
        self._choice = [len(ways), len(ways)]
        self._next: list[tuple[int, ...]] = [(), ()]
        self._open = [0, 0]
        self._number: dict[tuple[int, tuple[int, ...]], int] = {}
        self._chosen: dict[tuple[int, int, int], int] = {}
        self._given: dict[tuple[int, int, int], int] = {}

    def __len__(self) -> int:
        """How many different functions have occurred so far, the two constant ones included."""
        return len(self._next)

    def open(self, function: int) -> int:
        """The choices that a function depends on, as bits."""
        return self._open[function]

    def chooses(self, choice: int, value: int) -> int:
        """The function that holds where a choice has a value."""
        return self._node(choice, tuple(int(way == value) for way in range(self._ways[choice])))

    def negation(self, function: int) -> int:
        """Where the function fails."""
        return self._if(function, FAILS, HOLDS)

    def every(self, functions: Iterable[int]) -> int:
        """Where all functions hold."""
        return reduce(lambda all_, one: self._if(one, all_, FAILS), self._up(functions), HOLDS)

    def some(self, functions: Iterable[int]) -> int:
        """Where at least one function holds."""
        return reduce(lambda any_, one: self._if(one, HOLDS, any_), self._up(functions), FAILS)

    def odd(self, functions: Iterable[int]) -> int:
        """Where an odd number of functions holds."""
        return reduce(
            lambda odd, one: self._if(one, self.negation(odd), odd), self._up(functions), FAILS
        )

    def given(self, function: int, choices: int, value: int) -> int:
        """What is left of a function where some choices, given as bits, have a value."""
        choices &= self._open[function]
        if not choices:
            return function
        key = (function, choices, value)
        if key not in self._given:
            left: dict[int, int] = {}
            for node in self._within(function, choices):
                onward = tuple(left.get(then, then) for then in self._next[node])
                settled = choices >> self._choice[node] & 1
                left[node] = onward[value] if settled else self._node(self._choice[node], onward)
            self._given[key] = left[function]
        return self._given[key]

    def _up(self, functions: Iterable[int]) -> list[int]:
        """Functions of late choices first: joining one to those before takes few steps then."""
        return sorted(functions, key=lambda function: -self._choice[function])

    def _node(self, choice: int, onward: tuple[int, ...]) -> int:
        if onward.count(onward[0]) == len(onward):
            return onward[0]
        key = (choice, onward)
        if key not in self._number:
            self._room -= _NODE + 8 * len(onward)
            self._number[key] = len(self._next)
            self._choice.append(choice)
            self._next.append(onward)
            self._open.append(reduce(int.__or__, (self._open[n] for n in onward), 1 << choice))
        return self._number[key]

    def _within(self, function: int, choices: int) -> list[int]:
        """The nodes of a function from which any of some choices is looked at, lowest first."""
        found = {function}
        waiting = [function]
        while waiting:
            for then in self._next[waiting.pop()]:
                if then not in found and self._open[then] & choices:
                    found.add(then)
                    waiting.append(then)
        return sorted(found)

    def _if(self, condition: int, then: int, otherwise: int) -> int:
        """The one function where a condition holds, and the other where it fails.

        Raises:
            TooLargeError: the diagram is larger than it may be.
        """
        asked = (condition, then, otherwise)
        waiting = [asked]
        while waiting:
            case = waiting[-1]
            if self._constant(case) is None and case not in self._chosen:
                choice = min(self._choice[function] for function in case)
                below = [self._where(case, choice, value) for value in range(self._ways[choice])]
                found = [self._known(one) for one in below]
                missing = [one for one, known in zip(below, found, strict=True) if known is None]
                if missing:
                    waiting += missing
                    continue
                if self._room < 0:
                    raise TooLargeError
                self._chosen[case] = self._node(choice, tuple(f for f in found if f is not None))
            waiting.pop()
        found_all = self._known(asked)
        assert found_all is not None
        return found_all

    def _where(self, case: tuple[int, int, int], choice: int, value: int) -> tuple[int, int, int]:
        one, two, three = (
            self._next[function][value] if self._choice[function] == choice else function
            for function in case
        )
        return one, two, three

    def _known(self, case: tuple[int, int, int]) -> int | None:
        constant = self._constant(case)
        return self._chosen.get(case) if constant is None else constant

    def _constant(self, case: tuple[int, int, int]) -> int | None:
        condition, then, otherwise = case
        if condition == HOLDS or then == otherwise:
            return then
        if condition == FAILS:
            return otherwise
        return condition if (then, otherwise) == (HOLDS, FAILS) else None


_JOINED: dict[type[Formula], Callable[[Diagram, Sequence[int]], int]] = {
    Not: lambda diagram, parts: diagram.negation(parts[0]),
    All: Diagram.every,
    Some: Diagram.some,
    Odd: Diagram.odd,
}


class Automaton:
    """The states of formulas over sets that lie on a graph.

    Several threads may ask one automaton.

    Arguments:
        masks: of each neuron set at the variables where it lies; those in formulas are unions of
            them.
        keeps_failed: follow also walks of which no formula holds.

    Raises:
        QueryError: there are too many states to tell apart.
    """

    def __init__(
        self,
        graph: Graph,
        formulas: Sequence[Formula | bool],
        masks: Mapping[NeuronSet, Mapping[Variable, Mask]],
        keeps_failed: bool = False,
    ) -> None:
        self.graph, self.keeps_failed = graph, keeps_failed
        self._arrived: dict[tuple[State, Variable], State | None] = {}
        self._branches: dict[tuple[State, Variable], list[tuple[State, Mask]]] = {}
        self._lock = RLock()
        # Where a walk settles one choice after the other, nodes are states; a formula that joins
        # many small ones may be small only in the order in which it is written.
        as_written = _choices(graph, masks)
        as_met = sorted(as_written, key=_as_walks_meet_them)
        for size, ordered in product(_SIZES, (as_met, as_written)):
            self._choices = ordered
            self.diagram = Diagram([1 + len(choice.sets) for choice in ordered], size)
            try:
                self.root = self._written(formulas)
            except TooLargeError:
                continue
            break
        else:
            raise QueryError(
                f"these formulas over {len(masks)} sets have too many states to tell apart: what "
                "is left of them depends on nearly every set that was visited before. Ask their "
                "parts, and add up those that exclude each other."
            )
        self._all = (1 << len(self._choices)) - 1
        self._here: dict[Variable, int] = {}
        for place, choice in enumerate(self._choices):
            for variable in choice.places:
                self._here[variable] = self._here.get(variable, 0) | 1 << place
        self._ahead: dict[Variable, int] = {}  # what a walk may still meet after a variable
        for variable in graph.variables:  # parents first
            operands = variable.producer.operands if variable.producer else ()
            self._ahead[variable] = reduce(int.__or__, map(self._coming, operands), 0)

    @cached_property
    def start(self) -> State | None:
        """The state at the output; `None`: no walk is of interest."""
        return self.arrive(self.root, self.graph.output)

    def arrive(self, state: State, variable: Variable) -> State | None:
        """The state of walks that come to a variable; `None`: they are of no interest."""
        key = (state, variable)
        if key not in self._arrived:
            with self._lock:
                missed = self._all & ~self._coming(variable)
                self._arrived[key] = self._of_interest(self._settled(state, missed, 0))
        return self._arrived[key]

    def visit(self, state: State, variable: Variable) -> list[tuple[State, Mask]]:
        """The states in which walks leave a variable, and the neurons that leave in each.

        Neurons after which walks are of no interest are in none.
        """
        key = (state, variable)
        if key not in self._branches:
            with self._lock:
                self._branches[key] = self._leave(state, variable)
        return self._branches[key]

    def _leave(self, state: State, variable: Variable) -> list[tuple[State, Mask]]:
        regions: dict[State, Mask] = {state: None}
        here = self._here.get(variable, 0)
        for place, choice in enumerate(self._choices) if here else ():
            if here >> place & 1:
                regions = self._split(regions, place, choice, variable)
        missed = self._all & ~self._ahead[variable]
        left: dict[State, Mask] = {}
        for then, region in regions.items():
            settled = self._of_interest(self._settled(then, missed, 0))
            if settled is not None:
                _join(left, settled, region)
        return list(left.items())

    def _split(
        self, regions: dict[State, Mask], place: int, choice: _Choice, variable: Variable
    ) -> dict[State, Mask]:
        """Divide the neurons of each state by which set of a choice they are in."""
        split: dict[State, Mask] = {}
        last = not self._ahead[variable] >> place & 1
        parts = [(value, masks[variable]) for value, masks in enumerate(choice.masks, 1)]
        if all(mask is not None for _, mask in parts):
            parts.append((0, choice.outside(variable)))
        for state, region in regions.items():
            if not any(self.diagram.open(left) >> place & 1 for left in state):
                _join(split, state, region)
                continue
            for value, mask in parts:
                then = self._settled(state, 1 << place, value) if value or last else state
                if self._of_interest(then) is None:
                    continue
                both = region if mask is None else mask if region is None else mask * region
                if both is None or bool(both.any()):  # sets of other choices may exclude it
                    _join(split, then, both)
        return split

    def _coming(self, variable: Variable) -> int:
        """The choices that a walk which comes to a variable may still meet, as bits."""
        return self._here.get(variable, 0) | self._ahead[variable]

    def _of_interest(self, state: State) -> State | None:
        return state if self.keeps_failed or any(left != FAILS for left in state) else None

    def _settled(self, state: State, choices: int, value: int) -> State:
        return tuple(self.diagram.given(left, choices, value) for left in state)

    def _written(self, formulas: Sequence[Formula | bool]) -> State:
        """The formulas as functions of the choices."""
        diagram = self.diagram
        visits = {
            chosen: diagram.chooses(place, value)
            for place, choice in enumerate(self._choices)
            for value, chosen in enumerate(choice.sets, 1)
        }
        known: dict[int, int] = {}
        for formula in formulas:
            for part in () if isinstance(formula, bool) else parts_first(formula):
                if id(part) in known:
                    continue
                if isinstance(part, NeuronSet):
                    pieces = (NeuronSet((member,)) for member in part.members)
                    whole = visits.get(part)
                    found = (
                        diagram.some(map(visits.__getitem__, pieces)) if whole is None else whole
                    )
                else:
                    assert isinstance(part, Compound)
                    found = _JOINED[type(part)](diagram, [known[id(p)] for p in part.parts])
                known[id(part)] = found
        return tuple(int(f) if isinstance(f, bool) else known[id(f)] for f in formulas)


class _Choice:
    """Which of some sets a walk visits, of those that exclude each other; or of one, whether.

    Arguments:
        masks: of each set at the variables where it lies, which are the same for all.
    """

    def __init__(self, chosen: NeuronSet, masks: Mapping[Variable, Mask]) -> None:
        self.sets, self.masks = [chosen], [masks]
        self._inside = dict(masks)

    @property
    def places(self) -> frozenset[Variable]:
        return frozenset(self._inside)

    def outside(self, variable: Variable) -> Mask:
        """The neurons of a variable that are in none of the sets, each of which leaves some."""
        inside = self._inside[variable]
        return None if inside is None else 1 - inside

    def excludes(self, masks: Mapping[Variable, Mask]) -> bool:
        """Whether a further set has no neuron in common with any of the sets."""
        pairs = ((inside, masks[variable]) for variable, inside in self._inside.items())
        return all(a is not None and b is not None and not bool((a * b).any()) for a, b in pairs)

    def add(self, chosen: NeuronSet, masks: Mapping[Variable, Mask]) -> None:
        """A further set, which excludes the others."""
        self.sets.append(chosen)
        self.masks.append(masks)
        for variable, mask in masks.items():
            inside = self._inside[variable]
            assert inside is not None
            assert mask is not None
            self._inside[variable] = inside + mask


def _choices(graph: Graph, masks: Mapping[NeuronSet, Mapping[Variable, Mask]]) -> list[_Choice]:
    """The choices that walks make, in the order in which their first sets are named.

    Sets of one layer that have no neurons in common exclude each other, since a walk has one neuron
    there. So do sets that lie at the same variables, if no walk meets two of these.
    """
    found: list[_Choice] = []
    latest: dict[frozenset[Variable], _Choice] = {}
    for chosen, lies in masks.items():
        places = frozenset(lies)
        choice = latest.get(places)
        if choice is not None and choice.excludes(lies):
            choice.add(chosen, lies)
            continue
        found.append(_Choice(chosen, lies))
        if not any(graph.upstream(variable) & places for variable in places):
            latest[places] = found[-1]
    return found


def _as_walks_meet_them(choice: _Choice) -> tuple[int, int]:
    indices = [variable.index for variable in choice.places]
    return -max(indices), -min(indices)


def is_settled(state: State) -> bool:
    """Whether it is known of every formula whether it holds."""
    return all(left in (FAILS, HOLDS) for left in state)


def _join(regions: dict[State, Mask], state: State, region: Mask) -> None:
    """Add disjoint neurons to those of a state."""
    if state in regions:
        before = regions[state]
        assert before is not None
        assert region is not None
        together = before + region
        region = None if bool((together == 1).all()) else together
    regions[state] = region
