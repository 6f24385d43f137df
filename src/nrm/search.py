"""The most relevant flows: combinations of one part of each of some layers (appendix H).

The exact search follows the most promising beginning of a flow first, until none can come in
between. A beginning is a part of each of the first few layers, with the message of the walks
through all of them. What it may still lead to is bounded from the message and the intervals of the
layer it has come to (`nrm.bounds`). Where one weighted sum lies between two layers, one contraction
bounds all pairs of their channels, and finds their relevance if they are the last.

The greedy search is what CRP's users do by hand: the best part of the highest layer, then the best
of the next one given it. Each step is right, and the whole need not be: parts that are strong
together may be weak alone.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nrm.between import Course
from nrm.bounds import Arrivals, Interval, arrivals, intervals
from nrm.contraction import Contraction, contracted_pairs
from nrm.display import Shown, Table
from nrm.engine import Absolute, finite
from nrm.errors import QueryError
from nrm.formulas import NeuronSet
from nrm.graph import Graph, Variable
from nrm.joint import ByNeuron, Partition, contraction_between
from nrm.prepare import Pass

Order = Literal["largest", "smallest", "absolute"]
"""Which flows are wanted: those with the largest, smallest or absolutely largest relevance."""

Way = Literal["exact", "greedy"]
"""How flows are searched for."""


def keys(values: Tensor, order: Order) -> Tensor:
    """Relevances as keys: the larger the key, the earlier in the order wanted."""
    if order == "absolute":
        return values.abs()
    return values if order == "largest" else -values


@dataclass(frozen=True)
class Search:
    """Which flows of some layers are wanted, and how they are looked for.

    Attributes:
        k: how many.
        sample: of which sample of the batch.
        work: how many beginnings may be followed before the search ends.
        seconds: how long it may take.
        memory: bytes for the messages of beginnings that are kept to go on from.
        advance: called for every beginning followed, with the gap that is left.
    """

    k: int
    order: Order
    method: Way
    sample: int
    work: int | None
    seconds: float | None
    memory: int
    advance: Callable[[float], None] = lambda gap: None

    def check(self, batch: int) -> None:
        """Refuse what no search can be.

        Raises:
            QueryError: an option is none of those there are.
        """
        require_order(self.order)
        if self.method not in get_args(Way):
            raise QueryError(f"the method is one of {get_args(Way)}, not {self.method!r}")
        require_positive("k", self.k)
        if self.work is not None:
            require_positive("work", self.work)
        seconds, sample = self.seconds, self.sample
        known = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if seconds is not None and not (known and seconds > 0):
            raise QueryError(f"seconds is a positive number, not {seconds!r}")
        if not isinstance(sample, int) or isinstance(sample, bool) or not 0 <= sample < batch:
            raise QueryError(f"sample {sample!r} is out of range: the batch has {batch}")

    def divided_by(self, known: float) -> Search:
        """The same of joint relevances, where what is wanted is these divided by a number."""
        if known < 0 and self.order != "absolute":
            return replace(self, order="smallest" if self.order == "largest" else "largest")
        return self

    def is_over(self, followed: int, seconds: float) -> bool:
        """Whether what it may take is used up."""
        late = self.seconds is not None and seconds >= self.seconds
        return late or (self.work is not None and followed >= self.work)


@dataclass(frozen=True)
class Flow:
    """One combination of parts, and the relevance that flows through all of them.

    Attributes:
        parts: the part of each layer, by its number (that of a channel, of a neuron as they lie,
            of a set as given), in the order in which the layers were given.
        sets: the same as neuron sets, to query on with.
        relevance: the joint relevance; all walks together have one.
        share: the relevance as a fraction of what passes the layers at all. Equal to the
            relevance where every layer is a cut; elsewhere what passes may be small or negative,
            and shares beyond one or of the other sign.
    """

    parts: dict[str, int]
    sets: tuple[NeuronSet, ...]
    relevance: float
    share: float


@dataclass(frozen=True, repr=False)
class Flows(Shown):
    """The flows found, in order.

    Attributes:
        flows: the first of the order wanted, first.
        gap: no combination that is not listed goes beyond the last one listed by more than this,
            in the order wanted. Zero: the list is exact. Infinite: nothing is known.
        visited: the share of all combinations whose relevance was computed. Of others it is known
            that they stay behind, or that nothing flows there.
        expanded: how many beginnings were followed, by a message each.
    """

    flows: list[Flow]
    gap: float
    visited: float
    expanded: int

    @property
    def exact(self) -> bool:
        """Whether no combination that is not listed goes beyond those listed, up to rounding."""
        return self.gap == 0

    def __iter__(self) -> Iterator[Flow]:
        return iter(self.flows)

    def __len__(self) -> int:
        return len(self.flows)

    def __getitem__(self, index: int) -> Flow:
        return self.flows[index]

    def divided_by(self, known: float) -> Flows:
        """The same with relevances divided by a number, and 0 where that is 0 (eq. 11)."""
        each = 0.0 if known == 0 else 1 / known
        flows = [replace(flow, relevance=flow.relevance * each) for flow in self.flows]
        return replace(self, flows=flows, gap=self.gap * abs(each) if each else 0.0)

    def table(self) -> Table:
        layers = tuple(self.flows[0].parts) if self.flows else ()
        rows = [
            (
                str(place),
                *map(str, flow.parts.values()),
                f"{flow.relevance:+.4g}",
                f"{flow.share:+.2%}",
            )
            for place, flow in enumerate(self.flows, 1)
        ]
        found = "nothing beyond them" if self.exact else f"others may be {self.gap:.2g} beyond them"
        notes = [
            f"{found}; {self.visited:.3g} of all combinations looked at, {self.expanded} "
            "beginnings followed.",
            "Relevance: of all walks, which have 1; share: of what passes the layers.",
        ]
        return Table(f"{len(self)} flows", ("", *layers, "relevance", "share"), rows, notes)


# -- The exact search.

Prefix = tuple[int, ...]
"""A beginning: a part of each of the first few layers."""
Waiting = tuple[float, int, Prefix]
"""A beginning to follow, after minus its bound and minus its length: the smallest comes first."""


@dataclass
class Found:
    """The best combinations so far, and what it took.

    Attributes:
        k, order: how many are wanted, and which come first.
        best: the key, the parts and the relevance of each, first to last.
        evaluated: how many combinations were looked at; not those known to be zero.
        followed: how many beginnings were followed.
        gap: how far beyond the last of the best something may be that was not followed.
    """

    k: int
    order: Order
    best: list[tuple[float, Prefix, float]] = field(default_factory=list)
    evaluated: int = 0
    followed: int = 0
    gap: float = math.inf

    def add(self, prefix: Prefix, table: Tensor, rows: Sequence[int] | None = None) -> None:
        """The relevances of ways to complete a beginning: one axis for each further layer.

        Arguments:
            rows: which parts of the next layer these are; by default all.
        """
        flat = keys(finite(table), self.order).flatten()
        self.evaluated += flat.numel()
        places = flat.topk(min(self.k, flat.numel())).indices
        chosen = torch.unravel_index(places, table.shape)
        if rows is not None:
            chosen = (torch.tensor(rows)[chosen[0].cpu()], *chosen[1:])
        self._keep(prefix, chosen, table.flatten()[places])

    def add_zeros(self, prefix: Prefix, shape: Sequence[int]) -> None:
        """All ways to complete a beginning through which nothing flows."""
        if self.worst < 0:
            places = torch.arange(min(self.k, math.prod(shape)))
            self._keep(prefix, torch.unravel_index(places, tuple(shape)), torch.zeros(len(places)))

    def _keep(self, prefix: Prefix, chosen: Sequence[Tensor], values: Tensor) -> None:
        further = zip(*(parts.tolist() for parts in chosen), strict=True)
        scores = keys(values, self.order).tolist()
        for key, more, value in zip(scores, further, values.tolist(), strict=True):
            self.best.append((key, (*prefix, *more), value))
        self.best.sort(key=lambda one: -one[0])
        del self.best[self.k :]

    @property
    def worst(self) -> float:
        """What has to be beaten."""
        return self.best[-1][0] if len(self.best) == self.k else -math.inf


class BranchAndBound:
    """Search over combinations of one part for each of some layers, from the output down.

    Arguments:
        course: the walks that count, of one sample alone.
        layers: their parts, each layer upstream of the one before.
        wanted: how many, in which order, and what it may take.
    """

    def __init__(
        self, forward: Pass, course: Course, layers: Sequence[Partition], wanted: Search
    ) -> None:
        self.forward, self.layers, self.wanted = forward, layers, wanted
        self.sizes = Absolute(forward)
        self.course = course
        self.shape = [layer.size for layer in layers]
        self._arrived: dict[Prefix, Tensor] = {}
        self._slack = 1 + 100 * torch.finfo(course.start.dtype).eps  # bounds are rounded, too

    def search(self) -> Found:
        """The best k combinations; or of those found until what it may take was used up."""
        begin, k = time.monotonic(), self.wanted.k
        found = Found(k, self.wanted.order)
        waiting: list[Waiting] = [(-math.inf, 0, ())]
        while waiting and -waiting[0][0] > found.worst:
            over = self.wanted.is_over(found.followed, time.monotonic() - begin)
            if over and len(found.best) == k:
                break
            bound, _, prefix = _deepest(waiting) if over else heapq.heappop(waiting)
            found.followed += 1
            for key, part in self._follow(prefix, -bound, found):
                child = (*prefix, part)
                heapq.heappush(waiting, (-key, -len(child), child))
            found.gap = max(0.0, -waiting[0][0] - found.worst) if waiting else 0.0
            self.wanted.advance(found.gap)
        assert waiting or len(found.best) == min(k, math.prod(self.shape))
        return found

    # -- following a beginning -------------------------------------------------------------------

    def _follow(self, prefix: Prefix, bound: float, found: Found) -> list[tuple[float, int]]:
        """What a beginning leads to: relevances, or longer beginnings and their bounds.

        Returns:
            those that may be among the best.
        """
        depth, last = len(prefix), len(self.layers) - 1
        message = self._message(prefix)
        here = self.layers[depth]
        if depth == last:
            found.add(prefix, here.add_up(self.course.weighed(message, -1)).sum((0, 1)))
            return []
        held = here.add_up(message.abs()).sum((0, 1))
        for part in (held == 0).nonzero()[:, 0].tolist():
            found.add_zeros((*prefix, part), self.shape[depth + 1 :])
        contracts = depth == last - 1 and self._contractions[depth] is not None
        if contracts and not math.isfinite(found.worst):
            bounds = torch.full_like(held, torch.inf)  # nothing to beat yet
        else:
            below = None if contracts else self._ceilings[depth + 1]
            bounds = self._bounds(message, message.abs(), depth, below)
            bounds = torch.minimum(bounds, self._ceilings[depth]).clamp(max=bound)
        alive = ((held > 0) & (bounds > found.worst)).nonzero()[:, 0].tolist()
        if contracts:
            if alive:
                kept = torch.cat([here.keep(row, alive) for row in torch.split(message, 1)])
                pairs = self._pairs(self.forward, kept, depth, self.course.onward[-1])
                found.add(prefix, pairs.sum(0)[alive], alive)
            return []
        if alive:
            self._remember(prefix, message)
        return [(float(bounds[part]), part) for part in alive]

    def _message(self, prefix: Prefix) -> Tensor:
        """`[states, *shape]` at the layer that a beginning leads to, before it is divided there."""
        if not prefix:
            return self.course.start
        if prefix in self._arrived:
            return self._arrived[prefix]
        held = _part_of(self._message(prefix[:-1]), self.layers[len(prefix) - 1], prefix[-1])
        return finite(self.course.ways[len(prefix) - 1].send(self.forward, held))

    def _remember(self, prefix: Prefix, message: Tensor) -> None:
        """Keep a message for what it leads to; the oldest are forgotten, and sent again."""
        if not prefix:
            return
        self._arrived[prefix] = message
        size = message.numel() * message.element_size()
        while len(self._arrived) > max(1, self.wanted.memory // size):
            del self._arrived[next(iter(self._arrived))]

    # -- bounds ----------------------------------------------------------------------------------

    def _bounds(self, message: Tensor, size: Tensor, depth: int, below: Tensor | None) -> Tensor:
        """`[parts]`: what flows through each part of a layer cannot go beyond, in the order wanted.

        Arguments:
            message: at the layer; walks that have come there, or any part of them, flow on.
            size: their absolute relevance.
            below: `[parts]` of the next layer, what cannot be gone beyond there; `None`: not to
                look at pairs with its parts.
        """
        here = self._intervals[depth]
        if here is None:
            return message.new_full((self.shape[depth],), torch.inf)
        layer = self.layers[depth]
        sums = layer.add_up(message * here.sum).sum((0, 1))
        bounds = self._key(sums, layer.add_up(size * here.width).sum((0, 1)))
        onward = None if below is None else self._intervals[depth + 1]
        if below is not None and onward is not None and self._bounds_pairs(depth):
            pairs = self._pairs(self.forward, message, depth, onward.sum).sum(0)
            widths = self._pairs(self.sizes, size, depth, onward.width).sum(0)
            by_pair = torch.minimum(self._key(pairs, widths), below)
            bounds = torch.minimum(bounds, by_pair.amax(1))
        # Where sizes overflowed nothing is known.
        return torch.nan_to_num(bounds, nan=torch.inf, posinf=torch.inf)

    def _bounds_pairs(self, depth: int) -> bool:
        """Whether all pairs of a layer's parts and the next one's are bounded at once."""
        if self._contractions[depth] is None:
            return False
        upper, lower = self.layers[depth : depth + 2]
        return self.sizes.covers(upper.variable, lower.variable)

    def _key(self, total: Tensor, size: Tensor) -> Tensor:
        """The best that any part of some walks can be, of which the relevances are known."""
        spread = size * self._slack
        low, high = (total - spread) / 2, (total + spread) / 2
        if self.wanted.order == "absolute":
            return torch.maximum(high, -low)
        return high if self.wanted.order == "largest" else -low

    def _pairs(
        self, forward: Pass, message: Tensor, depth: int, onward: Tensor | None = None
    ) -> Tensor:
        """`[batch, parts, parts of the next layer]`: of walks in whatever state."""
        found, way = self._contractions[depth], self.course.ways[depth]
        assert found is not None
        pairs = message.new_zeros((forward.batch, *self.shape[depth : depth + 2]))
        for k, row in enumerate(torch.split(message, 1)):
            weight = way.weighed(forward, k, onward)
            pairs = pairs + contracted_pairs(forward, row, way.upper, way.lower, found, weight)
        return pairs

    @cached_property
    def _intervals(self) -> list[Interval | None]:
        way, arrived = self.course, self._arrivals
        return intervals(self.forward, self.sizes, self.layers, way, arrived, self.wanted.memory)

    @cached_property
    def _arrivals(self) -> list[Arrivals]:
        return arrivals(self.forward, self.sizes, self.layers, self.course)

    @cached_property
    def _contractions(self) -> list[Contraction | None]:
        """Between each layer and the next."""
        return [
            contraction_between(self.forward, upper, lower) if way.keeps_apart else None
            for (upper, lower), way in zip(
                itertools.pairwise(self.layers), self.course.ways, strict=True
            )
        ]

    @cached_property
    def _ceilings(self) -> list[Tensor]:
        """`[parts]` of each layer: what nothing that comes through a part goes beyond.

        From the lowest layer up, each with the help of the one below. Nothing is known where
        intervals are not those of any part of the walks, but of single neurons.
        """
        found = [self.course.start.new_full((size,), torch.inf) for size in self.shape]
        single = any(isinstance(layer, ByNeuron) for layer in self.layers)
        if single or any(way is None for way in self._intervals):
            return found
        for depth, arrived in reversed(list(enumerate(self._arrivals))):
            assert arrived.size is not None
            below = None if depth == len(found) - 1 else found[depth + 1]
            found[depth] = self._bounds(arrived.message, arrived.size, depth, below)
        return found


def _part_of(message: Tensor, layer: Partition, part: int) -> Tensor:
    """`[states, *shape]`: what of a message is at the neurons of a part."""
    return torch.cat([layer.split(row, [part]) for row in torch.split(message, 1)])


def _deepest(waiting: list[Waiting]) -> Waiting:
    """The longest beginning, and of those the best: what soonest leads to relevances."""
    chosen = min(waiting, key=lambda one: (one[1], one[0]))
    waiting.remove(chosen)
    heapq.heapify(waiting)
    return chosen


# -- The greedy search.


def greedy(forward: Pass, course: Course, layers: Sequence[Partition], wanted: Search) -> Found:
    """For each of the k best parts of the first layer, the best of the next one jointly with it."""
    first, last, order, k = layers[0], layers[-1], wanted.order, wanted.k
    table = first.add_up(course.weighed(course.start, 0)).sum((0, 1))
    parts = keys(table, order).topk(min(k, first.size)).indices.tolist()
    found = Found(k, order)
    for part in parts:
        chosen, relevance = [part], table[part]
        held = _part_of(course.start, first, part)
        for depth, (way, lower) in enumerate(zip(course.ways, layers[1:], strict=True), 1):
            message = way.send(forward, held)
            there = finite(lower.add_up(course.weighed(message, depth)).sum((0, 1)))
            chosen.append(int(keys(there, order).argmax()))
            held, relevance = _part_of(message, lower, chosen[-1]), there[chosen[-1]]
        found.best.append((float(keys(relevance, order)), tuple(chosen), float(relevance)))
    found.best.sort(key=lambda one: -one[0])
    found.evaluated = len(parts) * last.size
    found.followed = len(parts) * (len(layers) - 1)
    return found


# -- Search, from layers and options to flows.


def find_flows(
    forward: Pass,
    follow: Callable[[Sequence[Variable]], Course],
    parts: Sequence[Partition],
    wanted: Search,
) -> Flows:
    """The most relevant combinations of parts of one sample, one part of each layer.

    Arguments:
        follow: gives the walks that count through layers, from the output down.
        parts: of layers in any order, each on a walk with the others.

    Raises:
        QueryError: no walk passes all layers.
    """
    if not parts:
        raise QueryError("name at least one layer")
    layers = in_depth([part.variable for part in parts], forward.graph)
    by_layer = {part.variable: part for part in parts}
    ordered = [by_layer[layer] for layer in layers]
    course = follow(layers)
    course = replace(course, start=layers[0].only_sample(course.start, wanted.sample))
    if wanted.method == "greedy":
        found = greedy(forward, course, ordered, wanted)
    else:
        found = BranchAndBound(forward, course, ordered, wanted).search()
    whole = _whole(forward, course, ordered)
    flows = []
    for _, chosen, relevance in found.best:
        at = dict(zip(layers, chosen, strict=True))
        flows.append(
            Flow(
                {part.name: at[part.variable] for part in parts},
                tuple(part.set_of(at[part.variable]) for part in parts),
                relevance,
                relevance / whole if whole else 0.0,
            )
        )
    visited = found.evaluated / math.prod(part.size for part in parts)
    return Flows(flows, found.gap, visited, found.followed)


def in_depth(layers: Sequence[Variable], graph: Graph) -> list[Variable]:
    """Layers from the output down.

    Raises:
        QueryError: two of them lie side by side, so that no walk passes both.
    """
    ordered = sorted(layers, key=lambda variable: -variable.index)
    for upper, lower in itertools.pairwise(ordered):
        if lower not in graph.upstream(upper):
            raise QueryError(
                f"no walk passes both {upper.name!r} and {lower.name!r}: they are the same layer "
                "or lie side by side."
            )
    return ordered


def _whole(forward: Pass, course: Course, layers: Sequence[Partition]) -> float:
    """The relevance of all combinations together, where parts do not overlap."""
    message = layers[0].covered(course.start)
    for way, lower in zip(course.ways, layers[1:], strict=True):
        message = lower.covered(way.send(forward, message))
    return float(course.weighed(message, -1).sum())


def require_order(order: str) -> None:
    """Refuse what is no order of flows or walks."""
    if order not in get_args(Order):
        raise QueryError(f"the order is one of {get_args(Order)}, not {order!r}")


def require_positive(what: str, number: Any) -> None:
    """Refuse what is no positive integer.

    Arguments:
        what: what it is the number of.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise QueryError(f"{what} is a positive integer, not {number!r}")
