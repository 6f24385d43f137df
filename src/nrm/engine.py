"""Message passing (Theorem 1): the one engine behind every query.

A message holds `m(i)`, the relevance of the walks seen so far that end in neuron i, as a tensor
`[K, *shape of the variable]`: K messages travel at once. Messages start at the output, and each
operation shares out what its neurons have among their parents, `m(i) = sum_j R(i|j) m(j)` (eq. 24).

- `travel` sends messages of any number of kinds; an *itinerary* says what becomes of them at each
  variable. What it lets go is dropped, which is what a masked layer of the proper network does
  (appendix A).
- `send` has one kind: what has not met a stop. `send_between` goes from one variable to another.
- `push_between` goes the other way: forward messages, the transpose.
- `Absolute` is a pass on which all of them travel at absolute sizes, for bounds.
- `in_chunks` sends as many messages at a time as a memory budget holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from nrm.errors import QueryError
from nrm.graph import Operation, Variable
from nrm.operators import Propagation
from nrm.prepare import Pass
from nrm.rules import Normalized
from nrm.sets import Mask
from nrm.tensors import full_precision

Messages = dict[Variable, Tensor]

Observer = Callable[[Variable, Messages, Messages], None]
"""Called at each variable with the messages still travelling (its own included) and arrived."""

S = TypeVar("S", bound=Hashable)
T = TypeVar("T")
Travelling = dict[Variable, dict[S, Tensor]]
"""The messages on their way, by what is known of their walks."""


# -- Along itineraries.


class Itinerary(Protocol[S]):
    """Which messages there are, and where they go."""

    def visit(self, variable: Variable, messages: dict[S, Tensor]) -> dict[S, Tensor]:
        """What travels on from a variable, once all that comes to it is there."""

    def arrive(self, state: S, variable: Variable) -> S | None:
        """What is known of walks in a state when they come to a variable; `None`: drop them."""


@full_precision()
def travel(
    forward: Pass,
    travelling: Travelling[S],
    itinerary: Itinerary[S],
    normalized: Normalized = True,
    open_to: Mapping[Variable, Mask] | None = None,
    order: Sequence[Variable] | None = None,
) -> None:
    """Send messages towards the inputs (eqs. 24, 25).

    Arguments:
        forward: the forward pass to travel back through.
        travelling: where messages start, e.g. the output relevance at the output; each variable's
            are taken out as they are sent on.
        normalized: `False` multiplies unnormalised contributions (eq. 26).
        open_to: factors at the neurons of some variables: masks of those that walks may visit.
        order: in which to visit the variables, children before parents.
    """
    lent = {id(message) for messages in travelling.values() for message in messages.values()}
    for variable in order or forward.graph.variables[::-1]:
        if variable not in travelling:
            continue
        messages = {
            state: message.clone() if id(message) in lent else message  # it will be overwritten
            for state, message in travelling[variable].items()
        }
        way = None if open_to is None else open_to.get(variable)
        if way is not None:
            messages = {state: message * way for state, message in messages.items()}
        messages = itinerary.visit(variable, messages)
        del travelling[variable]
        if variable.producer is not None:
            _share_out(forward, variable.producer, messages, travelling, itinerary, normalized)


def _share_out(
    forward: Pass,
    operation: Operation,
    messages: dict[S, Tensor],
    travelling: Travelling[S],
    itinerary: Itinerary[S],
    normalized: Normalized,
) -> None:
    """Add to `travelling` what an operation's parents get of messages, which are used up.

    The messages of all states pass the operation in one call. Nothing is held on to longer than
    needed: what is not wanted is never computed, and a message is let go where it was shared out.
    """
    operands = operation.operands
    ways = {state: [itinerary.arrive(state, operand) for operand in operands] for state in messages}
    states = [state for state in messages if any(then is not None for then in ways[state])]
    if not states:
        return
    wanted = [any(ways[state][k] is not None for state in states) for k in range(len(operands))]
    rows = [len(messages[state]) for state in states]
    message = messages[states[0]]
    if len(states) > 1:
        message = torch.cat([messages[state] for state in states])
    messages.clear()
    propagation = forward.propagations[operation]
    pulled = propagation.send_on(message, wanted, normalized)
    if propagation.vanished:
        forward.cautions.vanished(operation.address, propagation.vanished)
    del message
    for k, (operand, parts) in enumerate(zip(operands, pulled, strict=True)):
        if parts is None or not wanted[k]:
            continue
        there = travelling.setdefault(operand, {})
        pieces = torch.split(parts, rows) if len(states) > 1 else (parts,)
        for state, piece in zip(states, pieces, strict=True):
            then = ways[state][k]
            if then is not None:
                before = there.get(then)
                there[then] = piece if before is None else before + piece


def one_by_one(start: Messages, batch: int) -> list[Messages]:
    """Messages at the output, of each sample alone: where they go is then that sample's."""
    return [{v: v.only_sample(m, sample) for v, m in start.items()} for sample in range(batch)]


# -- To stops.


def send(
    forward: Pass,
    messages: Messages,
    stops: Mapping[Variable, Mask],
    normalized: Normalized = True,
    open_to: Mapping[Variable, Mask] | None = None,
    observe: Observer | None = None,
    order: Sequence[Variable] | None = None,
) -> Messages:
    """Send messages until they first meet a stop.

    Arguments:
        messages: where they start.
        stops: the neurons at which messages arrive and stop. A walk arrives at the first it
            meets, also where one stop lies upstream of another.
        observe: called at every variable that a message reaches.
        others: as for `travel`.

    Returns:
        what arrived, by variable. Nothing arrives where no message came.
    """
    with torch.inference_mode(False), torch.no_grad():
        if forward.telescope is not None and normalized is True and not open_to and observe is None:
            arrived = forward.telescope.send(messages, stops)
            if arrived is not None:
                return arrived
        leading = forward.graph.leading_to(stops)
        travelling = {v: {(): m} for v, m in messages.items() if v in leading}
        itinerary = _ToStops(stops, leading, travelling, observe)
        travel(forward, travelling, itinerary, normalized, open_to, order)
        return itinerary.arrived


class _ToStops:
    """One message, of all walks that have not met a stop."""

    def __init__(
        self,
        stops: Mapping[Variable, Mask],
        leading: Set[Variable],
        travelling: Travelling[tuple[()]],
        observe: Observer | None,
    ) -> None:
        self.stops, self.leading, self.observe = stops, leading, observe
        self.travelling = travelling
        self.arrived: Messages = {}

    def visit(
        self, variable: Variable, messages: dict[tuple[()], Tensor]
    ) -> dict[tuple[()], Tensor]:
        message = messages[()]
        if self.observe is not None:
            on_the_way = {v: there[()] for v, there in self.travelling.items()}
            self.observe(variable, on_the_way, self.arrived)
        if variable not in self.stops:
            return messages
        mask = self.stops[variable]
        self.arrived[variable] = message if mask is None else message * mask
        return {} if mask is None else {(): message * (1 - mask)}

    def arrive(self, state: tuple[()], variable: Variable) -> tuple[()] | None:
        return state if variable in self.leading else None


# -- From one variable to another, and back up.


def send_between(forward: Pass, message: Tensor, upper: Variable, lower: Variable) -> Tensor:
    """`[K, *shape of lower]`: what arrives of messages at `upper`; zero where no walk comes.

    Arguments:
        message: `[K, *shape of upper]`.
    """
    arrived = send(forward, {upper: message}, {lower: None}).get(lower)
    if arrived is None:
        return message.new_zeros((len(message), *forward.shape(lower)))
    return arrived


@full_precision()
def push_between(forward: Pass, mass: Tensor, lower: Variable, upper: Variable) -> Tensor:
    """`F(j) = sum_i R(i|j) F(i)` over the walks from `upper` to `lower`.

    The transpose of `send_between`.

    Arguments:
        mass: `[K, *shape of lower]`; walks that do not come to `lower` count zero.

    Returns:
        `[K, *shape of upper]`.
    """
    graph = forward.graph
    between = (graph.upstream(upper) | {upper}) & graph.leading_to([lower])
    order = [v for v in graph.variables[lower.index + 1 : upper.index + 1] if v in between]
    last = {operand: v for v in order if v.producer for operand in v.producer.operands}
    masses = {lower: mass}
    with torch.inference_mode(False), torch.no_grad():
        for variable in order:
            operation = variable.producer
            if operation is None:
                continue
            given = [masses.get(operand) for operand in operation.operands]
            propagation = forward.propagations[operation]
            masses[variable] = propagation.send_up(given, forward.shape(variable))
            for operand in operation.operands:
                if last[operand] is variable:  # nobody reads it any more
                    masses.pop(operand, None)
            del given
    if upper not in masses:  # no walk passes both
        return mass.new_zeros((len(mass), *forward.shape(upper)))
    return masses[upper]


# -- At absolute sizes.


class Absolute(Pass):
    """A pass with every connection at its absolute size: what bounds are computed with.

    `|R(i|j)|` in place of `R(i|j)` carries the sum of the absolute relevance of walks. No part of
    the walks that a message stands for has a relevance beyond (total + absolute) / 2 or below
    (total - absolute) / 2. Messages travel it between variables that `covers` is true of.
    """

    def __init__(self, forward: Pass) -> None:
        self.graph, self.output, self.batch = forward.graph, forward.output, forward.batch
        self.telescope = None
        self.cautions, self.copies = forward.cautions, forward.copies
        self._forward = forward
        self._sizes = _Sizes(forward)

    @property
    def propagations(self) -> Mapping[Operation, Propagation]:  # type: ignore[override]
        return self._sizes

    def shape(self, variable: Variable) -> torch.Size:
        return self._forward.shape(variable)

    def covers(self, upper: Variable, lower: Variable) -> bool:
        """Whether every operation between two layers can tell its absolute sizes."""
        graph = self.graph
        between = (graph.upstream(upper) | {upper}) & graph.leading_to([lower]) - {lower}
        return all(v.producer is None or v.producer in self._sizes for v in between)


class _Sizes(Mapping[Operation, Propagation]):
    """Each operation at absolute size, made when it is first asked for."""

    def __init__(self, forward: Pass) -> None:
        self._forward = forward
        self._known: dict[Operation, Propagation | None] = {}

    def __getitem__(self, operation: Operation) -> Propagation:
        if operation not in self._known:
            self._known[operation] = self._forward.propagations[operation].absolute()
        found = self._known[operation]
        if found is None:
            raise KeyError(operation)
        return found

    def __iter__(self) -> Iterator[Operation]:
        return (operation for operation in self._forward.propagations if operation in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


# -- As many at once as a memory budget holds.

_HELD = 3
"""How often a message is there while it is shared out: as it came, by sign, divided."""


def message_size(forward: Pass, upper: Variable, lower: Variable | None = None) -> int:
    """The most bytes that one message takes on its way from one variable down to another.

    Its parts that wait at other variables are counted, and what an operation needs to share it
    out; what operations prepare once for all messages is not.

    Arguments:
        lower: where it stops; `None`: at the leaves.
    """
    graph = forward.graph
    leading = None if lower is None else graph.leading_to([lower])
    waiting = {upper: forward.shape(upper).numel()}
    most = 0
    for variable in graph.variables[upper.index :: -1]:
        if variable not in waiting:
            continue
        here = waiting.pop(variable)
        operation = None if variable is lower else variable.producer
        pulled = {}
        for operand in () if operation is None else operation.operands:
            if leading is None or operand in leading:
                pulled[operand] = forward.shape(operand).numel()
        most = max(most, sum(waiting.values()) + _HELD * here + 2 * sum(pulled.values()))
        waiting.update(pulled)
    return most * forward.output.element_size()


def checked(memory: float) -> int:
    """A memory budget in bytes.

    Raises:
        QueryError: it is no positive number.
    """
    known = isinstance(memory, int | float) and not isinstance(memory, bool)
    if not known or not 0 < memory < math.inf:
        raise QueryError(f"memory is a positive number of bytes, not {memory!r}")
    return int(memory)


def in_chunks(
    items: Sequence[T], memory: int, each: int, work: Callable[[Sequence[T]], None]
) -> None:
    """Work on as many items at a time as fit into the memory, at least one.

    Where a GPU's memory runs out nevertheless, chunks are half as large from there on.

    Arguments:
        each: bytes that one item takes.
        work: done to each chunk; it keeps nothing where it raises.
    """
    size = max(1, checked(memory) // max(1, each))
    begin = 0
    while begin < len(items):
        chosen = items[begin : begin + size]
        try:
            work(chosen)
        except torch.OutOfMemoryError:
            if len(chosen) == 1:
                raise
            size = len(chosen) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        begin += len(chosen)


# -- What comes out.


def finite(result: Tensor) -> Tensor:
    """The result as it is.

    Raises:
        QueryError: it overflowed.
    """
    if not bool(torch.isfinite(result).all()):
        wider = "" if result.dtype is torch.float64 else " Use double precision: model.double()."
        raise QueryError(
            f"relevance overflowed {result.dtype}: contributions that are not normalised multiply "
            "from layer to layer (normalized=False), or nearly zero columns amplified it without "
            "bound (see diagnostics(); the Gamma, ZPlus and Flat rules cannot do so)." + wider
        )
    return result
