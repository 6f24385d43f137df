"""From a model to its measures: capture once, explain many inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nrm.composites import Composite, Everywhere, GammaFlat
from nrm.errors import InputError, QueryError, TargetError
from nrm.graph import Graph, capture, reproduces
from nrm.listing import Listing
from nrm.measure import Measure
from nrm.program import Program
from nrm.rules import Rule
from nrm.targets import Target, explain_relevance, explain_target


class Explainer:
    """Explains a PyTorch model by the normalized relevance measure.

    The model is captured at the first call and the capture is used again for inputs of the same
    shape, in batches of any size. The model is never changed. When its weights or modules were,
    it is captured again; after a change that leaves no trace on them (a Python attribute that
    the model branches on, a single number written through `.data`), call `refresh()`.

    Arguments:
        model: in evaluation mode; called with positional tensors, returns one tensor.
        composite: which rule applies where, or one rule for all; the default is
            `composites.GammaFlat(0.25)`.
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
        composite: Composite | Rule | None = None,
        *,
        bias: Literal["drop", "input"] = "drop",
        strict: bool = False,
    ) -> None:
        if bias not in ("drop", "input"):
            raise ValueError(f"bias is 'drop' or 'input', not {bias!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
        self.model = model
        if isinstance(composite, Rule):
            composite = Everywhere(composite)
        if not isinstance(composite, Composite | None):
            raise TypeError(
                f"the composite must be a nrm.composites.Composite or a rule, not {composite!r}"
            )
        self.composite = composite or GammaFlat()
        self.bias = bias
        self.strict = strict
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._verified: set[tuple[Any, ...]] = set()
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
            inputs = _own(inputs)
            forward = self._program(inputs).run(inputs)
            if output_relevance is None:
                explained = explain_target(target, forward, self.strict)
            elif target is None:
                explained = explain_relevance(output_relevance, forward, self.strict)
            else:
                raise TargetError("give either a target or an output_relevance, not both")
            return Measure(forward, explained, partial(_refuse_changed, self.model, self._weights))

    def layers(self, *inputs: Tensor) -> Listing:
        """Every addressable variable: its name, operator, shape, channels, and whether a cut."""
        return Listing(self.graph(*inputs))

    def graph(self, *inputs: Tensor) -> Graph:
        """The graph that these inputs are explained on."""
        with torch.inference_mode(False):
            return self._program(_own(inputs)).graph

    def refresh(self) -> None:
        """Forget the captured model, so that the next call captures it as it is then."""
        self._weights = ()

    def _program(self, inputs: Sequence[Tensor]) -> Program:
        _check_model(self.model)
        _check_inputs(inputs, self.model)
        weights = _fingerprint(self.model)
        if weights != self._weights:
            self._programs.clear()
            self._verified.clear()
            self._weights = weights
        any_batch = tuple((x.shape[1:], x.dtype, x.device) for x in inputs)
        this_batch = (inputs[0].shape[0], *any_batch)
        if this_batch in self._programs:
            return self._programs[this_batch]
        if any_batch in self._programs:
            program = self._programs[any_batch]
            # Python code may have branched on the batch size: compare once for every size.
            if this_batch in self._verified or reproduces(
                program.graph.captured, self.model, inputs
            ):
                self._verified.add(this_batch)
                return program
        captured = capture(self.model, inputs)
        if not captured.batched and inputs[0].shape[0] > 1:
            raise InputError(
                f"{type(self.model).__name__} can only be captured for one batch at a time (its "
                "Python code branches on values, or fixes the batch size), and then samples "
                "cannot be told apart. Explain one sample at a time."
            )
        program = Program(Graph(captured, self.bias == "input"), self.composite, self.strict)
        if captured.reusable:
            key = this_batch if any_batch in self._programs or not captured.batched else any_batch
            self._programs[key] = program
            self._verified.add(this_batch)
        return program


def _own(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies, because a measure reads its inputs when it is asked, and callers reuse theirs."""
    return tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in inputs)


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
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise InputError(f"{name} holds NaN or infinite values")
    if not any(x.is_floating_point() for x in inputs):
        raise InputError("no input is real-valued, so none can carry relevance")


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes when a weight does, in place or by replacement, and when a module is replaced."""
    tensors = [*model.parameters(), *model.buffers()]
    # Writes through .data leave no other trace than the values: look at some of each tensor.
    samples = [
        t.detach().reshape(-1)[:: t.numel() // 64 + 1].sum(dtype=torch.float64)
        for t in tensors
        if t.numel()
    ]
    return (
        tuple(map(id, model.modules())),
        tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors),
        tuple(torch.stack(samples).tolist()) if samples else (),
    )


def _refuse_changed(model: nn.Module, weights: tuple[Any, ...]) -> None:
    if _fingerprint(model) != weights:
        raise QueryError(
            "the model's weights or modules changed after this measure was made, and it reads "
            "them when it is asked. Call the explainer again."
        )
