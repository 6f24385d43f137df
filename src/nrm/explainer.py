"""From a model to its measures: capture once, explain many inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from nrm.composites import Composite, Everywhere, suggested
from nrm.errors import InputError, QueryError, TargetError
from nrm.graph import (
    Graph,
    ModelCall,
    Output,
    capture,
    check_dense,
    check_nested,
    reproduces,
    wide,
    without_autocast,
)
from nrm.listing import Listing
from nrm.measure import Measure
from nrm.operators import Operator
from nrm.program import Program
from nrm.recipe import Recipe
from nrm.rules import Rule
from nrm.targets import Target, explain_relevance, explain_target


class Explainer:
    """Explains a PyTorch model by the normalized relevance measure.

    The model is captured at the first call and the capture is used again for inputs of the same
    shape, in batches of any size. The model is never changed. When its weights or modules were,
    it is captured again; after a change that leaves no trace on them (a Python attribute that
    the model branches on, a single number written through `.data`), call `refresh()`.

    A model in float16 or bfloat16 takes inputs as ever and is answered in float32, from a copy of
    its weights that takes twice their memory.

    Arguments:
        model: in evaluation mode.
        composite: which rule applies where, or one rule for all. By default
            `composites.GammaFlat(0.25)`, and `composites.CPLRP()` for networks with embeddings,
            normalisation layers or recurrent layers (`composites.suggested`).
        bias: `"drop"`: biases neither emit nor take relevance, and contributions are normalised
            without them. `"input"`: each is a late input neuron of value one, at which walks end.
            By default what the composite assumes.
        strict: refuse to send relevance through a column that violates a positive-sum condition
            (eqs. 15, 16).
        output: which output is explained, where the model returns several: a name (`"logits"`),
            an index, a path of them (`("hidden_states", -1)`), or a function of what the model
            returns that gives a tensor.
        batch_axis: where the samples lie in every input; `None`: all of a call is one sample, as
            for a graph. By default 0, or `None` where the inputs' first axes differ.
        fallback: the row of operators that have none, e.g. `operators.LocalLinear()`; by default
            they are refused.

    Example:
        >>> R = Explainer(model)(image, target=3)
        >>> R.heatmap(), R(nrm.channels("features.28", 12))
        >>> R = Explainer(gpt2, output="logits")(input_ids=ids, target=(-1, token))
        >>> R.tokens()
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | Rule | None = None,
        *,
        bias: Literal["drop", "input"] | None = None,
        strict: bool = False,
        output: Output = None,
        batch_axis: int | Literal["auto"] | None = "auto",
        fallback: Operator | None = None,
    ) -> None:
        if bias not in ("drop", "input", None):
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
        self.composite = composite
        self.bias = bias
        self.strict = strict
        self.output = output
        self.batch_axis = batch_axis
        self.fallback = fallback
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._verified: set[tuple[Any, ...]] = set()
        self._weights: tuple[Any, ...] = ()

    def __call__(
        self,
        *inputs: Any,
        target: Target = None,
        output_relevance: Tensor | None = None,
        **named: Any,
    ) -> Measure:
        """The measure of a batch of inputs.

        Arguments:
            inputs, named: the model's arguments. Real-valued tensors are leaves, where walks end;
                of integer inputs, their embeddings are. Masks (`mask`, `..._mask`) carry none.
            target: the output neuron to explain: one for all samples or one for each, ints for an
                output `[batch, C]`, tuples for more axes (`(position, token)`, where negative
                numbers count from the end). By default each sample's largest output.
            output_relevance: instead of a target, the unnormalised relevance of all outputs,
                shaped like the output (eq. 13): `f(x)` itself, a softmax, a difference of logits.

        Raises:
            InputError, TargetError, CaptureError, UnsupportedOperatorError, PositiveSumError
        """
        with torch.inference_mode(False), without_autocast(self.model):
            call = self._bind(inputs, named)
            forward = self._program(call).run([wide(x) for x in call.tensors])
            if isinstance(output_relevance, Tensor):
                output_relevance = wide(output_relevance).detach().clone()  # callers reuse theirs
            if output_relevance is None:
                explained = explain_target(target, forward, self.strict)
            elif target is None:
                explained = explain_relevance(output_relevance, forward, self.strict)
            else:
                raise TargetError("give either a target or an output_relevance, not both")
            inputs, named = call.arguments(*call.tensors)
            recipe = Recipe(self, inputs, named, explained.target, output_relevance)
            check = partial(_refuse_changed, self.model, self._weights)
            return Measure(forward, explained, check, recipe)

    def layers(self, *inputs: Any, **named: Any) -> Listing:
        """Every addressable variable: its name, operator, shape, channels, and whether a cut."""
        return Listing(self.graph(*inputs, **named))

    def graph(self, *inputs: Any, **named: Any) -> Graph:
        """The graph that these inputs are explained on."""
        with torch.inference_mode(False), without_autocast(self.model):
            return self._program(self._bind(inputs, named)).graph

    def samples(self, *inputs: Any, **named: Any) -> int:
        """How many samples a call with these inputs explains."""
        call = self._bind(inputs, named)
        axis = self._batch_axis(call)
        return 1 if axis is None else call.tensors[0].shape[axis]

    def refresh(self) -> None:
        """Forget the captured model, so that the next call captures it as it is then."""
        self._weights = ()

    # Pickled and copied without its captures, which are made anew where it is used next. A copy
    # shares the model, a deep copy has its own.

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Explainer.__init__(self, state["model"])
        vars(self).update(state)

    def _bind(self, inputs: Sequence[Any], named: dict[str, Any]) -> ModelCall:
        _check_model(self.model)
        check_nested(inputs, named)
        # Copies, because a measure reads its inputs when it is asked, and callers reuse theirs.
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda x: x.detach().clone(), (tuple(inputs), named)
        )
        call = ModelCall(self.model, args, kwargs, self.output)
        _check_inputs(call, self.model)
        return call

    def _program(self, call: ModelCall) -> Program:
        inputs, along = call.tensors, self._batch_axis(call)
        weights = _fingerprint(self.model)
        if weights != self._weights:
            self._programs.clear()
            self._verified.clear()
            self._weights = weights
        samples = 1 if along is None else inputs[0].shape[along]
        shapes = tuple((_without(x.shape, along), x.dtype, x.device) for x in inputs)
        any_batch = (along, *call.key, *shapes)
        this_batch = (samples, *any_batch)
        if this_batch in self._programs:
            return self._programs[this_batch]
        if any_batch in self._programs:
            program = self._programs[any_batch]
            # Python code may have branched on the batch size: compare once for every size.
            if this_batch in self._verified or reproduces(program.graph.captured, call):
                self._verified.add(this_batch)
                return program
        captured = capture(call, along)
        if not captured.batched and samples > 1:
            raise InputError(
                f"{type(self.model).__name__} can only be captured for one batch at a time (its "
                "Python code branches on values, or fixes the batch size), and then samples "
                "cannot be told apart. Explain one sample at a time; or, if all of the call is "
                "one sample (a graph, a sequence), say Explainer(..., batch_axis=None)."
            )
        composite = self.composite or suggested(captured)
        bias = self.bias or composite.bias
        graph = Graph(captured, composite, bias == "input", self.fallback)
        if along is not None and samples > 1:
            _check_samples_are_apart(call, along, captured.rounds)
        program = Program(graph, self.strict)
        if captured.reusable:
            key = this_batch if any_batch in self._programs or not captured.batched else any_batch
            self._programs[key] = program
            self._verified.add(this_batch)
        return program

    def _batch_axis(self, call: ModelCall) -> int | None:
        """Where the batch lies in every input.

        Raises:
            InputError: the inputs do not have the same number of samples there.
        """
        sizes = {x.shape[0] if x.dim() else 1 for x in call.tensors}
        if self.batch_axis == "auto":
            return 0 if len(sizes) == 1 else None
        axis = self.batch_axis
        if axis is None:
            return None
        for name, x in zip(call.names, call.tensors, strict=True):
            if x.dim() <= axis or x.shape[axis] != call.tensors[0].shape[axis]:
                raise InputError(
                    f"input {name!r} {tuple(x.shape)} does not hold as many samples along axis "
                    f"{axis} as {call.names[0]!r} {tuple(call.tensors[0].shape)}"
                )
        return axis


def _check_samples_are_apart(call: ModelCall, axis: int, rounds: bool) -> None:
    """Refuse a batch whose samples depend on each other: its axis is something else.

    Arguments:
        rounds: the model computes in half precision.

    Raises:
        InputError: some samples' output is another beside other samples.
    """
    size = call.tensors[0].shape[axis]
    half = size // 2
    with torch.no_grad():
        output = call(*call.tensors)
        for kept, filled in ((range(half), 0), (range(half, size), size - 1)):
            # The other half becomes copies of one sample that is kept.
            rows = torch.tensor([i if i in kept else filled for i in range(size)])
            other = call(*(x.index_select(axis, rows.to(x.device)) for x in call.tensors))
            keep = torch.tensor(list(kept), device=output.device)
            if not any(
                length == size
                and _alike(
                    output.index_select(place, keep), other.index_select(place, keep), rounds
                )
                for place, length in enumerate(output.shape)
            ):
                raise InputError(
                    f"along axis {axis}, which is taken for the batch, the samples of "
                    f"{type(call.model).__name__} depend on each other: beside others, some have "
                    "another output. Say where the batch is with Explainer(..., batch_axis=1), or "
                    "batch_axis=None if all of a call is one sample (a graph, a sequence)."
                )


def _alike(a: Tensor, b: Tensor, rounds: bool) -> bool:
    tolerance = 3e-2 if rounds else {torch.float64: 1e-9}.get(a.dtype, 1e-4)
    return float((a - b).abs().max()) <= tolerance * (float(a.abs().max()) or 1.0)


def _without(shape: torch.Size, axis: int | None) -> tuple[int, ...]:
    return tuple(size for place, size in enumerate(shape) if place != axis)


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training:
            where = f"its module {name!r}" if name else "it"
            raise InputError(
                f"the model must be in evaluation mode, but {where} is in training mode "
                "(dropout would be random, batch norm would mix samples). Call model.eval()."
            )
        if getattr(module, "max_norm", None) is not None:
            raise InputError(
                f"the embedding {name!r} has max_norm, so that every use changes its weights. "
                "Renormalise them once, and set max_norm to None."
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"parameter {name!r} has no shape yet. Run the model once before explaining it."
            )


def _check_inputs(call: ModelCall, model: nn.Module) -> None:
    if not call.tensors:
        raise InputError("give the model's inputs: none of the arguments is or holds a tensor")
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for name, x in zip(call.names, call.tensors, strict=True):
        what = f"input {name!r}" if len(call.tensors) > 1 else "the input"
        check_dense(x, what)
        if x.dim() == 0 or x.numel() == 0:
            raise InputError(f"{what} has shape {tuple(x.shape)}: there is no sample in it")
        if parameters and x.device not in {p.device for p in parameters}:
            raise InputError(
                f"{what} is on {x.device}, the model on {parameters[0].device}. "
                f"Move one of them, e.g. x.to({str(parameters[0].device)!r})."
            )
        if not x.is_floating_point():
            continue
        if x.element_size() == 1:
            raise InputError(f"{what} is {x.dtype}: convert it to a type that can be added up.")
        if parameters and x.dtype not in {p.dtype for p in parameters}:
            raise InputError(
                f"{what} is {x.dtype} but the model's parameters are {parameters[0].dtype}. "
                f"Convert one of them, e.g. x.to({parameters[0].dtype})."
            )
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{what} holds NaN or infinite values")


class _Place:
    """Where a tensor lies. Sent to another process it moves to shared memory, unchanged."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.pointer = tensor, tensor.data_ptr()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Place):
            return NotImplemented
        return self.pointer == other.pointer or (
            self.tensor is other.tensor and self.tensor.is_shared()  # type: ignore[no-untyped-call]
        )

    __hash__ = None  # type: ignore[assignment]


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
        tuple((_Place(t), None if t.is_inference() else t._version) for t in tensors),
        tuple(torch.stack(samples).tolist()) if samples else (),
    )


def _refuse_changed(model: nn.Module, weights: tuple[Any, ...]) -> None:
    if _fingerprint(model) != weights:
        raise QueryError(
            "the model's weights or modules changed after this measure was made, and it reads "
            "them when it is asked. Call the explainer again."
        )
