"""The normalized relevance measure of one input, and its queries (Definitions 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nrm.channels import channel_pairs, only_sample, require_samples_apart, sum_by_channel
from nrm.diagnostics import Diagnostics, diagnose
from nrm.errors import QueryError
from nrm.graph import Graph, Variable, first_tokens
from nrm.neurons import NeuronSet, as_set
from nrm.passing import Messages, send
from nrm.program import Pass
from nrm.proper_form import ProperForm, proper_form
from nrm.query import Stops, joint_messages, per_sample, resolve
from nrm.search import Flow, Flows, in_depth, top_flows
from nrm.targets import Explained

Given = NeuronSet | str | Sequence[NeuronSet | str] | None


class Measure:
    """Relevance of any set of neurons, for a batch of inputs and what is explained of each.

    `R(A, B)` is the joint relevance: the share of the walks from the output to the leaves that
    pass A and B. All of them together have relevance one. Every result keeps the batch axis.

    Attributes:
        target: `[batch]`, the explained output of each sample; `None` where `output_relevance`
            was given instead.
        output: the model's output.
        scale: `[batch]`, the sum of the unnormalised output relevance (eq. 13), for one target
            its logit: multiply a result by it to have it in the output's units.
    """

    def __init__(
        self, forward: Pass, explained: Explained, check: Callable[[], None] = lambda: None
    ) -> None:
        self._forward_pass = forward
        self._check = check  # that the weights are still those of the forward pass
        self._start: Messages = {forward.graph.output: explained.relevance.unsqueeze(0)}
        self._unnormalized: Messages = {forward.graph.output: explained.unnormalized.unsqueeze(0)}
        self.target = explained.target
        self.output = forward.output
        self.scale = per_sample(
            explained.unnormalized.unsqueeze(0), forward.graph.output, self.batch
        )[0]

    # -- queries ---------------------------------------------------------------------------------

    def __call__(
        self,
        *sets: NeuronSet | str,
        given: Given = None,
        within: NeuronSet | str | None = None,
        normalized: bool = True,
    ) -> Tensor:
        """The joint relevance `R(A, B, ...)` (eq. 9), or conditional `R(A, ... | given)` (eq. 11).

        A walk passes a set if it visits any of its neurons; what flows past the set over a skip
        connection does not count. To keep what bypasses it, say `within` instead.

        Arguments:
            sets: neuron sets; the name of a layer stands for all of its neurons.
            given: a set, or several that hold jointly; where their relevance is 0 so is the
                result.
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
        return _divide(joint, self._relevance(conditions, None, normalized))

    def marginal(
        self,
        layer: str,
        *sets: NeuronSet | str,
        given: Given = None,
        within: NeuronSet | str | None = None,
        normalized: bool = True,
    ) -> Tensor:
        """`R(i, A, ...)` for every neuron i of a layer, jointly with sets above or at it (eq. 37).

        Arguments: as for a call of the measure.

        Returns:
            shaped like the layer, batch axis included; without sets, ConRel. It sums to one over
            a cut, and over a single branch to that branch's share.

        Raises:
            QueryError: a set lies between the layer and the inputs.
        """
        variable = self.graph.variable(layer)
        conditions = _conditions(given)
        message = self._at(variable, [*sets, *conditions], within, normalized)[0]
        if not conditions:
            return message
        known = self._relevance(conditions, None, normalized)
        if variable.batch_axis is None and self.batch > 1:
            raise QueryError(
                f"{variable.name!r} mixes the batch with another axis, so its relevance cannot be "
                "conditioned sample by sample. Explain one sample at a time."
            )
        return _divide(message, _against(known, message, variable))

    def heatmap(
        self,
        *sets: NeuronSet | str,
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
        if at is None:
            if len(self.graph.inputs) > 1:
                names = ", ".join(repr(v.name) for v in self.graph.inputs)
                raise QueryError(f"the model has several inputs; name one with at=: {names}.")
            at = self.graph.inputs[0].name
        return self.marginal(at, *sets, given=given, within=within, normalized=normalized)

    def tokens(
        self,
        *sets: NeuronSet | str,
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
        *sets: NeuronSet | str,
        given: Given = None,
        within: NeuronSet | str | None = None,
        normalized: bool = True,
    ) -> Tensor:
        """The relevance of every channel of a layer, jointly with sets above it: `[batch, C]`."""
        variable = self.graph.variable(layer)
        require_samples_apart(variable, self.batch)
        message = self.marginal(layer, *sets, given=given, within=within, normalized=normalized)
        return sum_by_channel(message.unsqueeze(0), variable)[0]

    def joint(self, a: str, b: str, *sets: NeuronSet | str, memory: int = 2**28) -> Tensor:
        """`R(channel of a, channel of b, A, ...)` for all pairs of channels of two layers.

        Arguments:
            a, b: two layers, in any order.
            sets: further sets, above both layers.
            memory: bytes that the messages travelling at once may take, roughly.

        Returns:
            `[batch, channels of a, channels of b]`.
        """
        upper, lower = self.graph.variable(a), self.graph.variable(b)
        if upper is lower:
            raise QueryError(f"{a!r} and {b!r} are the same layer.")
        swap = upper in self.graph.upstream(lower)
        if swap:
            upper, lower = lower, upper
        message = self._at(upper, sets)
        pairs = _finite(channel_pairs(self._forward, message, upper, lower, memory))
        return pairs.transpose(1, 2) if swap else pairs

    def top(
        self, *layers: str, k: int = 5, sample: int = 0, beam: int = 64, memory: int = 2**28
    ) -> Flows:
        """The combinations of channels, one of each layer, with the largest joint relevance.

        Arguments:
            layers: in any order, each on a walk with the others.
            k: how many.
            sample: which sample of the batch.
            beam: for more than two layers, how many beginnings to follow (then not exact).
            memory: bytes that the messages travelling at once may take, roughly.
        """
        if not layers:
            raise QueryError("name at least one layer")
        for what, number in (("k", k), ("beam", beam)):
            if not isinstance(number, int) or number < 1:
                raise QueryError(f"{what} is a positive integer, not {number!r}")
        if not isinstance(sample, int) or not 0 <= sample < self.batch:
            raise QueryError(f"sample {sample!r} is out of range: the batch has {self.batch}")
        variables = [self.graph.variable(layer) for layer in layers]
        upstream = {variable: self.graph.upstream(variable) for variable in variables}
        order = in_depth(variables, upstream)
        start = only_sample(self._at(order[0], []), order[0], sample)
        found, total, exact = top_flows(self._forward, start, order, k, beam, memory)
        flows = []
        for chosen, relevance in found:
            by_layer = dict(zip(order, chosen, strict=True))
            flows.append(
                Flow(
                    {name: by_layer[v] for name, v in zip(layers, variables, strict=True)},
                    relevance,
                    relevance / float(total) if float(total) else 0.0,
                )
            )
        return Flows(flows, exact)

    def biases(self) -> dict[str, Tensor]:
        """The share `[batch]` of every bias and every other constant at which walks end.

        NaN where a leaf has no axis for the samples of a batch: explain one sample to see it.
        """
        constants = [v for v in self.graph.leaves if v.kind in ("bias", "constant")]
        arrived = send(self._forward, self._start, dict.fromkeys(constants)) if constants else {}
        nothing = self.output.new_zeros(self.batch)
        shares = {}
        for leaf in constants:
            share = nothing
            if leaf in arrived:
                untold = self.batch > 1 and leaf.batch_axis is None
                share = nothing + torch.nan
                if not untold:
                    share = _finite(per_sample(arrived[leaf], leaf, self.batch)[0])
            shares[leaf.name] = share
        return shares

    def diagnostics(self, tolerance: float = 1e-2) -> Diagnostics:
        """Whether the numbers can be trusted: totals over cuts, cancellation, failing columns."""
        return diagnose(self._forward, self._start, tolerance)

    def proper_form(self) -> ProperForm:
        """The network in layers, with virtual copies, and the relevance of each (appendix A)."""
        return proper_form(self._forward, self._start)

    # -- looking at it ---------------------------------------------------------------------------

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
        return f"Measure({explained}, {len(self.graph.variables)} variables, batch {self.batch})"

    @property
    def _forward(self) -> Pass:
        self._check()
        return self._forward_pass

    # -- the engine behind -----------------------------------------------------------------------

    def _begin(self, normalized: bool) -> Messages:
        return self._start if normalized else self._unnormalized

    def _relevance(
        self, sets: Sequence[NeuronSet | str], within: NeuronSet | str | None, normalized: bool
    ) -> Tensor:
        """`[batch]`: the sum over the walks that pass all sets (eqs. 25, 27)."""
        forward = self._forward
        stops = [resolve(as_set(chosen), forward) for chosen in sets]
        open_to = resolve(as_set(within), forward) if within is not None else {}
        ends: Stops | None = None
        if not normalized or open_to:
            # Columns do not sum to one, or some walks are cut off: follow all to their ends.
            ends = dict.fromkeys(self.graph.leaves)
        start = self._begin(normalized)
        messages = joint_messages(forward, start, stops, normalized, open_to, ends)
        total = self.output.new_zeros(self.batch)
        for variable, message in messages.items():
            total = total + per_sample(message, variable, self.batch)[0]
        return _finite(total)

    def _at(
        self,
        variable: Variable,
        sets: Sequence[NeuronSet | str],
        within: NeuronSet | str | None = None,
        normalized: bool = True,
    ) -> Tensor:
        """`[1, *shape]`: the message at a variable of the walks that passed `sets` above it."""
        forward = self._forward
        stops = [resolve(as_set(chosen), forward) for chosen in sets]
        open_to = resolve(as_set(within), forward) if within is not None else {}
        below = self.graph.upstream(variable)
        lower = [v.name for chosen in (*stops, open_to) for v in chosen if v in below]
        if lower:
            raise QueryError(
                f"{lower[0]!r} lies between {variable.name!r} and the inputs, and neurons are "
                "only given jointly with sets above or beside them. Ask for the relevance of "
                "each set of neurons by itself, R(neurons, set)."
            )
        if not normalized and not variable.is_leaf:
            raise QueryError(
                "unnormalised relevance of single neurons is only given where walks end, at the "
                "inputs; ask R(set, normalized=False) for sets anywhere."
            )
        start = self._begin(normalized)
        ends: Stops = {variable: None}
        arrived = joint_messages(forward, start, stops, normalized, open_to, ends)
        if variable not in arrived:
            return self.output.new_zeros((1, *forward.shape(variable)))
        return _finite(arrived[variable]).contiguous()


def _finite(result: Tensor) -> Tensor:
    if not bool(torch.isfinite(result).all()):
        raise QueryError(
            "relevance overflowed: nearly zero columns amplified it without bound (see "
            "diagnostics()). The Gamma, ZPlus and Flat rules cannot do so."
        )
    return result


def _conditions(given: Given) -> list[NeuronSet | str]:
    if given is None:
        return []
    if isinstance(given, (list, tuple)):
        return list(given)
    return [as_set(given)]  # type: ignore[arg-type] # refuses anything else by name


def _divide(joint: Tensor, known: Tensor) -> Tensor:
    """Conditional relevance, 0 where the condition has none (eq. 11)."""
    return torch.where(known == 0, 0.0, joint / torch.where(known == 0, 1.0, known))


def _against(value: Tensor, tensor: Tensor, variable: Variable) -> Tensor:
    """`[batch]` shaped so that it broadcasts against a variable's tensor."""
    if variable.batch_axis is None:
        return value
    return value.view((-1,) + (1,) * (tensor.dim() - 1 - variable.batch_axis))
