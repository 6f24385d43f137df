"""Formulas over neuron sets as messages: what a condition costs, and how it is answered.

Sets that all have to be visited one after the other need one message, which is masked at each
(Theorem 1). Any other formula needs a message for each state that it can be in (`nrm.automaton`).
Backward messages tell how walks came to a neuron, forward messages how they go on from there, and
their product the relevance of the neuron jointly with the formula, as in hidden Markov models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nrm.automaton import FAILS, HOLDS, Automaton, State, is_settled
from nrm.diagnostics import warn_of_cancelling
from nrm.display import Shown, Table
from nrm.engine import Messages, one_by_one, send, travel
from nrm.errors import CANCELS, VARIATION, QueryError
from nrm.formulas import All, Formula, NeuronSet, apart, conjunction, events_of
from nrm.graph import Variable
from nrm.prepare import Pass
from nrm.rules import Normalized, Original
from nrm.sets import Mask, Stops, resolve, variables_of
from nrm.tensors import full_precision

Starts = Mapping[bool, Messages]
"""The messages at the output: normalised, by `True`, and unnormalised."""


def along(
    forward: Pass, messages: Messages, stops: Iterable[Stops], normalized: Normalized = True
) -> Messages:
    """Send messages to one set after the other: what arrives there of the walks that visit all.

    Arguments:
        stops: the sets, in the order in which walks meet them.
    """
    for where in stops:
        messages = send(forward, messages, where, normalized)
    return messages


def look_for_cancelling(forward: Pass, start: Messages, found: Messages) -> None:
    """Warn where relevances that were found at variables cancel; one pass over each."""
    if CANCELS in forward.cautions.said:
        return
    for variable, message in found.items():
        # Of all samples together: it may be that none of them has so much.
        if float(torch.linalg.vector_norm(message, 1)) > VARIATION:
            warn_of_cancelling(forward, start, variable, message)


class Query:
    """Formulas on a forward pass, and what they ask of the walks.

    Arguments:
        start: the messages at the output.
        formulas: all of them are answered together.
        normalized: `False`: products of unnormalised contributions (eq. 26). `Original`: of
            contributions over the rules' own denominators (eqs. 43-46), by which relevance is lost
            on the way; what is asked is then what arrives at the last set, or at a variable.
        open_to: factors that a walk collects at the neurons of some variables: zero at those
            that it may not visit.

    Raises:
        UnknownLayerError, NeuronSetError: a set does not exist, or is empty.
    """

    def __init__(
        self,
        forward: Pass,
        start: Messages,
        formulas: Sequence[Formula | bool],
        normalized: Normalized = True,
        open_to: Stops | None = None,
    ) -> None:
        self.forward, self.start, self.graph = forward, start, forward.graph
        self.formulas = formulas
        self.normalized, self.open_to = normalized, open_to or {}
        self.events = apart(events_of(formulas))
        self.sample: int | None = None
        self._automata: dict[bool, Automaton] = {}
        self._lie = {event: variables_of(event, self.graph) for event in self.events}

    @cached_property
    def masks(self) -> dict[NeuronSet, Stops]:
        """Of each event, as large as the layers: made when messages are to be sent."""
        return {event: resolve(event, self.forward) for event in self.events}

    # -- what is asked ---------------------------------------------------------------------------

    def totals(self) -> Tensor:
        """`[formulas, batch]`: the relevance of the walks on which each formula holds."""
        chain = self._chain()
        if chain is None and self._original:
            raise QueryError(
                "under the original LRP relevance is lost on the way, so that only what arrives "
                "at sets is known, of walks that visit one after the other: name sets alone, or "
                "ask for a heatmap."
            )
        if chain is not None:
            found = self._along(chain, self._ends())
            if not all(map(self._tells_samples, found)):
                return sum(part.totals() for part in self.samples())  # type: ignore[return-value]
            return self._sum(found).unsqueeze(0)
        total = self.forward.output.new_zeros((len(self.formulas), self.forward.batch))
        for state, relevance in self.outcomes(keeps_failed=False).items():
            for row, holds in zip(total, state, strict=True):
                if holds:
                    row += relevance
        return total

    def outcomes(self, keeps_failed: bool = True) -> dict[State, Tensor]:
        """`[batch]` for every combination of formulas that hold together."""
        self.require_walks()
        automaton = self._automaton(keeps_failed)
        settled: dict[Variable, dict[State, Tensor]] = {}
        self._run(automaton, settled=settled)
        found: dict[State, Tensor] = {}
        if not all(self._tells_samples(variable) for variable, m in settled.items() if m):
            for part in self.samples():
                for state, relevance in part.outcomes(keeps_failed).items():
                    found[state] = found[state] + relevance if state in found else relevance
            return found
        for variable, messages in settled.items():
            for state, message in messages.items():
                relevance = variable.per_sample(message, self.forward.batch, self.sample)[0]
                found[state] = found[state] + relevance if state in found else relevance
        return found

    def marginals(self, variables: Collection[Variable]) -> Messages:
        """`[1, *shape]` at variables: every neuron's relevance jointly with the one formula.

        Backward messages of all walks so far, times forward messages of how they go on.
        """
        chain = self.chain_above(*variables) if len(variables) == 1 else None
        if chain is not None:
            found = self._along(chain, dict.fromkeys(variables))
        else:
            self._require_nothing_above(variables)
            automaton = self._automaton()
            recorded: dict[Variable, dict[State, Tensor]] = {v: {} for v in variables}
            self._run(automaton, recorded=recorded)
            onward = self._forward_messages(automaton, recorded)
            found = {}
            for variable, messages in recorded.items():
                for state, message in messages.items():
                    factor = onward.after(variable, state)
                    if factor is not None:
                        before = found.get(variable)
                        part = message * factor
                        found[variable] = part if before is None else before + part
        # Of many layers at once only the leaves are looked at: it costs a pass over memory.
        self._warn({v: m for v, m in found.items() if v.is_leaf or len(variables) == 1})
        for variable in variables:
            if variable not in found:
                shape = self.forward.shape(variable)
                found[variable] = self.forward.output.new_zeros((1, *shape))
        return found

    def messages_at(self, variable: Variable) -> tuple[Automaton, dict[State, Tensor]]:
        """The messages `[1, *shape]` of walks that leave a variable in each state; and what may
        become of these."""
        self.require_walks()
        automaton = self._automaton()
        recorded: dict[Variable, dict[State, Tensor]] = {variable: {}}
        self._run(automaton, recorded=recorded)
        return automaton, recorded[variable]

    def chain_above(self, variable: Variable) -> list[NeuronSet] | None:
        """The sets in the order in which walks meet them before a variable, if that is all."""
        chain = self._chain()
        return chain if chain is not None and self._ends_at(variable) else None

    def conditionals(self, variables: Collection[Variable]) -> Messages:
        """`[1, *shape]` at variables: with what relevance the formula holds of walks from there.

        Raises:
            QueryError: a set lies downstream of a variable.
        """
        self.require_walks()
        automaton = self._automaton()
        coming = {}
        for variable in variables:
            for place in self.places:
                if variable in self.graph.upstream(place):
                    raise QueryError(
                        f"{place.name!r} lies between the output and {variable.name!r}: whether a "
                        "walk visits it is decided before it comes to these neurons. Divide "
                        "marginal(layer, set) by marginal(layer) instead."
                    )
            coming[variable] = automaton.arrive(automaton.root, variable)
        wanted = {
            variable: [then for then, _ in automaton.visit(state, variable)]
            for variable, state in coming.items()
            if state is not None
        }
        onward = self._forward_messages(automaton, wanted)
        found = {}
        for variable, state in coming.items():
            message = onward.before(variable, state)
            if message is None:
                message = self.forward.output.new_zeros((1, *self.forward.shape(variable)))
            found[variable] = message
        return found

    def undecided(self) -> list[Variable]:
        """The variables with no set between them and the output, and some further up."""
        places = self.places
        below = {v for place in places for v in self.graph.upstream(place)}
        leading = self.graph.leading_to(places)
        return [v for v in self.graph.variables if v in leading and v not in below]

    def plan(self) -> Plan:
        """How many messages `totals` sends, found without sending any."""
        self.require_walks()
        automaton = self._automaton(keeps_failed=False)
        coming: dict[Variable, set[State]] = {}
        if automaton.start is not None:
            coming[self.graph.output] = {automaton.start}
        messages: dict[str, int] = {}
        for variable in reversed(self.graph.variables):
            states = {
                then
                for state in coming.get(variable, ())
                for then, _ in automaton.visit(state, variable)
                if not is_settled(then) or not self._collects_at(variable)
            }
            operands = variable.producer.operands if variable.producer else ()
            for operand in operands:
                arriving = {automaton.arrive(state, operand) for state in states} - {None}
                coming.setdefault(operand, set()).update(s for s in arriving if s is not None)
            if operands and states:
                messages[variable.name] = len(states)
        return Plan(self.events, messages)

    # -- how it is answered ----------------------------------------------------------------------

    @property
    def _stops_early(self) -> bool:
        """Whether what a message sums to, wherever it is, is the relevance of its walks."""
        return self.normalized is True and not self.open_to

    @property
    def _original(self) -> bool:
        """Whether what arrives is asked for, wherever that is."""
        return isinstance(self.normalized, Original)

    def require_walks(self) -> None:
        """Refuse what only walks have that lose nothing on their way.

        Raises:
            QueryError: the original LRP was asked for.
        """
        if self._original:
            raise QueryError(
                "under the original LRP relevance is lost on the way: it has no formulas, plans, "
                "outcomes or forward messages. Ask without normalized=, or for what arrives at "
                "sets or at a layer."
            )

    def _require_nothing_above(self, variables: Collection[Variable]) -> None:
        """Under the original LRP: whether a walk counts is known where it arrives."""
        for variable in variables if self._original else ():
            above = self.graph.upstream(variable) & {*self.places, *self.open_to}
            if above:
                raise QueryError(
                    f"under the original LRP only what arrives at {variable.name!r} is known, and "
                    f"{min(v.name for v in above)!r} lies between it and the inputs."
                )

    def _collects_at(self, variable: Variable) -> bool:
        """Whether messages that are settled stop at a variable."""
        return variable.is_leaf or (self._stops_early and self._tells_samples(variable))

    def _tells_samples(self, variable: Variable) -> bool:
        return self.sample is not None or variable.tells_samples(self.forward.batch)

    def samples(self) -> Iterator[Query]:
        """This query of each sample alone, whose walks are then all that is met anywhere.

        For walks that end where samples lie in an unknown order: a pass for each of them.
        """
        for sample, start in enumerate(one_by_one(self.start, self.forward.batch)):
            query = copy(self)
            query.start, query.sample = start, sample
            yield query

    def _ends(self) -> Stops | None:
        # Columns do not sum to one, or some walks are cut off: follow all to their ends.
        arrives = self._stops_early or self._original
        return None if arrives else dict.fromkeys(self.graph.leaves)

    @property
    def places(self) -> set[Variable]:
        """Where the sets lie."""
        return {variable for lies in self._lie.values() for variable in lies}

    def _ends_at(self, variable: Variable) -> bool:
        """Whether all is known of a walk once it is at a variable."""
        below = self.graph.upstream(variable)
        decided = self._stops_early or self._original or variable.is_leaf
        return decided and not below & self.places

    def _chain(self) -> list[NeuronSet] | None:
        """The sets in the order in which walks meet them, if all are to be visited so."""
        if len(self.formulas) != 1 or self.open_to:
            return None
        (formula,) = self.formulas
        parts = conjunction(formula.parts) if isinstance(formula, All) else (formula,)
        if formula is not True and not all(part in self._lie for part in parts):
            return None
        return self.graph.in_order(self._lie)

    def _along(self, chain: Sequence[NeuronSet], ends: Stops | None) -> Messages:
        """What arrives of the walks that visit all sets of a chain, at its end or at `ends`."""
        stops = [self.masks[event] for event in chain]
        stops += [] if ends is None else [ends]
        return along(self.forward, self.start, stops, self.normalized)

    def _automaton(self, keeps_failed: bool = False) -> Automaton:
        if keeps_failed not in self._automata:
            automaton = Automaton(self.graph, self.formulas, self.masks, keeps_failed)
            self._automata[keeps_failed] = automaton
        return self._automata[keeps_failed]

    def _run(
        self,
        automaton: Automaton,
        settled: dict[Variable, dict[State, Tensor]] | None = None,
        recorded: dict[Variable, dict[State, Tensor]] | None = None,
    ) -> None:
        if automaton.start is None:
            return
        leading = None if recorded is None else self.graph.leading_to(recorded)
        itinerary = _States(automaton, settled, recorded, leading, self._collects_at)
        travelling = {v: {automaton.start: message} for v, message in self.start.items()}
        with torch.inference_mode(False), torch.no_grad():
            travel(self.forward, travelling, itinerary, self.normalized, self.open_to)

    def _forward_messages(
        self, automaton: Automaton, wanted: Mapping[Variable, Collection[State]]
    ) -> ForwardMessages:
        return ForwardMessages(self.forward, automaton, wanted, self.normalized, self.open_to)

    def _warn(self, found: Messages) -> None:
        if self.normalized is True:
            look_for_cancelling(self.forward, self.start, found)

    def _sum(self, messages: Messages) -> Tensor:
        self._warn(messages)
        total = self.forward.output.new_zeros(self.forward.batch)
        for variable, message in messages.items():
            total = total + variable.per_sample(message, self.forward.batch, self.sample)[0]
        return total


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """The messages that a query sends.

    Attributes:
        events: the neuron sets it speaks of.
        messages: how many messages pass the operation of each variable; those that are not
            listed are passed by none.
    """

    events: tuple[NeuronSet, ...]
    messages: dict[str, int]

    @property
    def channels(self) -> int:
        """The most messages at once: up to `2^k` for k sets, one for a chain of layers."""
        return max(self.messages.values(), default=0)

    def __str__(self) -> str:
        return (
            f"{len(self.events)} sets in {self.channels} channels (of {2 ** len(self.events)}), "
            f"{sum(self.messages.values())} messages through {len(self.messages)} operations"
        )

    def __repr__(self) -> str:
        return f"Plan({self})"

    def table(self) -> Table:
        rows = [(name, str(count)) for name, count in self.messages.items()]
        return Table(str(self), ("operation of", "messages"), rows)


class _States:
    """One message for each state of an automaton."""

    def __init__(
        self,
        automaton: Automaton,
        settled: dict[Variable, dict[State, Tensor]] | None,
        recorded: dict[Variable, dict[State, Tensor]] | None,
        leading: Set[Variable] | None,
        collects_at: Callable[[Variable], bool],
    ) -> None:
        self.automaton = automaton
        self.settled, self.recorded = settled, recorded
        self.leading, self.collects_at = leading, collects_at

    def visit(self, variable: Variable, messages: dict[State, Tensor]) -> dict[State, Tensor]:
        left: dict[State, Tensor] = {}
        for state, message in messages.items():
            for then, mask in self.automaton.visit(state, variable):
                part = message if mask is None else message * mask
                left[then] = left[then] + part if then in left else part
        if self.recorded is not None and variable in self.recorded:
            self.recorded[variable] = {state: message.clone() for state, message in left.items()}
        if self.settled is not None and self.collects_at(variable):
            done = {state: message for state, message in left.items() if is_settled(state)}
            self.settled[variable] = done
            left = {state: message for state, message in left.items() if state not in done}
        return left

    def arrive(self, state: State, variable: Variable) -> State | None:
        if self.leading is not None and variable not in self.leading:
            return None
        return self.automaton.arrive(state, variable)


# -- Forward messages ------------------------------------------------------------------------------


class ForwardMessages:
    """The relevance with which one formula comes to hold, at every neuron and in every state.

    `F(j) = sum_i R(i|j) F(i)` (the transpose of eq. 24), started at the neurons of a set, gives
    `R(set | j)` for every neuron j downstream in one pass. With a formula there is one `F` for
    each state that it can be in.

    Arguments:
        wanted: the states in which messages are needed, by variable, once it is visited.
        normalized: `False` multiplies unnormalised contributions (eq. 26) down to the leaves.
            `Original`: all walks that hold count one from there on.
        open_to: factors at the neurons of some variables, as for `nrm.engine.travel`.
    """

    def __init__(
        self,
        forward: Pass,
        automaton: Automaton,
        wanted: Mapping[Variable, Iterable[State]],
        normalized: Normalized = True,
        open_to: Mapping[Variable, Mask] | None = None,
    ) -> None:
        self.forward, self.automaton = forward, automaton
        self.normalized, self.open_to = normalized, open_to or {}
        self._known: dict[Variable, dict[State, Tensor]] = {}
        with torch.inference_mode(False), torch.no_grad():
            needed = self._needed(wanted)
            for variable in forward.graph.variables:  # parents first
                if variable in needed:
                    self._known[variable] = self._push(variable, needed[variable])

    def after(self, variable: Variable, state: State | None) -> Tensor | None:
        """`[1, *shape]`: of walks that have visited a neuron in a state; `None`: zero."""
        if state is None or state[0] == FAILS:
            return None
        if self._is_one(state):
            return self._ones(variable)
        return self._known[variable][state]

    def before(self, variable: Variable, state: State | None) -> Tensor | None:
        """`[1, *shape]`: of walks that come to a neuron in a state; `None`: zero."""
        if state is None:
            return None
        found: Tensor | None = None
        for then, mask in self.automaton.visit(state, variable):
            onward = self.after(variable, then)
            if onward is not None:
                part = onward if mask is None else onward * mask
                found = part if found is None else found + part
        way = self.open_to.get(variable)
        return found if found is None or way is None else found * way

    def _needed(self, wanted: Mapping[Variable, Iterable[State]]) -> dict[Variable, set[State]]:
        """The states in which messages have to be computed, from the output down."""
        needed = {v: {s for s in states if not self._is_known(s)} for v, states in wanted.items()}
        for variable in reversed(self.forward.graph.variables):
            producer = variable.producer
            for state in needed.get(variable, ()):
                for operand in producer.operands if producer else ():
                    coming = self.automaton.arrive(state, operand)
                    if coming is not None:
                        after = (then for then, _ in self.automaton.visit(coming, operand))
                        unknown = {then for then in after if not self._is_known(then)}
                        needed.setdefault(operand, set()).update(unknown)
        return {variable: states for variable, states in needed.items() if states}

    @full_precision()
    def _push(self, variable: Variable, states: Collection[State]) -> dict[State, Tensor]:
        if variable.producer is None:  # all is settled, and holds: what fails is known
            return {state: self._ones(variable) for state in states}
        chosen = list(states)
        masses: list[Tensor | None] = []
        for operand in variable.producer.operands:
            coming = [self.before(operand, self.automaton.arrive(s, operand)) for s in chosen]
            nothing = self._ones(operand) * 0
            rows = [nothing if row is None else row for row in coming]
            masses.append(None if all(row is None for row in coming) else torch.cat(rows))
        shape = self.forward.shape(variable)
        if all(mass is None for mass in masses):
            return {state: self.forward.output.new_zeros((1, *shape)) for state in chosen}
        propagation = self.forward.propagations[variable.producer]
        pushed = propagation.send_up(masses, shape, self.normalized)
        return {state: pushed[k : k + 1] for k, state in enumerate(chosen)}

    def _is_known(self, state: State) -> bool:
        return state[0] == FAILS or self._is_one(state)

    def _is_one(self, state: State) -> bool:
        """All walks on count, and their relevance sums to one."""
        if isinstance(self.normalized, Original):  # nothing is asked of what comes after
            return state[0] == HOLDS
        return state[0] == HOLDS and self.normalized and not self.open_to

    def _ones(self, variable: Variable) -> Tensor:
        return self.forward.output.new_ones(()).expand((1, *self.forward.shape(variable)))
