"""The normalized relevance measure of one input, and its queries (Definitions 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Literal, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from nrm.answers import Answers, Together, weights_on
from nrm.circuits.components import by_token
from nrm.circuits.edges import Edges, Walks
from nrm.circuits.steps import Named
from nrm.condition import (
    Condition,
    Given,
    Reading,
    Sets,
    Weights,
    Within,
    as_condition,
    listed,
    naming,
)
from nrm.display import Progress, counted, narrowed
from nrm.engine import checked
from nrm.errors import QueryError
from nrm.explanation import Explanation, Target
from nrm.formulas import Formula, NeuronSet, united
from nrm.graph import Variable, first_tokens
from nrm.heatmaps import marginals_of_many, marginals_of_targets
from nrm.joint import Division, Method, Parts, best_method, partition
from nrm.query import Plan
from nrm.search import Flows, Order, Search, Way
from nrm.sets import resolve
from nrm.views import depth

T = TypeVar("T")


class Measure(Explanation):
    """Relevance of any set of neurons, for a batch of inputs and what is explained of each.

    `R(A, B)` is the joint relevance: the share of the walks from the output to the leaves that
    pass A and B. All of them together have relevance one. Every result keeps the batch axis.
    What it returns is the caller's own, to overwrite or to keep.

    Every query takes the arguments of a `Condition`, `sets` (a condition may stand for them),
    `given`, `within` and `normalized`, in the sense that is said there. Where something is
    refused, a note below the error says what was asked.
    """

    # -- queries ---------------------------------------------------------------------------------

    def __call__(
        self, *sets: Sets, given: Given = None, within: Within = None, normalized: Reading = True
    ) -> Tensor:
        """The joint relevance `R(A, B, ...)` (eq. 9), or conditional `R(A, ... | given)` (eq. 11).

        Arguments: as for `Condition`.

        Returns:
            `[batch]`.
        """
        with self._asked(sets, given, within, normalized) as asked:
            return asked.total()

    def relevances(
        self,
        *formulas: Sets,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> Tensor:
        """The relevance of several formulas in one run (`plan` says at what cost).

        Arguments: as for `Condition`; each formula by itself, all of them with what else is said.
        Conditions that count walks otherwise than the others are answered in a run of their own.

        Returns:
            `[formulas, batch]`.
        """
        return self._together(formulas, given, within, normalized, Together.totals)

    def plan(
        self,
        *formulas: Sets,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> Plan:
        """How many messages `relevances` of these formulas sends; nothing is sent.

        Arguments: as for `relevances`.
        """
        return self._together(formulas, given, within, normalized, Together.plan)

    def outcomes(
        self,
        *formulas: Sets,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> dict[tuple[bool, ...], Tensor]:
        """The relevance `[batch]` of each combination of formulas that hold, in one run.

        For neuron sets these are their Harsanyi dividends (section 3.5): of the walks that visit
        exactly those sets of the family. They add up to one; combinations of which no walk can
        be are left out.

        Arguments: as for `relevances`.
        """
        with self._asked((), given, within, normalized) as asked:
            return asked.outcomes(formulas)

    def marginal(
        self,
        layer: str,
        *sets: Sets,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> Tensor:
        """`R(i, A, ...)` for every neuron i of a layer, jointly with sets anywhere (eq. 37).

        One pass back from the output, and one forward where something lies further up than the
        layer.

        Arguments:
            layer: its name.
            others: as for `Condition`.

        Returns:
            shaped like the layer, batch axis included; without sets, ConRel. It sums to one over
            a cut, and over a single branch to that branch's share.
        """
        with self._asked(sets, given, within, normalized) as asked:
            variable = self.graph.variable(layer)
            return asked.marginals([variable])[variable]

    def marginals(
        self,
        *sets: Sets,
        layers: Collection[str] | None = None,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> dict[str, Tensor]:
        """`R(i, A, ...)` for every neuron i of every layer, in two passes (forward-backward).

        Arguments:
            layers: some of them; by default all, upstream and downstream of the sets and beside.
            others: as for `Condition`.

        Returns:
            a tensor shaped like each layer, by its name as given, from the inputs to the output.
        """
        condition = as_condition(sets, given, within, normalized)
        with self._asked((condition,)) as asked:
            named = self._named(layers)
            found = asked.marginals(set(named.values()))
            return {name: found[variable] for name, variable in named.items()}

    def conditionals(
        self,
        *sets: Sets,
        layers: Collection[str] | None = None,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> dict[str, Tensor]:
        """`R(A, ... | j)` for every neuron j downstream of the sets, in one pass.

        The forward message: the relevance with which walks from j on visit the sets. It is known
        also where j itself has none, and does not depend on the explained output.

        Arguments:
            layers: by default all that have no set between them and the output.
            others: as for `Condition`. Given B, it is `R(A, ... | B, j)`.

        Returns:
            a tensor shaped like each layer, by its name.
        """
        condition = as_condition(sets, given, within, normalized)
        with self._asked((condition,)) as asked:
            if condition.formula is True:
                raise QueryError("name at least one set.")
            if layers is None:
                named = {variable.name: variable for variable in asked.query.undecided()}
            else:
                named = self._named(layers)
            found = asked.conditionals(set(named.values()))
            return {name: found[variable] for name, variable in named.items()}

    def weighted(
        self,
        weights: Weights,
        *sets: Sets,
        over: Literal["sum", "product"] = "sum",
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> Tensor:
        """The relevance of walks with a weight (eq. 33): `sum_w v(w) R(w)`.

        Arguments:
            weights: of neurons, by layer. Neurons of other layers do not count.
            over: whether `v(w)` is the sum or the product of the weights of the neurons that
                the walk visits.
            others: as for `Condition`. What is given has no weights.

        Returns:
            `[batch]`.
        """
        if over not in ("sum", "product"):
            raise QueryError(f"weights are joined over='sum' or over='product', not {over!r}")
        weighing = Condition(weights=weights)
        if over == "product":
            return self(weighing, *sets, given=given, within=within, normalized=normalized)
        with self._asked(sets, given, within, normalized) as asked:
            return asked.expected(weights_on(weighing, self._forward_pass))

    def additive(
        self,
        *sets: NeuronSet | str,
        layers: int | None = None,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> Tensor:
        """The additive relevance of neuron sets (Def. 3, Thm. 3): how much of a walk lies in them.

        A walk counts with the share of its neurons that lie in the sets, so that the relevance is
        additive over neurons, also of different layers.

        Arguments:
            sets: together one set.
            layers: `L + 1`, the number of neurons of a walk; by default the number of layers of
                the proper form (`proper_form`), where every operation makes one.
            others: as for `Condition`: which walks count at all.

        Returns:
            `[batch]`.
        """
        if layers is not None and (not isinstance(layers, int) or layers < 1):
            raise QueryError(f"layers is a positive number, not {layers!r}")
        with self._asked((), given, within, normalized) as asked:
            visits = asked.expected(resolve(united(sets), self._forward_pass))
            return visits / (depth(self.graph) if layers is None else layers)

    def heatmap(
        self,
        *sets: Sets,
        at: str | None = None,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> Tensor:
        """The relevance of every input element, jointly with sets: LRP, CRP and eq. 37.

        Arguments:
            at: the input, for a model with several.
            others: as for `Condition`.

        Returns:
            shaped like the input; not summed over colours.
        """
        layer = self.graph.input_at(at)
        return self.marginal(layer, *sets, given=given, within=within, normalized=normalized)

    def heatmaps(
        self,
        conditions: Sequence[Sets | Sequence[Sets]],
        *,
        at: str | None = None,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
        memory: int = 2**28,
        progress: Progress = False,
    ) -> Tensor:
        """A heatmap jointly with each of many conditions: `heatmap(*condition)`, batched.

        Arguments:
            conditions: each a set, formula, layer or condition, or several that hold together.
            at: the input, for a model with several, or any other layer.
            given, within, normalized: as for `Condition`, for all of them.
            memory: bytes that the messages travelling at once may take, with the masks of their
                sets, roughly.
            progress: whether to show a progress bar; or a function to call instead, with the
                number of conditions just done.

        Returns:
            `[conditions, *input]`, in the order given.
        """
        if isinstance(conditions, (str, Formula, Condition)):
            raise QueryError("conditions are a list; one alone is a list of one.")
        variable = self.graph.variable(self.graph.input_at(at))
        forward, memory = self.forward_pass, checked(memory)
        each = [as_condition(listed(c), given, within, normalized) for c in conditions]
        with counted(progress, "heatmaps", len(each)) as advance:
            return marginals_of_many(forward, self._starts, each, variable, memory, advance)

    def by_target(
        self,
        targets: Sequence[Target] | None = None,
        *sets: Sets,
        at: str | None = None,
        normalized: Reading = True,
        memory: int = 2**28,
        progress: Progress = False,
    ) -> Tensor:
        """The heatmap of each of many targets, all in one run: `R.of(target).heatmap(*sets)`.

        Arguments:
            targets: as for `Explainer`; by default all outputs of a sample, which are then classes.
            others: as for `heatmaps`.

        Returns:
            `[targets, *input]`, in the order given; each is a share of its own target.
        """
        condition = as_condition(sets, None, None, normalized)
        if condition.given or condition.within is not None or condition.weights:
            raise QueryError("by_target takes sets and formulas alone: ask R.of(target) for more.")
        forward, memory = self.forward_pass, checked(memory)
        variable = self.graph.variable(self.graph.input_at(at))
        each = range(self.output.shape[-1]) if targets is None else targets
        with naming(condition.said), counted(progress, "targets", len(each)) as advance:
            return marginals_of_targets(
                forward, each, self._starts_of, condition, variable, memory, advance
            )

    def tokens(
        self,
        *sets: Sets,
        at: str | None = None,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> Tensor:
        """The relevance of every token: that of its embedding's neurons together.

        Arguments:
            at: the embeddings (or any layer with one vector for each token); by default those
                that the first integer input is looked up in.
            others: as for `Condition`.

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
        within: Within = None,
        normalized: Reading = True,
    ) -> Tensor:
        """The relevance of every channel of a layer, jointly with sets anywhere: `[batch, C]`.

        Arguments: as for `marginal`.
        """
        parts = partition(layer, "channel", self._forward_pass)
        message = self.marginal(layer, *sets, given=given, within=within, normalized=normalized)
        return parts.add_up(message.unsqueeze(0))[0]

    # -- combinations of parts of layers ---------------------------------------------------------

    def joint(
        self,
        a: Parts,
        b: Parts,
        *more: Parts | Formula | Condition,
        given: Given = None,
        by: Division = "channel",
        method: Method = "auto",
        memory: int = 2**28,
    ) -> Tensor:
        """`R(part of a, part of b, ...)` for all combinations of parts of two or more layers.

        Arguments:
            a, b: two layers, in any order: names, or sets of neurons of one layer (clusters,
                patches).
            more: further layers, as names or lists of sets. A single set, formula or condition
                holds jointly with all the others; it lies above all of the layers, or beside.
            given: as for `Condition`; it lies there too.
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
        sets = [part for part in more if isinstance(part, (Formula, Condition))]
        further = [part for part in more if not isinstance(part, (Formula, Condition))]
        condition = as_condition(sets, given).counting_all("combinations of parts have")
        with self._asked((condition,)) as asked:
            return asked.joint([a, b, *further], by, method, checked(memory))

    def joint_method(self, a: Parts, b: Parts, by: Division = "channel") -> str:
        """How `joint` finds all pairs: by `"contraction"`, `"backward"` or `"forward"` messages.

        It may depend on the input: on the winners of a max-pooling in between.
        """
        return best_method(self.forward_pass, a, b, by)

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
        memory: int = 2**28,
        progress: bool | Callable[[float], None] = False,
    ) -> Flows:
        """The combinations of parts, one of each layer, with the largest joint relevance.

        Exact: the most promising beginnings are followed first, until bounds show that nothing
        else comes in between (`Flows.gap` is zero). With a budget the search may end before.

        Arguments:
            layers: in any order, each on a walk with the others: names, or sets of neurons of one
                layer (clusters, patches). A condition among them holds jointly with all parts,
                wherever its sets lie: above the layers, between or below them, or in one of them.
                Where they do not all lie above, a message has a row for each state that the
                condition can be in.
            k: how many.
            by: what a layer given by name is divided into.
            given: as for `Condition`.
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
        sets = [layer for layer in layers if isinstance(layer, Condition)]
        divided = [layer for layer in layers if not isinstance(layer, Condition)]
        condition = as_condition(sets, given).counting_all("combinations of parts have")
        with self._asked((condition,)) as asked, narrowed(progress, "searching") as advance:
            memory = checked(memory)
            wanted = Search(k, order, method, sample, work, seconds, memory, advance)
            return asked.top(divided, by, wanted)

    def edges(
        self,
        components: Named,
        tokens: bool = False,
        memory: int = 2**28,
        progress: Progress = False,
    ) -> Edges:
        """The direct edges between components: walks that visit one, then the other, none between.

        One message for each component, and one for the output.

        Arguments:
            components: neuron sets by name (`nrm.components(R)`), or a list of them; no two have
                a neuron in common. Each may span several layers, and share layers with others.
            tokens: each component split by position (`nrm.circuits.by_token`): a message for each.
            memory: bytes that the messages travelling at once may take, roughly.
            progress: whether to show a progress bar; or a function to call instead, with the
                number of components just done.

        Example:
            >>> edges = R.edges(nrm.components(R))
            >>> edges.top(5), edges("a3.h5", "m7"), edges.circuit(share=0.9)
            >>> R.edges({"stem": "conv1", "block": nrm.channels("layer1", 3, 4)})  # any network
        """
        forward = self.forward_pass
        parts = by_token(components, forward) if tokens else components
        walks = Walks(forward, self._starts[True], parts, checked(memory))
        with counted(progress, "edges", len(walks.places.receivers)) as advance:
            return walks.edges(advance)

    # -- how a condition reaches what answers it -------------------------------------------------

    @cached_property
    def _answers(self) -> WeakKeyDictionary[Condition, Answers]:
        return WeakKeyDictionary()

    @contextmanager
    def _asked(
        self,
        sets: Sequence[Sets],
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
    ) -> Iterator[Answers]:
        """What answers a condition, kept as long as the caller keeps the condition.

        Errors are told with what was asked.
        """
        condition = as_condition(sets, given, within, normalized)
        with naming(condition.said):
            forward = self._forward_pass.as_it_was()
            answers = self._answers.get(condition)
            if answers is None:
                answers = Answers(forward, self._starts, condition)
                self._answers[condition] = answers
            yield answers

    def _together(
        self,
        formulas: Sequence[Sets],
        given: Given,
        within: Within,
        normalized: Reading,
        answer: Callable[[Together], T],
    ) -> T:
        """What answers several conditions in one run, if they count walks alike."""
        each = [as_condition([one], given, within, normalized) for one in formulas]
        with naming(lambda: ", ".join(condition.said() for condition in each)):
            return answer(Together(self.forward_pass, self._starts, each))

    def _named(self, layers: Collection[str] | None) -> dict[str, Variable]:
        if layers is None:
            return {variable.name: variable for variable in self.graph.variables}
        named = (layers,) if isinstance(layers, str) else layers
        return {layer: self.graph.variable(layer) for layer in named}
