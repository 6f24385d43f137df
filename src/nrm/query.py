"""From formulas over neuron sets to message passing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nrm.automaton import Automaton, State, is_settled
from nrm.diagnostics import warn_of_cancelling
from nrm.errors import QueryError
from nrm.formulas import All, Formula, NeuronSet, apart, conjunction, events_of
from nrm.forward_messages import ForwardMessages
from nrm.graph import Variable
from nrm.passing import Messages, send, travel
from nrm.placing import Stops, in_order, per_sample, resolve, variables_of
from nrm.program import Pass


class Query:
    """Formulas on a forward pass, and what they ask of the walks.

    Arguments:
        start: the messages at the output.
        formulas: all of them are answered together.
        normalized: `False`: products of unnormalised contributions (eq. 26).
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
        normalized: bool = True,
        open_to: Stops | None = None,
    ) -> None:
        self.forward, self.start, self.graph = forward, start, forward.graph
        self.formulas = formulas
        self.normalized, self.open_to = normalized, open_to or {}
        self.events = apart(events_of(formulas))
        self._lie = {event: variables_of(event, self.graph) for event in self.events}

    @cached_property
    def masks(self) -> dict[NeuronSet, Stops]:
        """Of each event, as large as the layers: made when messages are to be sent."""
        return {event: resolve(event, self.forward) for event in self.events}

    # -- what is asked ---------------------------------------------------------------------------

    def totals(self) -> Tensor:
        """`[formulas, batch]`: the relevance of the walks on which each formula holds."""
        chain = self._chain()
        if chain is not None:
            return self._sum(self._along(self._stops(chain), self._ends())).unsqueeze(0)
        total = self.forward.output.new_zeros((len(self.formulas), self.forward.batch))
        for state, relevance in self.outcomes(keeps_failed=False).items():
            for row, holds in zip(total, state, strict=True):
                if holds:
                    row += relevance
        return total

    def outcomes(self, keeps_failed: bool = True) -> dict[State, Tensor]:
        """`[batch]` for every combination of formulas that hold together."""
        automaton = self._automaton(keeps_failed)
        settled: dict[Variable, dict[State, Tensor]] = {}
        self._run(automaton, settled=settled)
        found: dict[State, Tensor] = {}
        mixed: dict[State, tuple[Tensor, Variable]] = {}
        for variable, messages in settled.items():
            for state, message in messages.items():
                if not self._tells_samples(variable):
                    mixed[state] = message, variable
                    continue
                part = per_sample(message, variable, self.forward.batch)[0]
                found[state] = found[state] + part if state in found else part
        if not mixed:
            return found
        if not keeps_failed:
            return self.outcomes()
        if len(mixed) > 1 or not self._stops_early:
            per_sample(*next(iter(mixed.values())), self.forward.batch)  # says why not
        (state,) = mixed
        others = (relevance for other, relevance in found.items() if other != state)
        nothing = self.forward.output.new_zeros(self.forward.batch)
        return found | {state: 1 - sum(others, nothing)}

    def marginals(self, variables: Collection[Variable]) -> Messages:
        """`[1, *shape]` at variables: every neuron's relevance jointly with the one formula.

        Backward messages of all walks so far, times forward messages of how they go on.
        """
        chain = self.chain_above(*variables) if len(variables) == 1 else None
        if chain is not None:
            found = self._along(self._stops(chain), dict.fromkeys(variables))
        else:
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

    def chain_above(self, variable: Variable) -> list[NeuronSet] | None:
        """The sets in the order in which walks meet them before a variable, if that is all."""
        chain = self._chain()
        return chain if chain is not None and self._ends_at(variable) else None

    def conditionals(self, variables: Collection[Variable]) -> Messages:
        """`[1, *shape]` at variables: with what relevance the formula holds of walks from there.

        Raises:
            QueryError: a set lies downstream of a variable.
        """
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
        return self.normalized and not self.open_to

    def _collects_at(self, variable: Variable) -> bool:
        """Whether messages that are settled stop at a variable."""
        return variable.is_leaf or (self._stops_early and self._tells_samples(variable))

    def _tells_samples(self, variable: Variable) -> bool:
        return self.forward.batch == 1 or variable.batch_axis is not None

    def _ends(self) -> Stops | None:
        # Columns do not sum to one, or some walks are cut off: follow all to their ends.
        return None if self._stops_early else dict.fromkeys(self.graph.leaves)

    @property
    def places(self) -> set[Variable]:
        """Where the sets lie."""
        return {variable for lies in self._lie.values() for variable in lies}

    def _ends_at(self, variable: Variable) -> bool:
        """Whether all is known of a walk once it is at a variable."""
        below = self.graph.upstream(variable)
        return (self._stops_early or variable.is_leaf) and not below & self.places

    def _chain(self) -> list[NeuronSet] | None:
        """The sets in the order in which walks meet them, if all are to be visited so."""
        if len(self.formulas) != 1 or self.open_to:
            return None
        (formula,) = self.formulas
        parts = conjunction(formula.parts) if isinstance(formula, All) else (formula,)
        if formula is not True and not all(part in self._lie for part in parts):
            return None
        return in_order(self.graph, self._lie)

    def _stops(self, chain: Sequence[NeuronSet]) -> list[Stops]:
        return [self.masks[event] for event in chain]

    def _along(self, chain: list[Stops], ends: Stops | None) -> Messages:
        """The messages of walks that visit all sets of a chain: one at a time will do."""
        messages = self.start
        for stops in chain:
            messages = send(self.forward, messages, stops, self.normalized)
        return messages if ends is None else send(self.forward, messages, ends, self.normalized)

    def _automaton(self, keeps_failed: bool = False) -> Automaton:
        return Automaton(self.graph, self.formulas, self.masks, keeps_failed)

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
        if self.normalized:
            warn_of_cancelling(self.forward, self.start, found)

    def _sum(self, messages: Messages) -> Tensor:
        self._warn(messages)
        total = self.forward.output.new_zeros(self.forward.batch)
        for variable, message in messages.items():
            total = total + per_sample(message, variable, self.forward.batch)[0]
        return total


@dataclass(frozen=True)
class Plan:
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
        most = 2 ** len(self.events)
        return (
            f"{len(self.events)} sets in {self.channels} channels (of {most}), "
            f"{sum(self.messages.values())} messages through {len(self.messages)} operations"
        )


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
