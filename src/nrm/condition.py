"""A condition: what is asked of the walks, written once; and what answers it on a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from nrm.diagnostics import warn_of_variation
from nrm.display import Shown, Table, sizes
from nrm.engine import Messages, finite
from nrm.errors import NrmError, QueryError
from nrm.formulas import All, Formula, NeuronSet, as_formula, as_set, conjunction
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
from nrm.search import Budget, Flows, Order, Way, find_flows
from nrm.sets import Stops, divide, laid_out, resolve
from nrm.tensors import check_dense

Weights = Mapping[str, Tensor]
"""For some layers, a weight of each of their neurons, shaped like the layer without its batch
axis, or with it."""


@dataclass(frozen=True, init=False, repr=False)
class Condition(Shown):
    """Which walks are asked for, and what their relevance is divided by.

    Every query of a measure takes these arguments, or a condition in place of its sets: what is
    written once may be asked of many measures and in many ways. A measure keeps what it has worked
    out about a condition (where its sets lie, the masks of their neurons, the relevance of what is
    given) as long as the condition itself is kept.

    A walk visits a set if it visits any of its neurons; what flows past the set over a skip
    connection does not count. To keep what bypasses it, say `within` instead.

    Arguments:
        sets: neuron sets, or formulas over such (`~a & b`, eqs. 53-55), which hold together; the
            name of a layer stands for all of its neurons. A condition among them adds what it
            says itself.
        given: a set or formula, or several that hold jointly: results are divided by their
            relevance (eq. 11), and 0 where that is 0.
        within: count only walks that visit no other neurons of the variables of this set: they
            pass the set, or bypass these variables altogether. The relevance of `given`, by which
            results are divided, counts all walks.
        normalized: `False`: the unnormalised walk relevance, a product of contributions as they
            are (eq. 26), summed over the same walks. `"original"` or `rules.Original(stabilizer)`:
            LRP as it was first written (eqs. 43-46), with each rule's own denominator, by which
            relevance is lost on the way. A result is then what *arrives* at the last set, or at
            the layer asked for; formulas are answered in heatmaps alone.
        weights: of neurons, by layer: a walk counts with the product of the weights of the neurons
            that it visits (eq. 33), those of other layers with 1. What is given has none.

    Raises:
        NeuronSetError, QueryError: something is none of that.

    Example:
        >>> wheel = nrm.Condition(nrm.channels("features.28", 12), given="features.26")
        >>> R(wheel), R.heatmap(wheel), R.marginal("features.24", wheel)
    """

    sets: tuple[Formula, ...]
    given: tuple[Formula, ...]
    within: NeuronSet | None
    normalized: Normalized
    _weights: tuple[_Weight, ...]

    def __init__(
        self,
        *sets: Sets,
        given: Given = None,
        within: NeuronSet | str | None = None,
        normalized: Reading = True,
        weights: Weights | None = None,
    ) -> None:
        with naming(lambda: _text(sets, given, within, normalized)):
            reading = as_reading(normalized)
            held: list[Formula] = []
            known = only_formulas(given)
            laid = _checked(weights)
            inside = None if within is None else as_set(within)
            for one in sets:
                if not isinstance(one, Condition):
                    held.append(as_formula(one))
                    continue
                if one.within is not None:
                    if inside is not None and inside != one.within:
                        raise QueryError(
                            f"walks stay within {inside!r} or within {one.within!r}: say it once."
                        )
                    inside = one.within
                held += one.sets
                known += one.given
                laid += one._weights
                if one.normalized is not True:
                    if reading is not True and reading != one.normalized:
                        raise QueryError(
                            f"normalized={reading!r} and normalized={one.normalized!r}: say it "
                            "once."
                        )
                    reading = one.normalized
            if len({weight.layer for weight in laid}) < len(laid):
                raise QueryError("a layer is weighed by two conditions: weigh it once.")
        for name, value in (
            ("sets", tuple(held)),
            ("given", tuple(known)),
            ("within", inside),
            ("normalized", reading),
            ("_weights", tuple(laid)),
        ):
            object.__setattr__(self, name, value)

    @property
    def weights(self) -> dict[str, Tensor]:
        """By layer; none by default."""
        return {weight.layer: weight.values for weight in self._weights}

    @cached_property
    def formula(self) -> Formula | bool:
        """What holds of the walks that count: all sets and all that is given."""
        return _all_of((*self.sets, *self.given))

    @cached_property
    def known(self) -> Formula | bool:
        """What is given; `True` if nothing is."""
        return _all_of(self.given)

    @property
    def counts_all(self) -> bool:
        """Whether walks count with their normalised relevance, wherever they go."""
        return self.normalized is True and self.within is None and not self._weights

    def __repr__(self) -> str:
        return f"Condition({self.said()})"

    def __str__(self) -> str:
        return repr(self)

    def table(self) -> Table:
        rows = [("passes", _short(one)) for one in self.sets]
        rows += [("given", _short(one)) for one in self.given]
        if self.within is not None:
            rows.append(("within", _short(self.within)))
        if self.normalized is False:
            rows.append(("normalized", "no: products of unnormalised contributions"))
        elif self.normalized is not True:
            rows.append(("normalized", f"by the rules' own denominators, {self.normalized}"))
        for weight in self._weights:
            rows.append(("weighed", f"{weight.layer}: {sizes(weight.values.shape)} weights"))
        return Table("Condition", (), rows, [] if rows else ["All walks."])

    def said(self) -> str:
        """The arguments as text."""
        layers = [weight.layer for weight in self._weights]
        return _text(self.sets, self.given, self.within, self.normalized, layers)


Sets = Formula | str | Condition
"""A neuron set, a formula over such, the name of a layer for all of its neurons; or a condition."""

Given = Sets | Sequence[Sets] | None


@dataclass(frozen=True, eq=False)
class _Weight:
    """The weights of a layer's neurons. Equal to nothing but itself, and so are conditions."""

    layer: str
    values: Tensor


Reading = Normalized | Literal["original"]
"""How contributions are read, as it may be asked for."""


def as_reading(normalized: object) -> Normalized:
    """How contributions are read, as it was asked for.

    Raises:
        QueryError: it is none of the three readings.
    """
    if isinstance(normalized, bool | Original):
        return normalized
    if normalized == "original":
        return Original()
    raise QueryError(
        "normalized is True, False, 'original' or nrm.rules.Original(stabilizer), not "
        f"{normalized!r}."
    )


def as_condition(
    sets: Sequence[Sets],
    given: Given = None,
    within: NeuronSet | str | None = None,
    normalized: Reading = True,
) -> Condition:
    """What a query was asked: the very condition, where it was given one and nothing else."""
    if len(sets) == 1 and given is None and within is None and normalized is True:
        (only,) = sets
        if isinstance(only, Condition):
            return only
    return Condition(*sets, given=given, within=within, normalized=normalized)


def listed(sets: Sets | Sequence[Sets]) -> Sequence[Sets]:
    """One set, formula, layer or condition as a list of one."""
    return [sets] if isinstance(sets, (str, Formula, Condition)) else sets


@contextmanager
def naming(asked: Callable[[], str]) -> Iterator[None]:
    """Add what was asked to errors that this raises: their types and messages stay as they are."""
    try:
        yield
    except NrmError as error:
        text = asked()
        if text and not getattr(error, "__notes__", None):
            error.add_note(f"in R({text})")
        raise


_LONGEST_PART = 200


def _text(
    sets: Sequence[object],
    given: object,
    within: object,
    normalized: object = True,
    layers: Sequence[str] = (),
) -> str:
    """The arguments as they were given, long ones cut short."""
    parts = [_short(one) for one in sets]
    if isinstance(given, tuple) and len(given) == 1:
        (given,) = given
    if isinstance(given, (list, tuple)):
        parts += [f"given=[{', '.join(map(_short, given))}]"] if given else []
    elif given is not None:
        parts.append(f"given={_short(given)}")
    if within is not None:
        parts.append(f"within={_short(within)}")
    if normalized is not True:
        parts.append(f"normalized={normalized!r}")
    if layers:
        parts.append(f"weights of {', '.join(map(repr, layers))}")
    return ", ".join(parts)


def _short(one: object) -> str:
    text = repr(one)
    return text if len(text) <= _LONGEST_PART else text[: _LONGEST_PART - 1] + "…"


def only_formulas(given: Given) -> list[Formula]:
    """What is given, one by one."""
    if given is None:
        return []
    found: list[Formula] = []
    for one in given if isinstance(given, (list, tuple)) else (given,):
        if not isinstance(one, Condition):
            found.append(as_formula(one))  # type: ignore[arg-type] # refuses others by name
        elif one.given or not one.counts_all:
            raise QueryError(f"only sets and formulas can be taken here, not {one!r}.")
        else:
            found += one.sets
    return found


def alone(one: Sets) -> Formula | bool:
    """A formula, or what a condition says that says nothing but which sets hold."""
    return _all_of(only_formulas([one]))


def _all_of(formulas: Sequence[Formula]) -> Formula | bool:
    parts = conjunction(formulas)
    return All(parts) if parts else True


def _checked(weights: Weights | None) -> list[_Weight]:
    """Copies of weights, so that their owner may go on to change them."""
    found = []
    if weights is not None and not weights:
        raise QueryError("there are no weights: name at least one layer.")
    for layer, values in (weights or {}).items():
        if isinstance(values, Tensor):
            check_dense(values, f"the tensor of weights of {layer!r}", QueryError)
        if (
            not isinstance(values, Tensor)
            or values.is_complex()
            or not bool(torch.isfinite(values).all())
        ):
            raise QueryError(
                f"the weights of {layer!r} are to be a tensor of real, finite numbers."
            )
        found.append(_Weight(layer, values.detach().clone()))
    return found


# -- what answers it -------------------------------------------------------------------------------


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
        alike: dict[tuple[object, ...], list[Condition]] = {}
        for condition in conditions:
            key = condition.normalized, condition.within, condition._weights
            own = condition if isinstance(condition.normalized, Original) else None
            alike.setdefault((*key, own), []).append(condition)
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
