"""Walks through blocks: what a set of neurons does through all that lies above, by removing it.

Walks from layer to layer divide every neuron's relevance among its parents, as they are now. Far
apart, that says little of what the network loses without a set: what is removed below changes
slopes on the way. Here all between a layer and what is asked above it is one operation, whose
parents are sets of the layer's neurons (section 3.5.3 leaves a contribution free to be any function
of parent and child). A set is removed, the network above runs once more, and what changes is passed
down by slopes between the two runs (`nrm.differences`):

    f(x) R(A, B) = sum of the differences that reach B by walks down to A, when A is removed
    f(x) R(A)    = f(x) - f(x without A)

A measure of differences for every set, put together: each has its set's share of the output, and
what is left of the output is a leaf of its own, at which walks end that visit nothing. So relevance
is normalised, additive and complete: `sum over B of R(A, B) = R(A)` over any cut above the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from nrm.ablation import Ablation
from nrm.answers import Answers
from nrm.condition import Condition, Given, Sets, as_condition, naming
from nrm.display import Progress, Shown, Table, counted, numbers
from nrm.engine import checked, finite, in_chunks, send_between
from nrm.errors import NeuronSetError, NrmError, QueryError
from nrm.explanation import Target
from nrm.formulas import Formula, holds_of_nothing
from nrm.gating import Worth
from nrm.graph import Variable, first_tokens
from nrm.joint import BySet, Division, Method, Partition, Parts, partitions
from nrm.measure import Measure
from nrm.prepare import Pass
from nrm.query import Starts
from nrm.removal import Removal
from nrm.search import Flow, Flows, Order, Search, Way, keys
from nrm.sets import divide

T = TypeVar("T")


class Blocks(Shown):
    """The relevance of sets of one layer jointly with anything above it, by removing them.

    Queries are those of a `Measure`: `blocks(A, B)` is the share of the output that the network
    gets from A by way of B. Relevances are shares of `R.scale`, as those of `R` are. Neurons of
    the layer that are in no set, and what the sets do not add up to, are in `rest`.

    Below the layer, relevance goes on by the walks of `R`; within a set, and above the layer, by
    slopes between the run with the set and the one without. A model that only an eager trace
    captures is run without a set along the branches that Python took with it. Batch norms are part
    of the layer before them where nothing else reads that, as for `nrm.Interventions`.

    What holds of walks from one layer to the next and not here: how walks go on below a neuron
    depends on which set they come to (the backward Markov property), since each set has slopes of
    its own. The relevance of a set above the layer is what the layer's sets do by way of it, and
    not what `R` gives. A set without which the output is the same has no relevance, jointly with
    anything.

    Arguments:
        R: the measure of a batch of inputs.
        parts: the layer, by name, or disjoint sets of its neurons (clusters, patches, tokens).
        by: what a layer given by name is divided into.
        removal: what removed activations become, as for `nrm.Interventions`.
        memory: bytes that the runs which are computed at once may take, roughly.
        progress: show a bar while sets are removed, or a function to call with how many were.

    Attributes:
        R: the measure.
        layer: the name of the layer.
        graph: that of the part of the network above it, which differences live on.

    Raises:
        QueryError: sets overlap, the removal makes no sense, or the measure is one of differences.
        UnsupportedOperatorError: an operator above the layer has no slope between two runs.

    Example:
        >>> blocks = nrm.Blocks(R, nrm.clusters(R, "features.5", 10))
        >>> blocks.joint(nrm.clusters(R, "features.10", 10))  # [batch, 10, 10]
        >>> blocks.heatmap(nrm.channels("features.10", 3)), blocks.top("features.10", k=5)
    """

    def __init__(
        self,
        R: Measure,
        parts: Parts,
        *,
        by: Division = "channel",
        removal: Removal = "zero",
        memory: int = 2**28,
        progress: Progress = False,
    ) -> None:
        forward = R.forward_pass
        self._asked = (parts if isinstance(parts, str) else list(parts), by, removal, memory)
        self.R, self.memory, self._progress = R, checked(memory), progress
        if R.graph.differences:
            raise QueryError(
                "the measure is one of differences from a reference already. Sets are removed "
                "from one input: call the explainer without a reference."
            )
        (self._parts,) = partitions(forward, [self._asked[0]], by, self.memory // 4)
        self._variable = self._parts.variable
        self.layer = self._parts.name
        self._refuse_overlaps()
        self._ablation = Ablation(R, self._parts, removal)
        self.graph = self._ablation.graph
        self._kept: tuple[Pass, Starts] | None = None
        self._rest: Tensor | None = None

    # -- what is asked ---------------------------------------------------------------------------

    def __call__(self, *sets: Sets, given: Given = None) -> Tensor:
        """The joint relevance of sets at the layer or above it, or of formulas over such.

        Arguments:
            sets: as for `Condition`. Sets of the layer may be any of its neurons.
            given: results are divided by its relevance (eq. 11).

        Returns:
            `[batch]`.
        """
        with self._asking(sets, given) as condition:
            rest = self.rest
            total = self._each(condition).sum(-1) + rest * holds_of_nothing(condition.formula)
            return self._divided(total, condition)

    def each(self, *sets: Sets, given: Given = None) -> Tensor:
        """The relevance of every set of the layer, jointly with others: `[batch, sets]`.

        Without others it is what the output loses without the set, as a share.

        Arguments: as for `__call__`.
        """
        with self._asking(sets, given) as condition:
            return self._divided(self._each(condition), condition)

    @property
    def rest(self) -> Tensor:
        """What the sets do not add up to: `[batch]`."""
        _ = self.R.forward_pass  # refused where the model has changed since
        if self._rest is None:
            self._rest = 1 - self._each(Condition()).sum(-1)
        return self._rest.clone()

    def marginal(self, layer: str, *sets: Sets, given: Given = None) -> Tensor:
        """The relevance of every neuron of a layer, jointly with sets: shaped like the layer.

        Arguments:
            layer: this one, one above it, or one below it, where relevance goes on by the walks
                of `R`.
            others: as for `__call__`. Sets lie at this layer or above it.
        """
        with self._asking(sets, given) as condition:
            wanted = self._below_the_layer(layer)
            found = self._marginal(layer if wanted is None else self.layer, condition)
            if wanted is None:
                wanted = self._above_the_layer(layer)
            else:
                message = found.unsqueeze(0)
                found = send_between(self.R.forward_pass, message, self._variable, wanted)[0]
            known = self._known(condition)
            return finite(found if known is None else divide(found, wanted.by_sample(known)))

    def heatmap(self, *sets: Sets, at: str | None = None, given: Given = None) -> Tensor:
        """The relevance of every input element, jointly with sets: shaped like the input.

        Arguments:
            at: the input, for a model with several.
            others: as for `marginal`.
        """
        return self.marginal(self.R.graph.input_at(at), *sets, given=given)

    def tokens(self, *sets: Sets, at: str | None = None, given: Given = None) -> Tensor:
        """The relevance of every token, jointly with sets: `[batch, tokens]`.

        Arguments: as for `Measure.tokens`.
        """
        layer = first_tokens(self.R.graph) if at is None else at
        return self.marginal(layer, *sets, given=given).sum(-1)

    def channels(self, layer: str, *sets: Sets, given: Given = None) -> Tensor:
        """The relevance of every channel of a layer, jointly with sets: `[batch, channels]`.

        Arguments: as for `marginal`.
        """
        (parts,) = partitions(self.R.forward_pass, [layer], "channel", self.memory)
        return parts.add_up(self.marginal(layer, *sets, given=given).unsqueeze(0))[0]

    def joint(
        self,
        layer: Parts,
        *more: Parts | Formula | Condition,
        given: Given = None,
        by: Division = "channel",
        method: Method = "auto",
        gating: float = 0.0,
    ) -> Tensor:
        """The relevance of every set of this layer with every part of layers above it.

        Arguments:
            layer: by name, or sets of one layer.
            more: further layers; single sets, formulas and conditions hold jointly with all.
            gating: where a set changes how much a part above matters, by what it changes in
                others: how much of that is credited to the part, and not to those others
                (`nrm.gating`). Of two layers alone.
            others: as for `Measure.joint`.

        Returns:
            `[batch, sets, parts of the layer, ...]`, in the order given.
        """
        held = [part for part in more if isinstance(part, Formula | Condition)]
        layers = [layer, *(part for part in more if not isinstance(part, Formula | Condition))]
        with self._asking(held, given) as condition:
            self._check_layers(layers)
            if gating:
                self._check_gating(gating, layers, condition)
                return self._halved(layer, by, gating)

            def answer(answers: Answers) -> Tensor:
                table = answers.joint(layers, by, method, self.memory)
                return table.view(answers.forward.copies, -1, *table.shape[1:])

            found = self._put_together(condition, answer)
            return self._divided(torch.cat(found).movedim(1, 0), condition)

    def top(
        self,
        *layers: Parts | Condition,
        k: int = 5,
        by: Division = "channel",
        given: Given = None,
        order: Order = "largest",
        method: Way = "exact",
        sample: int = 0,
        work: int | None = None,
        seconds: float | None = None,
    ) -> Flows:
        """The sets with parts of layers above, one of each, with the largest joint relevance.

        A search of the flows above for every set, of which the best are taken.

        Arguments:
            layers: above this one. The first part of every flow found is a set of this layer.
            others: as for `Measure.top`; `work` and `seconds` are those of each set's search.
        """
        held = [layer for layer in layers if isinstance(layer, Condition)]
        higher = [layer for layer in layers if not isinstance(layer, Condition)]
        if not higher:
            raise QueryError("name a layer above. The sets by themselves are in blocks.each().")
        wanted = Search(k, order, method, sample, work, seconds, self.memory)
        wanted.check(self.R.batch)
        with self._asking(held, given) as condition:
            self._check_layers(higher)
            known = self._known(condition)
            each = 1.0 if known is None else float(known[sample])
            search = wanted.divided_by(each)

            def answer(answers: Answers) -> list[Flows]:
                copies = range(answers.forward.copies)
                places = [copy * self.R.batch + sample for copy in copies]
                return [answers.top(higher, by, replace(search, sample=at)) for at in places]

            found = [one for some in self._put_together(condition, answer) for one in some]
            layers_above = [part.name for part in self._partitions_above(higher, by)]
            passing = self._each(Condition(condition, self.layer, *layers_above))[sample].sum()
            return self._best(found, k, search.order, float(passing)).divided_by(each)

    def of(self, target: Target) -> Blocks:
        """The same sets removed, for another target."""
        parts, by, removal, memory = self._asked
        R = self.R.of(target)
        return Blocks(R, parts, by=by, removal=removal, memory=memory, progress=self._progress)

    @property
    def size(self) -> int:
        """How many sets there are."""
        return self._parts.size

    @property
    def scale(self) -> Tensor:
        """`[batch]`, what relevances are shares of, as of `R`."""
        return self.R.scale

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew from the measure, as that is (see `Measure`)."""
        return _made, (self.R, *self._asked)

    def __repr__(self) -> str:
        return f"Blocks({self.layer!r}, {self.size} sets removed, {self.R!r})"

    def table(self) -> Table:
        removal = self._asked[2]
        rows = [
            ("layer", self.layer),
            ("sets", str(self.size)),
            ("removed activations become", removal if isinstance(removal, str) else repr(removal)),
            ("explained", f"{self.R.explained}, {self.R.quantity}"),
            ("R.scale", numbers(self.scale.tolist())),
            ("the rest", numbers(self.rest.tolist())),
        ]
        note = "Relevances are shares of the explained output; times R.scale they are in its units."
        return Table("Walks through blocks", (), rows, [note])

    # -- runs with and without the sets ----------------------------------------------------------

    @contextmanager
    def _asking(self, sets: Sequence[Sets], given: Given) -> Iterator[Condition]:
        """A condition that can be asked here; errors are told with it."""
        condition = as_condition(sets, given)
        with naming(condition.said):
            condition.counting_all("blocks know")
            for formula in (*condition.sets, *condition.given):
                for event in formula.events:
                    for layer in event.layers:
                        self._above_the_layer(layer)
            yield condition

    def _above_the_layer(self, layer: str) -> Variable:
        """The variable of the part above of this name.

        Raises:
            QueryError: it lies below the layer, or beside it.
            UnknownLayerError: there is none.
        """
        try:
            return self.graph.variable(layer)
        except NrmError:
            below = self._below_the_layer(layer)
        if below is not None:
            raise QueryError(
                f"{layer!r} lies below {self.layer!r}, where sets are removed: here sets lie at "
                "that layer or above it. heatmap() and marginal() go on below it."
            )
        raise QueryError(f"{layer!r} does not depend on {self.layer!r}: no walk passes both.")

    def _below_the_layer(self, layer: str) -> Variable | None:
        """The variable of the whole of this name, if it lies below the layer.

        Raises:
            UnknownLayerError: neither the whole nor the part above has any.
        """
        try:
            there = self.R.graph.variable(layer)
        except NrmError:
            self.graph.variable(layer)  # a gate, say, which takes nothing in `R`
            return None
        return there if there in self.R.graph.upstream(self._variable) else None

    def _check_layers(self, layers: Sequence[Parts]) -> None:
        """Refuse names of layers that do not lie above."""
        for layer in layers:
            if isinstance(layer, str):
                self._above_the_layer(layer)

    def _each(self, condition: Condition) -> Tensor:
        """`[batch, sets]`, jointly with all that the condition says."""

        def answer(answers: Answers) -> Tensor:
            total = finite(answers.query.totals()[0])
            return total.view(answers.forward.copies, -1)

        return torch.cat(self._put_together(condition, answer)).T

    def _marginal(self, layer: str, condition: Condition) -> Tensor:
        """Shaped like the layer, summed over the sets; not divided by what is given."""
        variable = self._above_the_layer(layer)

        def answer(answers: Answers) -> Tensor:
            found = answers.query.marginals([variable])[variable]
            copies = answers.forward.copies
            if copies == 1:
                return found[0]
            view = variable.canonical(found)[0]
            summed = view.view(copies, -1, *view.shape[1:]).sum(0)
            return variable.restored(summed.unsqueeze(0), len(summed))[0]

        first, *more = self._put_together(condition, answer)
        return finite(sum(more, first))

    def _check_gating(self, gating: float, layers: Sequence[Parts], condition: Condition) -> None:
        if isinstance(gating, bool) or not 0 <= gating <= 1:
            raise QueryError(f"gating is a number from 0 to 1, not {gating!r}.")
        if len(layers) > 1 or condition.formula is not True:
            raise QueryError(
                "what a part gates is known of two layers alone: name one layer above, and "
                "nothing else. gating=0 takes further layers and conditions."
            )

    def _halved(self, layer: Parts, by: Division, gating: float) -> Tensor:
        """`[batch, sets, parts]`, by slopes and by what the parts are worth."""
        layer = layer if isinstance(layer, str) else list(layer)
        (upper,) = partitions(self.R.forward_pass, [layer], by, 1)
        self._above_the_layer(upper.name)
        if upper.variable is self._variable:
            raise QueryError(f"{upper.name!r} is where sets are removed: name a layer above it.")
        slopes = self.joint(layer, by=by) if gating < 1 else None
        worth = Worth(self.R, self._ablation, layer, by, self._asked[2])
        with torch.inference_mode(False), torch.no_grad():
            whole = worth.with_all()
        gated = (whole - torch.cat(self._of_all_sets(worth.without))).movedim(1, 0)
        return finite(gated if slopes is None else torch.lerp(slopes, gated, gating)).contiguous()

    def _known(self, condition: Condition) -> Tensor | None:
        """`[batch]`, the relevance of what is given; `None` if nothing is."""
        if not condition.given:
            return None
        known = Condition(*condition.given)
        return self._each(known).sum(-1) + self.rest * holds_of_nothing(known.formula)

    def _divided(self, found: Tensor, condition: Condition) -> Tensor:
        """`[batch, ...]`, divided by the relevance of what is given."""
        known = self._known(condition)
        if known is None:
            return found.contiguous()
        return divide(found, known.view(-1, *[1] * (found.dim() - 1))).contiguous()

    def _put_together(self, condition: Condition, answer: Callable[[Answers], T]) -> list[T]:
        """What the measures of all sets answer, some sets at a time."""
        _ = self.R.forward_pass  # refused where the model has changed since
        joint = Condition(*condition.sets, *condition.given)
        return self._of_all_sets(lambda chosen: answer(Answers(*self._pass(chosen), joint)))

    def _of_all_sets(self, answer: Callable[[Sequence[int]], T]) -> list[T]:
        """What is answered of some sets at a time, as many as fit in memory."""
        found: list[T] = []

        def work(chosen: Sequence[int]) -> None:
            found.append(answer(chosen))
            advance(len(chosen))

        each = self._ablation.bytes if self._ablation.together else self.memory
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            counted(self._progress, "removing sets", self.size) as advance,
        ):
            in_chunks(range(self.size), self.memory, each, work)
        return found

    def _pass(self, chosen: Sequence[int]) -> tuple[Pass, Starts]:
        """The pass of some sets; that of all of them at once is kept."""
        if self._kept is not None and len(chosen) == self.size:
            return self._kept
        found = self._ablation.run(chosen)
        if len(chosen) == self.size:
            self._kept = found
        return found

    def _refuse_overlaps(self) -> None:
        if not isinstance(self._parts, BySet):
            return
        value = self.R.forward_pass.value(self._variable)
        ones = torch.ones_like(value).unsqueeze(0)
        taken = torch.zeros_like(ones)
        for number, chosen in enumerate(self._parts.sets):
            taken += self._parts.split(ones, [number])
            if bool((taken > 1).any()):
                raise NeuronSetError(
                    f"{chosen} has neurons in common with a set before it. Sets that are removed "
                    "are disjoint: relevance of their union is then the sum."
                )

    # -- the most relevant flows -----------------------------------------------------------------

    def _partitions_above(self, layers: Sequence[Parts], by: Division) -> list[Partition]:
        forward, _ = self._pass(range(1))
        return partitions(forward, layers, by, self.memory)

    def _best(self, found: Sequence[Flows], k: int, order: Order, passing: float) -> Flows:
        """The best flows of all sets.

        Arguments:
            found: of each set.
            passing: the relevance of all flows together.
        """
        flows = [
            Flow(
                {self.layer: number, **flow.parts},
                (self._parts.set_of(number), *flow.sets),
                flow.relevance,
                flow.relevance / passing if passing else 0.0,
            )
            for number, some in enumerate(found)
            for flow in some
        ]
        values = torch.tensor([flow.relevance for flow in flows], dtype=torch.float64)
        best = keys(values, order).argsort(descending=True, stable=True)[:k].tolist()
        last = float(keys(values, order)[best[-1]]) if best else 0.0
        # No set has anything beyond the last of its own list by more than its gap.
        gap = 0.0
        for some in found:
            if some.gap and len(some):
                own = float(keys(torch.tensor([some[-1].relevance]).double(), order)[0])
                gap = max(gap, own + some.gap - last)
            elif some.gap:
                gap = some.gap
        return Flows(
            [flows[place] for place in best],
            gap,
            sum(some.visited for some in found) / len(found),
            sum(some.expanded for some in found),
        )


def _made(R: Measure, parts: Parts, by: Division, removal: Removal, memory: int) -> Blocks:
    """Those that were saved."""
    return Blocks(R, parts, by=by, removal=removal, memory=memory)
