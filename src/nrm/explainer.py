"""From a model to its measures: capture once, explain many inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nrm.composites import Composite, GammaFlat
from nrm.errors import InputError, TargetError
from nrm.graph import Graph, capture
from nrm.listing import Listing
from nrm.measure import Measure
from nrm.program import Program
from nrm.targets import Target, explain_relevance, explain_target


class Explainer:
    """Explains a PyTorch model by the normalized relevance measure.

    The model is captured at the first call and the capture is used again for inputs of the same
    shape, in batches of any size. The model is never changed; when its weights were, it is
    captured again.

    Arguments:
        model: in evaluation mode; called with positional tensors, returns one tensor.
        composite: which rule applies where; the default is `composites.GammaFlat(0.25)`.
        bias: `"drop"`: biases neither emit nor take relevance, and contributions are normalised
            without them. `"input"`: each is a late input neuron of value one, at which walks end.
        strict: refuse to send relevance through a column that violates a positive-sum condition
            (eqs. 15, 16).

    Example:
        >>> R = Explainer(model)(image, target=3)
        >>> R.heatmap(), R(nrm.channels("features.28", 12))
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        *,
        bias: Literal["drop", "input"] = "drop",
        strict: bool = False,
    ) -> None:
        if bias not in ("drop", "input"):
            raise ValueError(f"bias is 'drop' or 'input', not {bias!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
        self.model = model
        self.composite = composite or GammaFlat()
        self.bias = bias
        self.strict = strict
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._weights: tuple[Any, ...] = ()

    def __call__(
        self,
        *inputs: Tensor,
        target: Target = None,
        output_relevance: Tensor | None = None,
    ) -> Measure:
        """The measure of a batch of inputs.

        Arguments:
            inputs: the model's positional arguments; the first axis is the batch.
            target: the output neuron to explain: one for all samples or one for each, ints for an
                output `[batch, C]`, tuples for more axes. By default each sample's largest output.
            output_relevance: instead of a target, the unnormalised relevance of all outputs,
                shaped like the output (eq. 13): `f(x)` itself, a softmax, a difference of logits.

        Raises:
            InputError, TargetError, CaptureError, UnsupportedOperatorError, PositiveSumError
        """
        with torch.inference_mode(False):
            forward = self._program(inputs).run(
                [x.detach().clone() if x.is_inference() else x.detach() for x in inputs]
            )
            if output_relevance is None:
                explained = explain_target(target, forward, self.strict)
            elif target is None:
                explained = explain_relevance(output_relevance, forward, self.strict)
            else:
                raise TargetError("give either a target or an output_relevance, not both")
            return Measure(forward, explained)

    def layers(self, *inputs: Tensor) -> Listing:
        """Every addressable variable: its name, operator, shape, channels, and whether a cut."""
        return Listing(self.graph(*inputs))

    def graph(self, *inputs: Tensor) -> Graph:
        """The graph that these inputs are explained on."""
        with torch.inference_mode(False):
            return self._program(inputs).graph

    def _program(self, inputs: Sequence[Tensor]) -> Program:
        _check_model(self.model)
        _check_inputs(inputs, self.model)
        weights = _fingerprint(self.model)
        if weights != self._weights:
            self._programs.clear()
            self._weights = weights
        per_sample_key = tuple((x.shape[1:], x.dtype, x.device) for x in inputs)
        batch = inputs[0].shape[0]
        for key in (per_sample_key, (batch, *per_sample_key)):
            if key in self._programs:
                return self._programs[key]
        captured = capture(self.model, inputs)
        graph = Graph(captured, self.bias == "input")
        program = Program(graph, self.composite, self.strict)
        if captured.reusable:
            self._programs[per_sample_key if captured.batched else (batch, *per_sample_key)] = (
                program
            )
        return program


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training:
            where = f"its module {name!r}" if name else "it"
            raise InputError(
                f"the model must be in evaluation mode, but {where} is in training mode "
                "(dropout would be random, batch norm would mix samples). Call model.eval()."
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"parameter {name!r} has no shape yet. Run the model once before explaining it."
            )


def _check_inputs(inputs: Sequence[Tensor], model: nn.Module) -> None:
    if not inputs:
        raise InputError("give the model's inputs as positional arguments")
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for position, x in enumerate(inputs):
        name = f"input {position}" if len(inputs) > 1 else "the input"
        if not isinstance(x, Tensor):
            raise InputError(f"{name} is a {type(x).__name__}, not a tensor")
        if x.dim() == 0 or x.numel() == 0:
            raise InputError(f"{name} has shape {tuple(x.shape)}: no sample along its first axis")
        if x.shape[0] != inputs[0].shape[0]:
            raise InputError(
                f"{name} holds {x.shape[0]} samples, the first input {inputs[0].shape[0]}"
            )
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise InputError(f"{name} holds NaN or infinite values")
        if parameters and x.is_floating_point():
            if x.dtype not in {p.dtype for p in parameters}:
                raise InputError(
                    f"{name} is {x.dtype} but the model's parameters are {parameters[0].dtype}. "
                    f"Convert one of them, e.g. x.to({parameters[0].dtype})."
                )
            if x.device not in {p.device for p in parameters}:
                raise InputError(
                    f"{name} is on {x.device}, the model on {parameters[0].device}. "
                    f"Move one of them, e.g. x.to({str(parameters[0].device)!r})."
                )
    if not any(x.is_floating_point() for x in inputs):
        raise InputError("no input is real-valued, so none can carry relevance")


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes when any weight does, in place or by replacement."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)
