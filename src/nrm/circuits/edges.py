"""Direct edges between components: which of them hands relevance to which, with none between.

A walk from the output to a leaf visits some of the named components, one after the other. Each of
its *steps*, from the one visited last (the receiver) to the next further down (the sender), is a
direct edge. The output is the first receiver, the leaf where a walk ends the last sender. The
relevance of an edge is that of the walks that take its step (all of it, however they go before and
after).

One message for each receiver: the total message at its neurons travels down, and what comes to
another component is counted there and goes no further. So what arrives from a receiver sums to what
started: the edges into B sum to R(B), those into the output to one, and as much leaves a component
as enters it. A walk that comes back to a component, after another one, enters it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from nrm.circuits.circuit import Circuit, find_circuit, place_of
from nrm.circuits.steps import Named, Places, Steps
from nrm.diagnostics import warn_of_variation
from nrm.display import Shown, Table
from nrm.engine import Absolute, Messages, finite, in_chunks, message_size
from nrm.errors import QueryError
from nrm.prepare import Pass
from nrm.query import Query

_LARGEST = 2**32
"""Bytes of a result; more is refused."""


class Walks:
    """The walks of one measure from component to component.

    Arguments:
        start: the normalised message at the output.
        components: as for `Places`.
        memory: bytes that messages travelling at once may take.
    """

    def __init__(self, forward: Pass, start: Messages, components: Named, memory: int) -> None:
        self.forward, self.start, self.memory = forward, start, memory
        self.components = components
        self.places = Places(forward, components)
        receivers, senders = len(self.places.receivers), len(self.places.senders)
        size = receivers * senders * forward.batch * forward.output.element_size()
        if size > _LARGEST:
            raise QueryError(
                f"{receivers} receivers x {senders} senders x {forward.batch} samples are "
                f"{size / 2**30:.0f} GiB of edges. Name fewer components, or fewer positions of "
                "them."
            )

    def each(self) -> int:
        """Bytes that one message takes, roughly, at most."""
        return message_size(self.forward, self.forward.graph.output)

    def edges(self, advance: Callable[[int], None] = lambda done: None) -> Edges:
        """All of them, by one message for each receiver."""
        places = self.places
        variables = {variable for lies in places.lies for variable in lies}
        totals = Query(self.forward, self.start, [True]).marginals(variables)
        steps = Steps(places, self.start, totals, None)

        def work(chosen: Sequence[int]) -> None:
            steps.run(chosen)
            advance(len(chosen))

        in_chunks([n for bundle in places.bundles for n in bundle], self.memory, self.each(), work)
        return self._found(steps)

    def kept(self, allowed: Tensor) -> Tensor:
        """`[batch]`: the relevance of the walks all of whose steps are allowed.

        Arguments:
            allowed: `[receivers, senders]`, boolean.
        """
        places = self.places
        may = torch.zeros(1 + len(places.names), len(places.senders), dtype=torch.bool)
        may[places.rows] = allowed.cpu()
        steps = Steps(places, self.start, {}, may.to(self.forward.output.device))
        bundles = [
            tuple(n for n in bundle if bool(may[n].any()) or (n and bool(places.ends[n - 1])))
            for bundle in places.bundles
        ]
        bundles = [bundle for bundle in bundles if bundle]
        each = self.each() * max(map(len, bundles), default=1)

        def work(some: Sequence[tuple[int, ...]]) -> None:
            steps.run([number for bundle in some for number in bundle])

        in_chunks(bundles, self.memory, each, work)
        ended = steps.ended
        if places.mixed is not None:
            ended = ended + self._left_over(steps)[may[:, places.mixed]].sum(0)
        return finite(ended)

    def last_steps(self, edges: Tensor) -> Tensor | None:
        """`[batch, receivers, leaves]`: what walks that end by each last step are worth at most.

        That is half of what they are worth and of their absolute sizes together: the part of them
        that is positive.

        Arguments:
            edges: `[batch, receivers, senders]`.

        Returns:
            `None` where some operation cannot tell absolute sizes, or they overflow.
        """
        places, forward = self.places, self.forward
        absolute = Absolute(forward)
        graph = forward.graph
        mixed = not all(leaf.tells_samples(forward.batch) for leaf in graph.leaves)
        if mixed or not all(absolute.covers(graph.output, leaf) for leaf in graph.leaves):
            return None
        within = [lies for lies in places.lies if any(v.is_leaf for v in lies)]
        if any(not v.is_leaf for lies in within for v in lies):
            return None  # walks may come to it and not end
        start = {variable: message.abs() for variable, message in self.start.items()}
        try:
            sizes = Walks(absolute, start, self.components, self.memory).edges().relevance
        except QueryError:
            return None
        return ((edges + sizes) / 2)[:, :, places.ends]

    def _left_over(self, steps: Steps) -> Tensor:
        """`[receivers, batch]`: what comes to the sender that mixes samples: all that is left."""
        counted = steps.counted.sum(2) - steps.counted[:, :, self.places.mixed]
        return steps.entered - steps.stayed - counted

    def _found(self, steps: Steps) -> Edges:
        places, counted = self.places, steps.counted
        if places.mixed is not None:
            counted[:, :, places.mixed] = self._left_over(steps)
        relevance = finite(counted[places.rows].transpose(0, 1).contiguous())
        entered = steps.entered[places.rows].T.contiguous()
        found = Edges(relevance, places.receivers, tuple(places.senders), entered, self)
        if isinstance(self.forward, Absolute):
            return found
        size = relevance.abs().sum(2).amax(0)
        largest = int(size.argmax())
        warn_of_variation(
            self.forward, self.start, f"edges into {places.receivers[largest]}", float(size.max())
        )
        return found


# -- what is found.


@dataclass(frozen=True)
class Edge:
    """One direct edge.

    Attributes:
        sender, receiver: names; the receiver is nearer to the output.
        relevance: of the walks that step from one to the other.
    """

    sender: str
    receiver: str
    relevance: float

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver} ({self.relevance:.3g})"


@dataclass(frozen=True, repr=False, eq=False)
class Edges(Shown):
    """The relevance of all direct edges (`Measure.edges`).

    Attributes:
        relevance: `[samples, receivers, senders]`, shares of what is explained. Edges into one
            receiver sum to `entered`.
        receivers: `"output"`, then the components that do not lie at leaves, where walks end.
        senders: the components, then the leaves: inputs, embeddings, constants by name, and
            `"biases"`, all of them together.
        entered: `[samples, receivers]`: how much relevance enters each: R(B), and one for the
            output. A walk that comes back to B after another component enters it twice. All of
            it leaves by edges, but for what ends within B, where that has leaves of its own.
    """

    relevance: Tensor
    receivers: tuple[str, ...]
    senders: tuple[str, ...]
    entered: Tensor
    walks: Walks | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "walks": None}  # what is saved are the numbers

    def __call__(self, sender: str, receiver: str) -> Tensor:
        """`[samples]`, the relevance of one edge, a share of what is explained.

        Raises:
            QueryError: there is no such sender or receiver.
        """
        row = place_of(receiver, self.receivers, "receiver")
        return self.relevance[:, row, place_of(sender, self.senders, "sender")]

    def top(
        self,
        k: int = 10,
        order: Literal["absolute", "largest", "smallest"] = "absolute",
        sample: int | None = None,
    ) -> list[Edge]:
        """The edges with the largest relevance.

        Arguments:
            k: how many; fewer, where others have none.
            order: by what.
            sample: of which sample; `None`: by the mean over all.
        """
        scores = self.of(sample).flatten()
        keys = {"absolute": scores.abs(), "largest": scores, "smallest": -scores}
        if order not in keys:
            raise QueryError(f"the order is one of {tuple(keys)}, not {order!r}")
        ranks = keys[order].argsort(descending=True, stable=True)
        chosen = ranks[scores[ranks] != 0][: max(k, 0)].tolist()
        return [self._edge(place, float(scores[place])) for place in chosen]

    def of(self, sample: int | None = None) -> Tensor:
        """`[receivers, senders]`, of one sample, or the mean over all."""
        if sample is None:
            return self.relevance.mean(0)
        if not -len(self.relevance) <= sample < len(self.relevance):
            raise QueryError(f"there is no sample {sample}, of {len(self.relevance)}.")
        return self.relevance[sample]

    def circuit(self, share: float = 0.9, sample: int | None = None, work: int = 64) -> Circuit:
        """A smallest set of edges that keeps a share of the relevance (`nrm.circuits.circuit`).

        Arguments:
            share: of the relevance of all walks; kept are the walks all of whose steps are in the
                set.
            sample: of which sample; `None`: the mean over all.
            work: how many sets may be tried, each by a run of messages. Where all smaller sets
                are among them the result is a smallest one, and `gap` is zero.
        """
        walks = self.walks
        if walks is None:
            raise QueryError(
                "what a set of edges keeps is asked of the measure: R.edges(...) anew."
            )

        walks.forward.as_it_was()  # refused where the model has changed since

        def kept(chosen: Tensor) -> float:
            shares = walks.kept(chosen)
            return float(shares.mean() if sample is None else shares[sample])

        scores = self.of(sample)
        last = walks.last_steps(self.relevance)
        if last is not None:
            last = last.mean(0) if sample is None else last[sample]
        names = (self.receivers, self.senders)
        places = walks.places
        return find_circuit(scores, names, kept, share, places.ends, work, last, places.possible)

    def table(self) -> Table:
        found = self.top(len(self.receivers) * len(self.senders))
        rows = [(edge.sender, edge.receiver, f"{edge.relevance:+.4f}") for edge in found]
        title = f"{len(found)} direct edges between {len(self.receivers) - 1} components"
        if len(self.relevance) > 1:
            title += f", mean of {len(self.relevance)} samples"
        return Table(title, ("from", "to", "relevance"), rows)

    def _edge(self, place: int, relevance: float) -> Edge:
        row, column = divmod(place, len(self.senders))
        return Edge(self.senders[column], self.receivers[row], relevance)
