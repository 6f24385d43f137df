"""What answers conditions on the forward pass of one measure: alone, together, and many at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from nrm.condition import Condition, Sets, alone
from nrm.diagnostics import warn_of_cancelling, warn_of_variation
from nrm.engine import Messages, finite, in_chunks, message_size, send
from nrm.errors import QueryError
from nrm.formulas import Formula, NeuronSet, as_set
from nrm.graph import Variable
from nrm.joint import Division, Method, Partition, all_combinations, partition
from nrm.masks import Stops, divide, laid_out, resolve, variables_of
from nrm.prepare import Pass
from nrm.query import Plan, Query, Starts, along
from nrm.search import Budget, Flows, Order, Way, find_flows

Parts = str | Iterable[NeuronSet]
"""A layer by name, or sets of its neurons."""


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
        normalized, start = condition.normalized, starts[condition.normalized]
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
        return {v: self.divided(finite(m[0]).contiguous(), v) for v, m in found.items()}

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

    def top(
        self,
        layers: Sequence[Parts],
        k: int,
        by: Division,
        order: Order,
        method: Way,
        sample: int,
        budget: Budget,
        memory: int,
        advance: Callable[[float], None],
    ) -> Flows:
        """The combinations with the largest relevance, found by a search (`Measure.top`)."""
        parts = partitions(self.forward, layers, by, memory)
        left = max(1, memory - sum(part.held for part in parts))
        known = None
        if self.known is not None and isinstance(sample, int) and 0 <= sample < len(self.known):
            known = float(self.known[sample])
        found = find_flows(
            self.forward,
            self.arriving,
            parts,
            k,
            _turned(order) if known is not None and known < 0 else order,
            sample,
            method,
            budget,
            left,
            advance,
        )
        self._warn(parts[-1], sum(abs(flow.relevance) for flow in found))
        if known is None:
            return found
        each = 0.0 if known == 0 else 1 / known
        flows = [replace(flow, relevance=flow.relevance * each) for flow in found]
        return replace(found, flows=flows, gap=found.gap * abs(each) if each else 0.0)

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
        found[variable] = laid_out(values.to(forward.output), variable, forward)
    return found


def _factors(condition: Condition, forward: Pass) -> Stops:
    """What walks collect at the neurons of some variables: zero at those they may not visit."""
    found = {} if condition.within is None else resolve(condition.within, forward)
    for variable, weight in weights_on(condition, forward).items():
        open_to = found.get(variable)
        found[variable] = weight if open_to is None or weight is None else weight * open_to
    return found


def partitions(
    forward: Pass, layers: Sequence[Parts], by: Division, memory: int
) -> list[Partition]:
    """The parts of layers; a quarter of the memory is for what is kept of them."""
    each = memory // (4 * max(1, len(layers)))
    return [partition(_parts(layer), by, forward, each) for layer in layers]


def from_the_output(layers: Sequence[Partition]) -> tuple[list[int], list[Partition]]:
    """Layers from the output down, and before that the place where each was given."""
    order = sorted(range(len(layers)), key=lambda place: -layers[place].variable.index)
    sides = [layers[place] for place in order]
    for upper, lower in itertools.pairwise(sides):
        if upper.variable is lower.variable:
            raise QueryError(f"{upper.name!r} twice: combinations are of different layers.")
    return order, sides


def _parts(parts: Parts) -> str | list[NeuronSet]:
    if isinstance(parts, Formula):
        return [as_set(parts)]
    if not isinstance(parts, Iterable):
        raise QueryError(f"a side of pairs is a layer or neuron sets of one, not {parts!r}.")
    return parts if isinstance(parts, str) else [as_set(chosen) for chosen in parts]


def _turned(order: Order) -> Order:
    """The order of joint relevances, if what they are divided by is negative."""
    if order == "absolute":
        return order
    return "smallest" if order == "largest" else "largest"


class Together:
    """Several conditions, answered in as few runs as may be: one for all walks that count alike."""

    def __init__(self, forward: Pass, starts: Starts, conditions: Sequence[Condition]) -> None:
        self._blank = forward.output.new_zeros((len(conditions), forward.batch))
        self._conditions = conditions
        self._runs: list[tuple[Query, list[Condition], list[Formula | bool]]] = []
        alike: dict[object, list[Condition]] = {}
        for condition in conditions:
            key = condition.normalized, condition.within, condition._weights
            alike.setdefault(key, []).append(condition)
        for group in alike.values():
            first, known = group[0], list(dict.fromkeys(c.known for c in group if c.given))
            formulas = [condition.formula for condition in group]
            start, factors = starts[first.normalized], _factors(first, forward)
            if factors:  # what is given counts all walks
                run = Query(forward, start, formulas, first.normalized, factors)
                self._runs.append((run, group, []))
                group, formulas = [], []
            if formulas or known:
                run = Query(forward, start, [*formulas, *known], first.normalized)
                self._runs.append((run, group, known))

    def totals(self) -> Tensor:
        """`[conditions, batch]`."""
        joint: dict[int, Tensor] = {}
        given: dict[tuple[bool, Formula | bool], Tensor] = {}
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


# -- Heatmaps of many conditions at once: one pass for all conditions on the same layers.

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
        found[places] = answers.marginals([variable])[variable].unsqueeze(0)
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
            warn_of_cancelling(forward, starts[True], {variable: message.unsqueeze(0)})
            condition = conditions[place]
            if condition.given:
                if condition.known not in given:
                    given[condition.known] = Answers(forward, starts, condition)
                found[place] = given[condition.known].divided(message, variable)
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
            each = finite(arrived).expand(len(chosen), *arrived.shape[1:])
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
