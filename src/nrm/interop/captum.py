"""nrm as captum attribution methods: LRP of the inputs and of a layer, jointly with neuron sets.

They take and return what captum's methods do, so its noise tunnel, sensitivity and infidelity work
with them. Relevance is in units of the explained output, as there; `scale="normalized"` makes it
the share of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nrm.composites import Composite
from nrm.condition import Given, Sets, listed
from nrm.errors import InputError, QueryError, TargetError
from nrm.explainer import Explainer
from nrm.explanation import Target
from nrm.formulas import every_neuron
from nrm.graph import Variable
from nrm.measure import Measure
from nrm.methods import Scale, in_units, reading
from nrm.rules import Rule

try:
    from captum.attr import Attribution, LayerAttribution
    from captum.log import log_usage  # captum's methods call what it wraps
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'nrm.interop.captum needs captum: pip install "nrm[captum]"', name=error.name
    ) from error

Inputs = Tensor | tuple[Tensor, ...]


class LRP(Attribution):  # type: ignore[misc] # untyped in some releases
    """LRP, CRP and any other joint or conditional relevance of the inputs.

    Arguments:
        model: a module, in evaluation mode.
        composite: which rule applies where (`nrm.composites`); by default what suits the model.
        bias: `"drop"` or `"input"`; by default what the composite assumes. Only with `"input"`
            the inputs take less than all of the output: the rest is the convergence delta.
        scale: `"normalized"`: shares of the output, instead of its units; `"original"`: LRP as
            captum itself has it, with each rule's own denominator (docs/peers.md).

    Example:
        >>> lrp = LRP(model, nrm.composites.EpsilonPlusFlat())
        >>> lrp.attribute(images, target=3)
        >>> NoiseTunnel(lrp).attribute(images, target=3, nt_samples=10)
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | Rule | None = None,
        *,
        bias: Literal["drop", "input"] | None = None,
        scale: Scale = "logit",
    ) -> None:
        super().__init__(model)
        self.explainer = Explainer(model, composite, bias=bias)
        self.scale = scale

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        *,
        sets: Sets | Sequence[Sets] = (),
        given: Given = None,
    ) -> Inputs | tuple[Inputs, Tensor]:
        """The relevance of every input element.

        Arguments:
            inputs: a tensor or a tuple of them; samples along the first axis.
            target: as for captum's methods; `None` only where the model has one output.
            additional_forward_args: further arguments of the model. Those with real values carry
                relevance too, which is not returned.
            return_convergence_delta: also what the output exceeds the sum of all attributions by,
                for each sample.
            sets: neuron sets, formulas or layers: only walks that pass them count (CRP, eq. 37).
            given: the same, and divide by their relevance (eq. 11).

        Returns:
            shaped like `inputs`; with the delta `[batch]` if asked for.
        """
        several = isinstance(inputs, tuple)
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        R = _measure(self.explainer, tensors, target, additional_forward_args)
        found = tuple(
            self._relevance(R, place, x, listed(sets), given) for place, x in enumerate(tensors)
        )
        attributions = found if several else found[0]
        if not return_convergence_delta:
            return attributions
        return attributions, self.compute_convergence_delta(attributions, _whole(R, self.scale))

    @property
    def multiplies_by_inputs(self) -> bool:
        """Relevance is what inputs contribute, not how sensitive the output is to them."""
        return True

    def has_convergence_delta(self) -> bool:
        """Whether `attribute` can say what the inputs do not take."""
        return True

    def compute_convergence_delta(self, attributions: Inputs, output: Tensor) -> Tensor:
        """The output less the sum of all attributions: `[batch]`."""
        return _delta(attributions, output)

    def _relevance(
        self, R: Measure, place: int, x: Tensor, sets: Sequence[Sets], given: Given
    ) -> Tensor:
        if not x.is_floating_point():
            raise InputError(
                f"input {place} holds integers, which carry no relevance: attribute to the layer "
                "that embeds them, with LayerLRP."
            )
        variable = _input(R, place)
        if variable is None:  # no walk ends there
            return torch.zeros_like(x)
        normalized = reading(self.scale)
        relevance = R.marginal(variable.name, *sets, given=given, normalized=normalized)
        return in_units(R, relevance, self.scale, variable.name)


class LayerLRP(LayerAttribution):  # type: ignore[misc] # untyped in some releases
    """The relevance of every neuron of a layer's output, also jointly with sets (ConRel, CRP).

    Arguments:
        model: a module, in evaluation mode.
        layer: one of its modules, or any address that nrm lists (`Explainer.layers`), such as
            that of a module's second call (`features@1`) or of an operation within one; or a list
            of such, which are attributed to in one run.
        others: as for `LRP`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str | Sequence[nn.Module | str],
        composite: Composite | Rule | None = None,
        *,
        bias: Literal["drop", "input"] | None = None,
        scale: Scale = "logit",
    ) -> None:
        super().__init__(model, layer)
        self.several = not isinstance(layer, nn.Module | str)
        each = layer if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]
        if not each:
            raise QueryError("there is no layer to attribute to: the list is empty.")
        self.addresses = [one if isinstance(one, str) else _address(model, one) for one in each]
        self.explainer = Explainer(model, composite, bias=bias)
        self.scale = scale

    @log_usage()  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        *,
        sets: Sets | Sequence[Sets] = (),
        given: Given = None,
    ) -> Any:
        """The relevance of every neuron of the layer.

        Arguments:
            return_convergence_delta: also what the output exceeds the sum of a layer's
                attributions by, for each sample: what bypasses it, and what biases above it take.
            attribute_to_layer_input: the relevance of what the layer reads, as far as it comes
                through the layer; of several tensors a tuple.
            others: as for `LRP.attribute`.

        Returns:
            shaped like the layer's output (or inputs), a list for a list of layers; with the delta
            `[batch]`, if asked for, of each.
        """
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        R = _measure(self.explainer, tensors, target, additional_forward_args)
        found, deltas = [], []
        for address in self.addresses:
            names = _read_by(R, address) if attribute_to_layer_input else [address]
            parts = []
            for name in names:
                chosen = [*listed(sets)]
                if attribute_to_layer_input:  # straight from the layer, not over another input
                    chosen += [address, *(~every_neuron(other) for other in _above(R, name, names))]
                normalized = reading(self.scale)
                relevance = R.marginal(name, *chosen, given=given, normalized=normalized)
                parts.append(in_units(R, relevance, self.scale, name))
            found.append(tuple(parts) if len(parts) > 1 else parts[0])
            deltas.append(_delta(tuple(parts), _whole(R, self.scale)))
        attributions = found if self.several else found[0]
        if not return_convergence_delta:
            return attributions
        return attributions, (deltas if self.several else deltas[0])

    @property
    def multiplies_by_inputs(self) -> bool:
        """Relevance is what neurons contribute, not how sensitive the output is to them."""
        return True

    def has_convergence_delta(self) -> bool:
        """Whether `attribute` can say what the layer does not take."""
        return True


def _whole(R: Measure, scale: Scale) -> Tensor:
    """`[batch]`: the relevance of all walks, in the units of attributions."""
    return torch.ones_like(R.scale) if scale == "normalized" else R.scale


def _delta(attributions: Inputs, output: Tensor) -> Tensor:
    parts = attributions if isinstance(attributions, tuple) else (attributions,)
    return output - torch.stack([part.flatten(1).sum(1) for part in parts]).sum(0)


def _above(R: Measure, name: str, names: Sequence[str]) -> list[str]:
    """Which of some variables lie between the output and another."""
    variable = R.graph.variable(name)
    return [one for one in names if variable in R.graph.upstream(R.graph.variable(one))]


def _read_by(R: Measure, address: str) -> list[str]:
    """The names of the variables that a module reads, or an operation, of those with relevance.

    Raises:
        QueryError: it reads none.
    """
    module, _, call = address.partition("@")
    within = (f"{module}.", f"{module}:")

    def belongs(name: str) -> bool:
        return name == address or (name.startswith(within) and name.partition("@")[2] == call)

    R.graph.variable(address)  # refused where it does not exist
    inside = [operation for operation in R.graph.operations if belongs(operation.address)]
    written = {operation.output for operation in inside}
    late = {operation.late for operation in inside}
    read = dict.fromkeys(v for operation in inside for v in operation.operands)
    names = [v.name for v in read if v not in written and v not in late]
    if not names:
        raise QueryError(f"{address!r} reads nothing that has relevance; attribute to its output.")
    return names


def _measure(
    explainer: Explainer, inputs: tuple[Tensor, ...], target: Target, additional: Any
) -> Measure:
    for place, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(
                f"captum's methods take a tensor or a tuple of them; input {place} is a "
                f"{type(x).__name__}."
            )
    further = additional if isinstance(additional, tuple) else (additional,)
    arguments = (*inputs, *(() if additional is None else further))
    if isinstance(target, Tensor) and target.numel() == 1:
        target = int(target)  # one for all samples, whatever its shape
    R = explainer(*arguments, target=target)
    _check_target(R, target)
    if target is None and R.output.numel() != R.batch:
        raise TargetError(
            f"the model has outputs {tuple(R.output.shape)} for {R.batch} samples: say which is "
            "explained with target=."
        )
    return R


def _check_target(R: Measure, target: Target) -> None:
    """Refuse what captum reads otherwise than nrm: a tuple is one output of all samples there.

    Raises:
        TargetError: says what the target would have to look like.
    """
    axes = R.output.dim() - 1
    if isinstance(target, tuple):
        fits = len(target) == axes
    elif isinstance(target, list):
        wide = bool(target) and isinstance(target[0], tuple)
        fits = len(target) in (1, R.batch) and (wide or axes == 1)
    elif isinstance(target, Tensor) and target.dim():
        fits = target.shape == (R.batch,) and axes == 1
    else:
        return
    if not fits:
        raise TargetError(
            f"the target {target!r} does not fit {R.batch} samples with outputs "
            f"{tuple(R.output.shape)}: captum takes an int or a tuple of {axes} ints for all "
            "samples, or a list or tensor with one for each."
        )


def _input(R: Measure, place: int) -> Variable | None:
    """The variable of the model's n-th tensor, if walks end there."""
    node = R.graph.captured.inputs[place]
    return next((v for v in R.graph.inputs if v.node is node), None)


def _address(model: nn.Module, layer: nn.Module) -> str:
    for name, module in model.named_modules():
        if module is layer:
            return str(name) or "output"
    raise QueryError(f"the layer {type(layer).__name__} is no module of {type(model).__name__}.")
