"""What is explained: a batch of inputs, and the relevance of its output neurons (eqs. 13, 16, 18).

- `explain_target` and `explain_relevance` give the relevance of the output.
- `Explanation` is that with its forward pass: what `Measure` answers queries on.
- A `Recipe` says how a measure was made, which is what is saved of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from nrm.diagnostics import Diagnostics, bias_shares, diagnose, warn_of_output
from nrm.display import Shown, Table, numbers, sizes
from nrm.engine import finite
from nrm.errors import PositiveSumError, QueryError, TargetError
from nrm.graph import Graph
from nrm.prepare import Pass
from nrm.query import Starts
from nrm.targets import Combination
from nrm.tensors import check_dense
from nrm.views import ProperForm, proper_form

_ONE = {0: "0, the only neuron", 1: "an int"}

Target = (
    int | Sequence[int] | Sequence[tuple[int, ...]] | tuple[int, ...] | Tensor | Combination | None
)
"""One output for all samples or one for each; a combination of outputs (`nrm.targets`); `None`:
each sample's largest."""


@dataclass(frozen=True)
class Explained:
    """Output relevance, shaped like the output.

    Attributes:
        relevance: normalised: it sums to one over each sample (eq. 18).
        unnormalized: R~ (eq. 13): for a target, its output and zero elsewhere.
        target: `[batch]` (or `[batch, axes]`); `None` where output relevance was given, or a
            combination of outputs.
        combination: of outputs, where one was explained.
    """

    relevance: Tensor
    unnormalized: Tensor
    target: Tensor | None
    combination: Combination | None = None


def explain_target(target: Target, forward: Pass, strict: bool) -> Explained:
    """One output neuron of each sample, or a combination of them.

    Raises:
        TargetError: there is no such neuron, or its value is not finite; or a combination is zero.
        PositiveSumError: `strict`, and its value is zero or negative.
    """
    if isinstance(target, Combination):
        return _combined(target, forward, strict)
    chosen = _chosen(target, forward)
    index = (torch.arange(forward.batch, device=forward.output.device), *chosen.long().unbind(1))
    values = _by_sample(forward.amount, forward)[index]
    if not bool(torch.isfinite(values).all()):
        raise TargetError(
            f"of the {forward.graph.head or 'output'} the explained one is NaN or infinite for "
            "some sample."
        )
    _refuse_unchanged(values, _by_sample(forward.output, forward)[index], forward)
    if strict and bool((values <= 0).any()):
        raise PositiveSumError(
            "strict: the explained output is zero or negative for some sample (eq. 16). "
            "Explain another output, or drop strict: the relevance is normalised anyway."
        )
    relevance, unnormalized = (torch.zeros_like(forward.output) for _ in range(2))
    _by_sample(relevance, forward)[index] = 1.0
    _by_sample(unnormalized, forward)[index] = values  # others may be infinite
    if not chosen.shape[1]:
        chosen = chosen.new_zeros(len(chosen), 1)
    return Explained(relevance, unnormalized, chosen[:, 0] if chosen.shape[1] == 1 else chosen)


def _combined(target: Combination, forward: Pass, strict: bool) -> Explained:
    """A linear combination of each sample's outputs, explained by its terms."""
    outputs = _by_sample(forward.output, forward)
    if not forward.graph.output.tells_samples(forward.batch):
        raise TargetError(
            f"the output {tuple(forward.output.shape)} does not keep the samples apart"
        )
    weights = target.weights(outputs)
    unnormalized = torch.zeros_like(forward.output)
    terms = _by_sample(unnormalized, forward)
    amounts = _by_sample(forward.amount, forward)
    terms[weights != 0] = (weights * amounts)[weights != 0]  # others may be infinite
    if not bool(torch.isfinite(terms).all()):
        raise TargetError(f"{target} adds up NaN or infinite values.")
    total, size = terms.flatten(1).sum(1), terms.abs().flatten(1).sum(1)
    _refuse_unchanged(total, size, forward)
    if bool((total.abs() <= 1e-6 * size).any()):
        raise TargetError(f"{target} is zero for some sample: nothing to normalise by")
    below = (total < 0).nonzero().flatten().tolist()
    if below and strict:
        raise PositiveSumError(f"strict: {target} is negative for some sample (eq. 16).")
    if below:
        of = f" for sample {below[0]}" if forward.batch > 1 else ""
        forward.cautions.negative(str(target), float(total[below[0]]), of)
    share = unnormalized / forward.graph.output.by_sample(total)
    return Explained(share, unnormalized, None, target)


def _refuse_unchanged(values: Tensor, sizes: Tensor, forward: Pass) -> None:
    """Refuse to share out a difference from the reference that is zero, or nothing but rounding.

    Raises:
        TargetError: it is, for some sample.
    """
    if not forward.graph.differences:
        return
    rounding = 8 * torch.finfo(values.dtype).eps
    same = (values.abs() <= rounding * sizes.abs()).nonzero().flatten().tolist()
    if same:
        of = f" of sample {same[0]}" if forward.batch > 1 else ""
        raise TargetError(
            f"the explained output{of} is the same at the input and at the reference, so there is "
            "no difference to share out. Explain another target, or give another reference."
        )


def explain_relevance(relevance: Tensor, forward: Pass, strict: bool) -> Explained:
    """Output relevance as given, divided by its sum over each sample (eq. 18).

    Raises:
        TargetError: it does not look like the output, or sums to zero over a sample.
        PositiveSumError: `strict`, and it sums to less than zero.
    """
    output, variable = forward.returned, forward.graph.output
    if not isinstance(relevance, Tensor):
        raise TargetError(f"output_relevance is a tensor, not a {type(relevance).__name__}")
    check_dense(relevance, "output_relevance", TargetError)
    if relevance.shape != output.shape or relevance.dtype != output.dtype:
        raise TargetError(
            f"output_relevance has shape {tuple(relevance.shape)} and {relevance.dtype}, the "
            f"output {tuple(output.shape)} and {output.dtype}"
        )
    relevance = relevance.detach().to(forward.output.dtype, copy=True)  # callers reuse theirs
    if not bool(torch.isfinite(relevance).all()):
        raise TargetError("output_relevance holds NaN or infinite values")
    if forward.graph.differences and bool((relevance != 0)[forward.amount == 0].any()):
        raise TargetError(
            "output_relevance is not zero at outputs that are the same at the input and at the "
            "reference, where there is no difference to share out."
        )
    total = variable.per_sample(relevance.unsqueeze(0), forward.batch)[0]
    size = variable.per_sample(relevance.abs().unsqueeze(0), forward.batch)[0]
    if bool((total.abs() <= 1e-6 * size).any()) or bool((size == 0).any()):
        raise TargetError("output_relevance sums to zero for some sample: nothing to normalise by")
    if strict and bool((total <= 0).any()):
        raise PositiveSumError("strict: output_relevance sums to less than zero (eq. 16)")
    return Explained(relevance / variable.by_sample(total), relevance, None)


def _by_sample(output: Tensor, forward: Pass) -> Tensor:
    """A tensor shaped like the output as `[batch, *neurons]`, in the same memory."""
    return forward.graph.output.canonical(output.unsqueeze(0))[0]


def _chosen(target: Target, forward: Pass) -> Tensor:
    """`[batch, axes]`, the index of each sample's explained neuron."""
    output, batch = forward.returned, forward.batch
    if not forward.graph.output.tells_samples(batch):
        raise TargetError(f"the output {tuple(output.shape)} does not keep the samples apart")
    # Masked logits are infinite: behind a head that is looked through, others may be explained.
    masked = forward.graph.head is not None and not bool(output.isnan().any())
    if not masked and not bool(torch.isfinite(output).all()):
        raise TargetError("the model's output holds NaN or infinite values")
    neurons = _by_sample(output, forward).shape[1:]
    if target is None:
        return _largest(forward)
    try:
        wanted = torch.as_tensor(target, device=output.device).to_dense()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TargetError(f"a target is an int, or ints for each sample; got {target!r}") from None
    if wanted.is_floating_point() or wanted.is_complex() or wanted.dtype is torch.bool:
        raise TargetError(f"a target is an integer, got {wanted.dtype}")
    if len(neurons) == 0:
        wanted = wanted.reshape(-1)[:, None][:, :0] if bool((wanted == 0).all()) else wanted
    elif len(neurons) == 1 and wanted.dim() < 2:
        wanted = wanted.reshape(-1, 1)
    elif wanted.dim() == 1:
        wanted = wanted.reshape(1, -1)
    if wanted.dim() != 2 or wanted.shape[1] != len(neurons) or wanted.shape[0] not in (1, batch):
        raise TargetError(
            f"the output has neurons of shape {tuple(neurons)} and {batch} samples: a target is "
            f"{_ONE.get(len(neurons), f'a tuple of {len(neurons)} ints')}, or one for each "
            f"sample; got {target!r}."
        )
    for axis, size in enumerate(neurons):
        lowest = -size if len(neurons) > 1 else 0  # positions count from the end, classes do not
        bad = wanted[:, axis][(wanted[:, axis] < lowest) | (wanted[:, axis] >= size)]
        if bad.numel():
            raise TargetError(
                f"target {int(bad[0])} is out of range: the output has {size} neurons "
                f"(0 to {size - 1})" + (f" along axis {axis}." if len(neurons) > 1 else ".")
            )
    sizes = torch.tensor(list(neurons), device=output.device, dtype=wanted.dtype)
    return torch.where(wanted < 0, wanted + sizes, wanted).expand(batch, -1)


def _largest(forward: Pass) -> Tensor:
    """`[batch, axes]`, the index of each sample's largest output."""
    by_sample = _by_sample(forward.returned, forward)
    outputs = by_sample.reshape(forward.batch, -1)
    if forward.graph.head is not None:
        # Of those that a sigmoid has rounded to one, the largest logit.
        behind = _by_sample(forward.output, forward).reshape(forward.batch, -1)
        largest = outputs == outputs.amax(1, keepdim=True)
        outputs = torch.where(largest, behind, -torch.inf)
    places = outputs.argmax(1)
    neurons = by_sample.shape[1:]
    if not neurons:
        return places.new_zeros(forward.batch, 0)
    return torch.stack(torch.unravel_index(places, neurons), 1)


# -- How a measure was made, so that it can be made again.


class Explains(Protocol):
    """What makes measures: an `Explainer`."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The measure of some inputs."""

    def __getstate__(self) -> dict[str, Any]:
        """The settings."""


class Recipe:
    """An explainer and what it was called with.

    Arguments:
        inputs, named: the model's arguments, as they were: nobody else may change them.
        target, output_relevance: what was explained; one of them is `None`.
        reference: what differences were taken from, as it was given.
    """

    def __init__(
        self,
        explainer: Explains,
        inputs: Sequence[Any],
        named: Mapping[str, Any],
        target: Target,
        output_relevance: Tensor | None,
        reference: Any = None,
    ) -> None:
        self.explainer = explainer
        self.call = (tuple(inputs), dict(named), target, output_relevance, reference)
        self._settings = explainer.__getstate__()

    def of(self, target: Target) -> Recipe:
        """The same with another target."""
        other = copy.copy(self)
        inputs, named, _, _, reference = self.call
        other.call = (inputs, named, target, None, reference)
        return other

    def ingredients(self) -> tuple[Any, ...]:
        """The arguments of `made`.

        Raises:
            QueryError: the explainer has other settings by now.
        """
        now = self.explainer.__getstate__()
        for name in now.keys() | self._settings.keys():
            if now.get(name) is not self._settings.get(name):
                raise QueryError(
                    f"the explainer's {name} changed after this measure was made, so that it "
                    "cannot be saved or copied: it would give other numbers. Call the explainer "
                    "again."
                )
        return (self.explainer, *self.call)


def made(
    explainer: Explains,
    inputs: Sequence[Any],
    named: Mapping[str, Any],
    target: Target,
    output_relevance: Tensor | None,
    reference: Any = None,
) -> Any:
    """The measure that was saved, made anew: the model runs forward once."""
    given = {} if reference is None else {"reference": reference}
    return explainer(*inputs, target=target, output_relevance=output_relevance, **given, **named)


# -- one batch explained --------------------------------------------------------------------------


class Explanation(Shown):
    """What a measure is of: the base of `Measure`, which asks it.

    Attributes:
        explained: `"output"`; or what is explained instead, `"logits behind softmax"`, where the
            model's last function is looked through (`Explainer(head=...)`).
    """

    def __init__(
        self,
        forward: Pass,
        explained: Explained,
        recipe: Recipe | None = None,
        strict: bool = False,
    ) -> None:
        self._forward_pass = forward
        self._recipe, self._strict = recipe, strict
        output = forward.graph.output
        self._starts: Starts = {
            True: {output: explained.relevance.unsqueeze(0)},
            False: {output: explained.unnormalized.unsqueeze(0)},
        }
        warn_of_output(forward, explained.relevance, explained.unnormalized)
        self.explained = "output" if forward.graph.head is None else str(forward.graph.head)
        self._target, self._combination = explained.target, explained.combination
        self._scale = output.per_sample(self._starts[False][output], self.batch)[0]

    @property
    def target(self) -> Tensor | None:
        """`[batch]`, the explained output of each sample; `None` where a combination of outputs or
        `output_relevance` was given instead."""
        return None if self._target is None else self._target.clone()

    @property
    def quantity(self) -> str:
        """What is explained, in words: a target, a combination of outputs, or what was given."""
        if self._target is None:
            return "output relevance" if self._combination is None else str(self._combination)
        return f"target {self._target.tolist()}"

    @property
    def output(self) -> Tensor:
        """The model's output."""
        return self._forward_pass.returned.clone()

    @property
    def scale(self) -> Tensor:
        """`[batch]`, the sum of the unnormalised output relevance (eq. 13), for one target its
        logit: multiply a result by it to have it in the logit's units. With a reference it is the
        difference from the logit there."""
        return self._scale.clone()

    def output_weights(self) -> Tensor:
        """With what weight each output neuron is explained, shaped like the explained tensor.

        Raises:
            QueryError: output relevance was given where the output is zero.
        """
        forward = self._forward_pass
        if self._combination is not None:
            weights = torch.zeros_like(forward.output)
            outputs = _by_sample(forward.output, forward)
            _by_sample(weights, forward)[:] = self._combination.weights(outputs)
            return weights
        given = self._starts[False][forward.graph.output][0]
        if bool((given != 0)[forward.amount == 0].any()):
            raise QueryError(
                "output_relevance was given for outputs that are zero, so that it is no multiple "
                "of them. Explain a target."
            )
        return torch.where(given == 0, 0.0, given / forward.amount)

    @property
    def graph(self) -> Graph:
        """The graph that the measure lives on."""
        return self._forward_pass.graph

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self._forward_pass.batch

    def __repr__(self) -> str:
        explained = self.quantity
        if self.graph.head is not None:
            explained += f", {self.explained}"
        if self.graph.differences:
            explained += ", from a reference"
        variables = len(self.graph.variables)
        return f"{type(self).__name__}({explained}, {variables} variables, batch {self.batch})"

    def table(self) -> Table:
        graph, scale = self.graph, self._scale.tolist()
        unit = "R.scale, the explained output" if self._target is not None else "R.scale"
        rows = [
            ("samples", str(self.batch)),
            ("explained", f"{self.explained}, {self.quantity}"),
            (unit, numbers(scale)),
            ("output", sizes(self._forward_pass.returned.shape)),
            *((f"input {v.name!r}", sizes(self._forward_pass.shape(v))) for v in graph.inputs),
            ("layers", f"{len(graph.variables)}, of which {len(graph.cuts)} are cuts"),
            ("biases", "are inputs" if graph.bias_is_input else "take no relevance"),
            ("rules", repr(graph.specification)),
        ]
        what = "explained output"
        if graph.differences:
            rows.insert(2, ("of it", "its difference from that at the reference"))
            what += "'s difference from the reference"
        note = f"Relevances are shares of the {what}: times R.scale they are in its units."
        return Table("Normalized relevance measure", (), rows, [note])

    @property
    def forward_pass(self) -> Pass:
        """The forward pass that messages travel back through.

        Raises:
            QueryError: the model has changed since; or `torch.autocast` is on, under which messages
                would be rounded.
        """
        return self._forward_pass.as_it_was()

    def of(self, target: Target) -> Self:
        """The measure of another target, on the same forward pass.

        Example:
            >>> R.of(5).heatmap(), R.of(nrm.Contrast(3, 5)).heatmap()
        """
        forward, recipe = self.forward_pass, self._recipe
        explained = explain_target(target, forward, self._strict)
        if recipe is not None:
            recipe = recipe.of(target if explained.target is None else explained.target)
        return type(self)(forward, explained, recipe, self._strict)

    def _starts_of(self, target: Target) -> Starts:
        """The messages at the output of another target."""
        return self.of(target)._starts

    def activations(self, layer: str) -> Tensor:
        """The values of a layer's neurons, shaped like the layer, batch axis included."""
        return self.forward_pass.value(self.graph.variable(layer)).clone()

    def biases(self) -> dict[str, Tensor]:
        """The share `[batch]` of every bias and every other constant at which walks end."""
        shares = bias_shares(self.forward_pass, self._starts[True])
        for share in shares.values():
            finite(share)
        return shares

    def diagnostics(self, tolerance: float = 1e-2) -> Diagnostics:
        """Whether the numbers can be trusted: totals over cuts, cancellation, failing columns.

        Arguments:
            tolerance: columns count as nearly zero where `|sum T~| < tolerance * sum |T~|`.
        """
        return diagnose(self.forward_pass, self._starts[True], tolerance)

    def proper_form(self) -> ProperForm:
        """The network in layers, with virtual copies, and the relevance of each (appendix A)."""
        return proper_form(self.forward_pass, self._starts[True])

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
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
        self._forward_pass.as_it_was()
        return made, self._recipe.ingredients()

    def __copy__(self) -> Self:
        """Another one on the same forward pass."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied
