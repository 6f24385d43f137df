"""What answers a condition on a forward pass: worked out where it is first needed, and kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from nrm.between import course
from nrm.condition import Condition, Sets, alone
from nrm.diagnostics import warn_of_variation
from nrm.engine import Messages, finite
from nrm.errors import QueryError
from nrm.formulas import Formula
from nrm.graph import Variable
from nrm.joint import (
    Division,
    Method,
    Partition,
    Parts,
    all_combinations,
    from_the_output,
    partitions,
)
from nrm.prepare import Pass
from nrm.query import Plan, Query, Starts
from nrm.rules import Normalized, Original
from nrm.search import Flows, Search, find_flows
from nrm.sets import Stops, divide, laid_out, resolve, with_samples_in_front


class Answers:
    """A condition on a forward pass: worked out where it is first needed, and kept.

    Arguments:
        starts: the messages at the output.

    Raises:
        UnknownLayerError, NeuronSetError: a set does not exist, or is empty.
    """

    def __init__(self, forward: Pass, starts: Starts, condition: Condition) -> None:
        # Not the condition itself: what it answers is kept as long as somebody else keeps that.
        self.forward, self._starts = forward, starts
        normalized, start = condition.normalized, starts[condition.normalized is True]
        factors = _factors(condition, forward)
        self.query = Query(forward, start, [condition.formula], normalized, factors)
        self._given: Query | None = None
        if condition.given:
            self._given = Query(forward, start, [condition.known], normalized)

    @cached_property
    def known(self) -> Tensor | None:
        """`[batch]`: the relevance of what is given, of all walks; `None` if nothing is."""
        return None if self._given is None else finite(self._given.totals()[0])

    def divided(self, joint: Tensor, variable: Variable | None = None) -> Tensor:
        """Relevances divided by that of what is given (eq. 11).

        Arguments:
            joint: `[..., batch]`; or shaped like a variable.
        """
        if self.known is None:
            return joint
        known = self.known if variable is None else variable.by_sample(self.known)
        return divide(joint, known)

    def total(self) -> Tensor:
        """`[batch]`: the sum over the walks that count (eqs. 25, 27)."""
        return self.divided(finite(self.query.totals()[0]))

    def marginals(self, variables: Collection[Variable]) -> Messages:
        """Every neuron's relevance jointly with the condition, shaped like each variable."""
        found = self.query.marginals(variables)
        batch = self.forward.batch
        mixed = [v for v in found if self.known is not None and not v.tells_samples(batch)]
        divided = self._marginals_by_sample(mixed) if mixed else {}
        for v, message in found.items():
            if v not in divided:
                divided[v] = self.divided(finite(message[0]).contiguous(), v)
        return divided

    def _marginals_by_sample(self, variables: Collection[Variable]) -> Messages:
        """Those at variables that do not tell which sample their neurons are of."""
        assert self.known is not None
        found: Messages = {}
        for sample, query in enumerate(self.query.samples()):
            for v, message in query.marginals(variables).items():
                part = divide(finite(message[0]), self.known[sample])
                found[v] = found[v] + part if v in found else part
        return found

    def conditionals(self, variables: Collection[Variable]) -> Messages:
        """With what relevance the condition holds of walks from every neuron of variables on."""
        found = self.query.conditionals(variables)
        known = {} if self._given is None else self._given.conditionals(variables)
        messages = {}
        for variable, message in found.items():
            joint = message[0]
            if known:
                joint = divide(joint, known[variable][0])
            # Others see what was found.
            messages[variable] = finite(joint).clone(memory_format=torch.contiguous_format)
        return messages

    def outcomes(self, formulas: Sequence[Sets]) -> dict[tuple[bool, ...], Tensor]:
        """`[batch]` for each combination of formulas that hold, jointly with the condition."""
        query = self.query
        asked = [*map(alone, formulas), *query.formulas]
        found = Query(query.forward, query.start, asked, query.normalized, query.open_to).outcomes()
        return {
            tuple(bool(held) for held in state[:-1]): self.divided(finite(relevance))
            for state, relevance in found.items()
            if state[-1]
        }

    def expected(self, weights: Stops) -> Tensor:
        """`[batch]`: the sum of the weights on a walk, over all walks that count (eq. 33).

        Sums and walks change places: each neuron's weight times the relevance of the neuron.
        """
        self.query.require_walks()
        found = self.query.marginals(weights)
        total = self.query.forward.output.new_zeros(self.query.forward.batch)
        for variable, weight in weights.items():
            inside = found[variable] if weight is None else found[variable] * weight
            total = total + variable.per_sample(inside, self.query.forward.batch)[0]
        return self.divided(finite(total))

    # -- combinations of parts of layers, jointly with the condition -----------------------------

    def arriving(self, variable: Variable) -> Tensor:
        """`[1, *shape]`: the message at a variable of the walks that count.

        Raises:
            QueryError: a set lies further up than the variable.
        """
        for place in self.query.places & self.forward.graph.upstream(variable):
            raise QueryError(
                f"{place.name!r} lies between {variable.name!r} and the inputs. Here sets are "
                "given that lie above both layers, or beside them."
            )
        return finite(self.query.marginals([variable])[variable])

    def joint(self, layers: Sequence[Parts], by: Division, method: Method, memory: int) -> Tensor:
        """`[batch, parts of the first layer, parts of the second, ...]` (`Measure.joint`)."""
        divided = partitions(self.forward, layers, by, memory)
        order, sides = from_the_output(divided)
        message = self.arriving(sides[0].variable)
        left = max(1, memory - sum(side.held for side in sides))
        found = all_combinations(self.forward, message, sides, left, method)
        for table in found:  # of each sample
            self._warn(sides[-1], float(torch.linalg.vector_norm(table, 1)))
        found = self.divided(found.movedim(0, -1)).movedim(-1, 0)
        return finite(found.permute(0, *(order.index(place) + 1 for place in range(len(order)))))

    def top(self, layers: Sequence[Parts], by: Division, wanted: Search) -> Flows:
        """The combinations with the largest relevance, found by a search (`Measure.top`)."""
        wanted.check(self.forward.batch)
        known = 1.0 if self.known is None else float(self.known[wanted.sample])
        parts = partitions(self.forward, layers, by, wanted.memory)
        left = max(1, wanted.memory - sum(part.held for part in parts))
        search = replace(wanted.divided_by(known), memory=left)
        found = find_flows(self.forward, partial(course, self.query), parts, search)
        self._warn(parts[-1], sum(abs(flow.relevance) for flow in found))
        return found.divided_by(known)

    def _warn(self, lowest: Partition, variation: float) -> None:
        warn_of_variation(self.forward, self._starts[True], lowest.name, variation)


def weights_on(condition: Condition, forward: Pass) -> Stops:
    """The weights of a condition, so that they broadcast to messages.

    Raises:
        QueryError, NeuronSetError: they do not fit their layers.
    """
    found: Stops = {}
    for layer, values in condition.weights.items():
        variable = forward.graph.variable(layer)
        if variable in found:
            raise QueryError(f"{layer!r} is a layer that was named before: weigh it once.")
        neurons = variable.neuron_shape(forward.shape(variable))
        what, hint = f"the tensor of weights of {layer!r}", "Weigh fewer samples at a time."
        told = with_samples_in_front(values, variable, neurons, what, hint)
        found[variable] = laid_out(told.to(forward.output), variable, forward)
    return found


def _factors(condition: Condition, forward: Pass) -> Stops:
    """What walks collect at the neurons of some variables: zero at those they may not visit."""
    found = {} if condition.within is None else resolve(condition.within, forward)
    for variable, weight in weights_on(condition, forward).items():
        open_to = found.get(variable)
        found[variable] = weight if open_to is None or weight is None else weight * open_to
    return found


class Together:
    """Several conditions, answered in as few runs as may be: one for all walks that count alike."""

    def __init__(self, forward: Pass, starts: Starts, conditions: Sequence[Condition]) -> None:
        self._blank = forward.output.new_zeros((len(conditions), forward.batch))
        self._conditions = conditions
        self._runs: list[tuple[Query, list[Condition], list[Formula | bool]]] = []
        alike: dict[tuple[object, ...], list[Condition]] = {}
        for condition in conditions:
            alike.setdefault(condition.counting, []).append(condition)
        for group in alike.values():
            first, known = group[0], list(dict.fromkeys(c.known for c in group if c.given))
            formulas = [condition.formula for condition in group]
            start, factors = starts[first.normalized is True], _factors(first, forward)
            # What is given counts all walks; and what arrives at sets is known of each alone.
            if factors or isinstance(first.normalized, Original):
                run = Query(forward, start, formulas, first.normalized, factors)
                self._runs.append((run, group, []))
                group, formulas = [], []
            if formulas or known:
                run = Query(forward, start, [*formulas, *known], first.normalized)
                self._runs.append((run, group, known))

    def totals(self) -> Tensor:
        """`[conditions, batch]`."""
        joint: dict[int, Tensor] = {}
        given: dict[tuple[Normalized, Formula | bool], Tensor] = {}
        for query, group, known in self._runs:
            rows = finite(query.totals())
            joint |= {id(c): row for c, row in zip(group, rows, strict=False)}
            for formula, row in zip(known, rows[len(group) :], strict=True):
                given[query.normalized, formula] = row
        total = self._blank.clone()
        for place, one in enumerate(self._conditions):
            row = joint[id(one)]
            total[place] = divide(row, given[one.normalized, one.known]) if one.given else row
        return total

    def plan(self) -> Plan:
        """How many messages that sends, found without sending any."""
        plans = [query.plan() for query, _, _ in self._runs]
        events = dict.fromkeys(event for plan in plans for event in plan.events)
        names = dict.fromkeys(name for plan in plans for name in plan.messages)
        sums = {name: sum(plan.messages.get(name, 0) for plan in plans) for name in names}
        return Plan(tuple(events), sums)
