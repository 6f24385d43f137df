"""The normalized relevance measure of one input, and its queries (Definitions 1 and 2)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from nrm.diagnostics import (
    Diagnostics,
    bias_shares,
    diagnose,
    warn_of_cancelling,
    warn_of_output,
    warn_of_variation,
)
from nrm.engine import Messages, checked, finite
from nrm.errors import QueryError
from nrm.formulas import All, Formula, NeuronSet, as_formula, as_set, conjunction, united
from nrm.graph import Graph, Variable, first_tokens
from nrm.joint import Division, Method, Partition, all_combinations, best_method, partition
from nrm.masks import Stops, divide, resolve
from nrm.prepare import Pass
from nrm.progress import counted, narrowed
from nrm.query import Chain, Plan, Query, Weights, expected, marginals_of_chains, weights_of
from nrm.search import Budget, Flows, Order, Way, find_flows
from nrm.targets import Explained, Recipe, made
from nrm.views import ProperForm, depth, proper_form

Sets = Formula | str
"""A neuron set, a formula over such, or the name of a layer for all of its neurons."""

Given = Sets | Sequence[Sets] | None
Parts = str | Iterable[NeuronSet]
"""A layer by name, or sets of its neurons."""


class Measure:
    """Relevance of any set of neurons, for a batch of inputs and what is explained of each.

    `R(A, B)` is the joint relevance: the share of the walks from the output to the leaves that
    pass A and B. All of them together have relevance one. Every result keeps the batch axis.
    What it returns is the caller's own, to overwrite or to keep.

    Attributes:
        explained: `"output"`; or what is explained instead, `"logits behind softmax"`, where the
            model's last function is looked through (`Explainer(head=...)`).
    """

    def __init__(
        self,
        forward: Pass,
        explained: Explained,
        check: Callable[[], None] = lambda: None,
        recipe: Recipe | None = None,
    ) -> None:
        self._forward_pass = forward
        self._check = check  # that the weights are still those of the forward pass
        self._recipe = recipe
        self._start: Messages = {forward.graph.output: explained.relevance.unsqueeze(0)}
        self._unnormalized: Messages = {forward.graph.output: explained.unnormalized.unsqueeze(0)}
        warn_of_output(forward, explained)
        self.explained = "output" if forward.graph.head is None else str(forward.graph.head)
        self._target = explained.target
        unnormalized = explained.unnormalized.unsqueeze(0)
        self._scale = forward.graph.output.per_sample(unnormalized, self.batch)[0]

    # -- queries ---------------------------------------------------------------------------------

    def __call__(
        self,
        *sets: Sets,
        given: Given = None,
        within: NeuronSet | str | None = None,
        normalized: bool = True,
    ) -> Tensor:
        """The joint relevance `R(A, B, ...)` (eq. 9), or conditional `R(A, ... | given)` (eq. 11).

        A walk visits a set if it visits any of its neurons; what flows past the set over a skip
        connection does not count. To keep what bypasses it, say `within` instead.

        Arguments:
            sets: neuron sets, or formulas over such (`~a & b`, eqs. 53-55), which hold together;
                the name of a layer stands for all of its neurons.
            given: a set or formula, or several that hold jointly; where their relevance is 0 so
                is the result.
            within: count only walks that visit no other neurons of the variables of this set:
                they pass the set, or bypass these variables altogether. The condition's own
                relevance, by which `given` divides, counts all walks.
            normalized: `False`: the original walk relevance, a product of unnormalised
                contributions (eq. 26), summed over the same walks.

        Returns:
            `[batch]`.
        """
        conditions = _conditions(given)
        joint = self._relevance([*sets, *conditions], within, normalized)
        if not conditions:
            return joint
        return divide(joint, self._relevance(conditions, None, normalized))

    def relevances(self, *formulas: Sets, given: Given = None, normalized: bool = True) -> Tensor:
        """The relevance of several formulas in one run (`plan` says at what cost).

        Arguments: as for a call of the measure; each formula by itself.

        Returns:
            `[formulas, batch]`.
        """
        conditions = [as_formula(c) for c in _conditions(given)]
        asked = [_together(f, *conditions) for f in formulas]
        known = [_together(*conditions)] if conditions else []
        totals = finite(self._query([*asked, *known], None, normalized).totals())
        return divide(totals[:-1], totals[-1]) if known else totals

    def outcomes(self, *formulas: Sets) -> dict[tuple[bool, ...], Tensor]:
        """The relevance `[batch]` of each combination of formulas that hold, in one run.

        For neuron sets these are their Harsanyi dividends (section 3.5): of the walks that visit
        exactly those sets of the family. They add up to one; combinations of which no walk can
        be are left out.
        """
        found = self._query([as_formula(f) for f in formulas], None, True).outcomes()
        return {
            tuple(bool(held) for held in state): finite(relevance)
            for state, relevance in found.items()
        }

    def plan(self, *formulas: Sets) -> Plan:
        """How many messages `relevances` of these formulas sends; nothing is sent."""
        return self._query([as_formula(f) for f in formulas], None, True).plan()

    def marginal(
        self,
        layer: str,
        *sets: Sets,
        given: Given = None,
        within: NeuronSet | str | None = None,
        normalized: bool = True,
    ) -> Tensor:
        """`R(i, A, ...)` for every neuron i of a layer, jointly with sets anywhere (eq. 37).

        One pass back from the output, and one forward where something lies further up than the
        layer.

        Arguments: as for a call of the measure.

        Returns:
            shaped like the layer, batch axis included; without sets, ConRel. It sums to one over
            a cut, and over a single branch to that branch's share.
        """
        variable = self.graph.variable(layer)
        return self._marginals([variable], sets, given, within, normalized)[variable]

    def marginals(
        self,
        *sets: Sets,
        layers: Collection[str] | None = None,
        given: Given = None,
        within: NeuronSet | str | None = None,
        normalized: bool = True,
    ) -> dict[str, Tensor]:
        """`R(i, A, ...)` for every neuron i of every layer, in two passes (forward-backward).

        Arguments:
            layers: some of them; by default all, upstream and downstream of the sets and beside
                (but, given a condition, those that mix the samples of a batch).
            others: as for a call of the measure.

        Returns:
            a tensor shaped like each layer, by its name as given, from the inputs to the output.
        """
        named = self._named(layers)
        if layers is None and given is not None and self.batch > 1:  # conditioned by sample
            named = {name: v for name, v in named.items() if v.tells_samples(self.batch)}
        found = self._marginals(set(named.values()), sets, given, within, normalized)
        return {name: found[variable] for name, variable in named.items()}

    def conditionals(self, *sets: Sets, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """`R(A, ... | j)` for every neuron j downstream of the sets, in one pass.

        The forward message: the relevance with which walks from j on visit the sets. It is known
        also where j itself has none, and does not depend on the explained output.

        Arguments:
            sets: as for a call of the measure.
            layers: by default all that have no set between them and the output.

        Returns:
            a tensor shaped like each layer, by its name.
        """
        if not sets:
            raise QueryError("name at least one set.")
        query = self._query([_together(*sets)], None, True)
        named = {v.name: v for v in query.undecided()} if layers is None else self._named(layers)
        found = query.conditionals(set(named.values()))
        return {
            name: finite(found[v][0]).clone(memory_format=torch.contiguous_format)  # others see it
            for name, v in named.items()
        }

    def weighted(
        self,
        weights: Weights,
        *sets: Sets,
        over: Literal["sum", "product"] = "sum",
        given: Given = None,
    ) -> Tensor:
        """The relevance of walks with a weight (eq. 33): `sum_w v(w) R(w)`.

        Arguments:
            weights: of neurons, by layer. Neurons of other layers do not count.
            sets: only walks on which these hold.
            over: whether `v(w)` is the sum or the product of the weights of the neurons that
                the walk visits.
            given: divides by the relevance of this condition, as for a call of the measure.

        Returns:
            `[batch]`.
        """
        conditions = _conditions(given)
        laid = weights_of(weights, self.forward_pass)
        formula = _together(*sets, *conditions)
        if over == "product":
            total = self._query([formula], None, True, laid).totals()[0]
        elif over == "sum":
            total = expected(laid, self._query([formula], None, True))
        else:
            raise QueryError(f"weights are joined over='sum' or over='product', not {over!r}")
        total = finite(total)
        if not conditions:
            return total
        return divide(total, self._relevance(conditions, None, True))

    def additive(self, *sets: NeuronSet | str, layers: int | None = None) -> Tensor:
        """The additive relevance of neuron sets (Def. 3, Thm. 3): how much of a walk lies in them.

        A walk counts with the share of its neurons that lie in the sets, so that the relevance is
        additive over neurons, also of different layers.

        Arguments:
            sets: together one set.
            layers: `L + 1`, the number of neurons of a walk; by default the number of layers of
                the proper form (`proper_form`), where every operation makes one.

        Returns:
            `[batch]`.
        """
        if layers is not None and (not isinstance(layers, int) or layers < 1):
            raise QueryError(f"layers is a positive number, not {layers!r}")
        weights = resolve(united(sets), self.forward_pass)
        visits = finite(expected(weights, self._query([True], None, True)))
        return visits / (depth(self.graph) if layers is None else layers)

    def heatmap(
        self,
        *sets: Sets,
        at: str | None = None,
        given: Given = None,
        within: NeuronSet | str | None = None,
        normalized: bool = True,
    ) -> Tensor:
        """The relevance of every input element, jointly with sets: LRP, CRP and eq. 37.

        Arguments:
            at: the input, for a model with several. Others as for a call of the measure.

        Returns:
            shaped like the input; not summed over colours.
        """
        layer = self._input(at)
        return self.marginal(layer, *sets, given=given, within=within, normalized=normalized)

    def heatmaps(
        self,
        conditions: Sequence[Sets | Sequence[Sets]],
        *,
        at: str | None = None,
        memory: int = 2**28,
        progress: bool | Callable[[int], None] = False,
    ) -> Tensor:
        """A heatmap jointly with each of many conditions: `heatmap(*condition)`, batched.

        Arguments:
            conditions: each a set, formula or layer, or several that hold together.
            at: the input, for a model with several, or any other layer.
            memory: bytes that the messages travelling at once may take, with the masks of their
                sets, roughly.
            progress: whether to show a progress bar; or a function to call instead, with the
                number of conditions just done.

        Returns:
            `[conditions, *input]`, in the order given.
        """
        if isinstance(conditions, (str, Formula)):
            raise QueryError("conditions are a list; one alone is a list of one.")
        variable = self.graph.variable(self._input(at))
        forward, memory = self.forward_pass, checked(memory)
        found = forward.output.new_zeros((len(conditions), *forward.shape(variable)))
        # Their places, by what they ask: once where several ask the same.
        chains: dict[Chain, list[int]] = {}
        others: dict[Formula | bool, list[int]] = {}
        for place, condition in enumerate(conditions):
            sets = [condition] if isinstance(condition, (str, Formula)) else condition
            formula = _together(*sets)
            chain = Query(forward, self._start, [formula]).chain_above(variable)
            if chain is None:
                others.setdefault(formula, []).append(place)
            else:
                chains.setdefault(tuple(chain), []).append(place)
        with counted(progress, "heatmaps", len(conditions)) as advance:
            for formula, places in others.items():
                message = Query(forward, self._start, [formula]).marginals([variable])[variable]
                found[places] = finite(message)
                advance(len(places))
            marginals_of_chains(forward, self._start, chains, variable, found, memory, advance)
        for heatmap in found:
            warn_of_cancelling(forward, self._start, {variable: heatmap.unsqueeze(0)})
        return found

    def _input(self, at: str | None) -> str:
        if at is not None:
            return at
        if len(self.graph.inputs) > 1:
            names = ", ".join(repr(v.name) for v in self.graph.inputs)
            raise QueryError(f"the model has several inputs; name one with at=: {names}.")
        return self.graph.inputs[0].name

    def tokens(
        self,
        *sets: Sets,
        at: str | None = None,
        given: Given = None,
        within: NeuronSet | str | None = None,
        normalized: bool = True,
    ) -> Tensor:
        """The relevance of every token: that of its embedding's neurons together.

        Arguments:
            at: the embeddings (or any layer with one vector for each token); by default those
                that the first integer input is looked up in. Others as for a call of the measure.

        Returns:
            `[batch, tokens]`; the input's shape where the model takes only tokens.
        """
        layer = first_tokens(self.graph) if at is None else at
        message = self.marginal(layer, *sets, given=given, within=within, normalized=normalized)
        return message.sum(-1)

    def channels(
        self,
        layer: str,
        *sets: Sets,
        given: Given = None,
        within: NeuronSet | str | None = None,
        normalized: bool = True,
    ) -> Tensor:
        """The relevance of every channel of a layer, jointly with sets above it: `[batch, C]`."""
        parts = partition(layer, "channel", self._forward_pass)
        message = self.marginal(layer, *sets, given=given, within=within, normalized=normalized)
        return parts.add_up(message.unsqueeze(0))[0]

    def joint(
        self,
        a: Parts,
        b: Parts,
        *more: Parts | Formula,
        by: Division = "channel",
        method: Method = "auto",
        memory: int = 2**28,
    ) -> Tensor:
        """`R(part of a, part of b, ...)` for all combinations of parts of two or more layers.

        Arguments:
            a, b: two layers, in any order: names, or sets of neurons of one layer (clusters,
                patches).
            more: further layers, as names or lists of sets. A single set or formula holds jointly
                with all the others; it lies above all of the layers.
            by: what a layer given by name is divided into; its neurons in the order in which they
                lie without the batch axis.
            method: `"contraction"`: all at once, where one convolution or linear layer lies
                between two layers, and beside it only operations that keep channels apart;
                `"backward"`: a message from each part of the upper layer; `"forward"`: one from
                each part of the lower layer. `joint_method` says which it is by default. Of more
                than two layers this joins the lowest two, for each combination of the others.
            memory: bytes that the messages travelling at once may take, roughly.

        Returns:
            `[batch, parts of the first, parts of the second, ...]`, in the order given.

        Example:
            >>> R.joint("features.26", "features.28")  # [batch, 512, 512]
            >>> R.joint(nrm.clusters(R, "features.10", 5), nrm.clusters(R, "features.12", 5))
            >>> strong = [[flow.sets[0] for flow in R.top(layer, k=20)] for layer in layers]
            >>> R.joint(*strong)  # of three layers: [batch, 20, 20, 20]
        """
        conditions = [part for part in more if isinstance(part, Formula)]
        further = [part for part in more if not isinstance(part, Formula)]
        sides, order = self._sides([a, b, *further], by, checked(memory))
        message = self._message(sides[0].variable, conditions)
        left = max(1, checked(memory) - sum(side.held for side in sides))
        found = all_combinations(self.forward_pass, message, sides, left, method)
        for table in found:  # of each sample
            variation = float(torch.linalg.vector_norm(table, 1))
            warn_of_variation(self._forward_pass, self._start, sides[-1].name, variation)
        return finite(found.permute(0, *(order.index(place) + 1 for place in range(len(order)))))

    def joint_method(self, a: Parts, b: Parts, by: Division = "channel") -> str:
        """How `joint` finds all pairs: by `"contraction"`, `"backward"` or `"forward"` messages.

        It may depend on the input: on the winners of a max-pooling in between.
        """
        sides, _ = self._sides([a, b], by, 0)
        return best_method(self.forward_pass, sides[0], sides[1])

    def _sides(
        self, layers: Sequence[Parts], by: Division, memory: int
    ) -> tuple[list[Partition], list[int]]:
        """The parts of layers, from the output down, and the place where each was given."""
        sides = self._partitions(layers, by, memory)
        order = sorted(range(len(sides)), key=lambda place: -sides[place].variable.index)
        ordered = [sides[place] for place in order]
        for upper, lower in itertools.pairwise(ordered):
            if upper.variable is lower.variable:
                raise QueryError(f"{upper.name!r} twice: combinations are of different layers.")
        return ordered, order

    def _partitions(self, layers: Sequence[Parts], by: Division, memory: int) -> list[Partition]:
        """The parts of layers; a quarter of the memory is for what is kept of them."""
        each = memory // (4 * max(1, len(layers)))
        return [partition(_listed(layer), by, self.forward_pass, each) for layer in layers]

    def top(
        self,
        *layers: Parts,
        k: int = 5,
        by: Division = "channel",
        order: Order = "largest",
        method: Way = "exact",
        sample: int = 0,
        work: int | None = None,
        seconds: float | None = None,
        memory: int = 2**28,
        progress: bool | Callable[[float], None] = False,
    ) -> Flows:
        """The combinations of parts, one of each layer, with the largest joint relevance.

        Exact: the most promising beginnings are followed first, until bounds show that nothing
        else comes in between (`Flows.gap` is zero). With a budget the search may end before.

        Arguments:
            layers: in any order, each on a walk with the others: names, or sets of neurons of one
                layer (clusters, patches).
            k: how many.
            by: what a layer given by name is divided into.
            order: the `"largest"` first, the `"smallest"`, or the largest `"absolute"`.
            method: `"greedy"` for the best part of the highest layer, the best of the next one
                given it, and so on: fast, and not exact.
            sample: which sample of the batch.
            work: how many beginnings may be followed, each by a message, before the search ends;
                it goes on until k combinations are known.
            seconds: how long it may take, likewise; looked at between messages.
            memory: bytes that messages may take, roughly.
            progress: whether to show how far it is; or a function to call instead, after every
                message, with the gap that is left.

        Example:
            >>> R.top("features.24", "features.26", "features.28", k=20)
            >>> R.top("fc1", "fc2", by="neuron", order="absolute")
        """
        parts = self._partitions(layers, by, checked(memory))
        left = max(1, checked(memory) - sum(part.held for part in parts))
        with narrowed(progress, "searching") as advance:
            forward = self.forward_pass
            flows = find_flows(
                forward,
                partial(self._message, forward=forward),
                parts,
                k,
                order,
                sample,
                method,
                Budget(work, seconds),
                left,
                advance,
            )
        variation = sum(abs(flow.relevance) for flow in flows)
        warn_of_variation(forward, self._start, parts[-1].name, variation)
        return flows

    def activations(self, layer: str) -> Tensor:
        """The values of a layer's neurons, shaped like the layer, batch axis included."""
        return self.forward_pass.value(self.graph.variable(layer)).clone()

    def biases(self) -> dict[str, Tensor]:
        """The share `[batch]` of every bias and every other constant at which walks end.

        NaN where a leaf has no axis for the samples of a batch: explain one sample to see it.
        """
        shares = bias_shares(self.forward_pass, self._start)
        for share in shares.values():
            if not bool(share.isnan().all()):  # a leaf that mixes samples
                finite(share)
        return shares

    def diagnostics(self, tolerance: float = 1e-2) -> Diagnostics:
        """Whether the numbers can be trusted: totals over cuts, cancellation, failing columns."""
        return diagnose(self.forward_pass, self._start, tolerance)

    def proper_form(self) -> ProperForm:
        """The network in layers, with virtual copies, and the relevance of each (appendix A)."""
        return proper_form(self.forward_pass, self._start)

    # -- looking at it ---------------------------------------------------------------------------

    @property
    def target(self) -> Tensor | None:
        """`[batch]`, the explained output of each sample; `None` where `output_relevance` was given
        instead."""
        return None if self._target is None else self._target.clone()

    @property
    def output(self) -> Tensor:
        """The model's output."""
        return self._forward_pass.returned.clone()

    @property
    def scale(self) -> Tensor:
        """`[batch]`, the sum of the unnormalised output relevance (eq. 13), for one target its
        logit: multiply a result by it to have it in the logit's units."""
        return self._scale.clone()

    @property
    def graph(self) -> Graph:
        """The graph that the measure lives on."""
        return self._forward_pass.graph

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self._forward_pass.batch

    def __repr__(self) -> str:
        explained = "output relevance" if self.target is None else f"target {self.target.tolist()}"
        if self.graph.head is not None:
            explained += f", {self.explained}"
        return f"Measure({explained}, {len(self.graph.variables)} variables, batch {self.batch})"

    @property
    def forward_pass(self) -> Pass:
        """The forward pass that messages travel back through.

        Raises:
            QueryError: the model has changed since; or `torch.autocast` is on, under which messages
                would be rounded.
        """
        self._check()
        device = self._forward_pass.output.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            raise QueryError(
                "a measure is not asked within torch.autocast, which would round its messages. Ask "
                "it outside, or within torch.autocast(..., enabled=False)."
            )
        return self._forward_pass

    # -- keeping it ------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Callable[..., Measure], tuple[Any, ...]]:
        """Pickled, saved by torch and deep-copied as explainer, inputs and target.

        It is made anew where it is loaded. The model goes along, once for all measures in a file.

        Raises:
            QueryError: the model or the explainer has changed since, so that it would give other
                numbers.
        """
        if self._recipe is None:
            raise QueryError(
                "this measure was not made by an Explainer, so that it cannot be made again where "
                "it is loaded. Save its results, or call an Explainer."
            )
        self._check()
        return made, self._recipe.ingredients()

    def __copy__(self) -> Measure:
        """Another one on the same forward pass."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    # -- the engine behind -----------------------------------------------------------------------

    def _begin(self, normalized: bool) -> Messages:
        return self._start if normalized else self._unnormalized

    def _query(
        self,
        formulas: Sequence[Formula | bool],
        within: NeuronSet | str | None,
        normalized: bool,
        weights: Stops | None = None,
        forward: Pass | None = None,
    ) -> Query:
        forward = self.forward_pass if forward is None else forward
        open_to = weights if within is None else resolve(as_set(within), forward)
        return Query(forward, self._begin(normalized), formulas, normalized, open_to)

    def _relevance(
        self, sets: Sequence[Sets], within: NeuronSet | str | None, normalized: bool
    ) -> Tensor:
        """`[batch]`: the sum over the walks on which all sets hold (eqs. 25, 27)."""
        return finite(self._query([_together(*sets)], within, normalized).totals()[0])

    def _marginals(
        self,
        variables: Collection[Variable],
        sets: Sequence[Sets],
        given: Given,
        within: NeuronSet | str | None,
        normalized: bool,
    ) -> Messages:
        conditions = _conditions(given)
        formula = _together(*sets, *conditions)
        found = self._query([formula], within, normalized).marginals(variables)
        messages = {v: finite(message[0]).contiguous() for v, message in found.items()}
        if not conditions:
            return messages
        known = self._relevance(conditions, None, normalized)
        for variable, message in messages.items():
            messages[variable] = divide(message, variable.by_sample(known))
        return messages

    def _named(self, layers: Collection[str] | None) -> dict[str, Variable]:
        if layers is None:
            return {variable.name: variable for variable in self.graph.variables}
        named = (layers,) if isinstance(layers, str) else layers
        return {layer: self.graph.variable(layer) for layer in named}

    def _message(
        self, variable: Variable, sets: Sequence[Sets] = (), forward: Pass | None = None
    ) -> Tensor:
        """`[1, *shape]`: the message at a variable of the walks that visit `sets` before it.

        Arguments:
            forward: what `forward_pass` gave, for many messages: it looks at all weights.

        Raises:
            QueryError: a set lies further up than the variable.
        """
        query = self._query([_together(*sets)], None, True, forward=forward)
        for place in query.places & self.graph.upstream(variable):
            raise QueryError(
                f"{place.name!r} lies between {variable.name!r} and the inputs. Here sets are "
                "given that lie above both layers, or beside them."
            )
        return finite(query.marginals([variable])[variable])


def _conditions(given: Given) -> list[Sets]:
    if given is None:
        return []
    if isinstance(given, (list, tuple)):
        return list(given)
    return [as_formula(given)]  # type: ignore[arg-type] # refuses anything else by name


def _listed(parts: Parts) -> str | list[NeuronSet]:
    if isinstance(parts, Formula):
        return [as_set(parts)]
    if not isinstance(parts, Iterable):
        raise QueryError(f"a side of pairs is a layer or neuron sets of one, not {parts!r}.")
    return parts if isinstance(parts, str) else [as_set(chosen) for chosen in parts]


def _together(*formulas: Sets) -> Formula | bool:
    parts = conjunction(formulas)
    return All(parts) if parts else True
