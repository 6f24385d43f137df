"""Capture a model as a flat graph of operators: torch.export first, an eager trace otherwise.

Neither changes the model. Both give the same thing, a `Captured`, whose outputs are compared with
the model's own before anyone relies on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.export.graph_signature import InputKind
from torch.fx import Graph as FxGraph
from torch.fx import Node

from nrm.errors import CaptureError, InputError
from nrm.graph.eager import trace
from nrm.graph.folding import fold_batch_norms
from nrm.operators import functional


@dataclass
class Captured:
    """A model as a flat graph.

    Attributes:
        graph: operators only; parameters, buffers and inputs are placeholders.
        inputs: the placeholders of the tensors that the model is called with, in order.
        constants: the parameters, buffers and constants behind the other placeholders, by node.
        output: the node of the model's output.
        method: `"export"`, or `"eager"` for a trace that holds for one input only.
        batched: whether the graph holds for any batch size.
    """

    graph: FxGraph
    inputs: list[Node]
    constants: dict[Node, Tensor]
    output: Node
    method: str
    batched: bool

    @property
    def reusable(self) -> bool:
        """Whether other inputs of the same shape may use the same graph."""
        return self.method == "export"


def capture(model: nn.Module, inputs: Sequence[Tensor]) -> Captured:
    """Capture `model` as called with `inputs`.

    Raises:
        InputError: the model itself refuses the inputs.
        CaptureError: no graph reproduces the model's output.
    """
    expected = _run_model(model, inputs)
    try:
        captured = _export(model, inputs)
    except Exception as export_failure:  # torch.export raises many kinds
        try:
            captured = trace_eagerly(model, inputs)
        except Exception as trace_failure:
            raise CaptureError(
                f"{type(model).__name__} could be captured neither by torch.export "
                f"({_first_line(export_failure)}) nor by an eager trace "
                f"({_first_line(trace_failure)})."
            ) from export_failure
    _use_functional_operators(captured.graph)
    fold_batch_norms(captured.graph)
    _check_reproduces(captured, inputs, expected, type(model).__name__)
    return captured


def run(captured: Captured, inputs: Sequence[Tensor]) -> Tensor:
    """The captured model's output, computed plainly."""
    values: dict[Node, Any] = dict(captured.constants)
    values.update(zip(captured.inputs, inputs, strict=True))
    with torch.no_grad():
        for node in captured.graph.nodes:
            if node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg(
                    (node.args, node.kwargs), lambda leaf: values[leaf]
                )
                values[node] = node.target(*args, **kwargs)
    output: Tensor = values[captured.output]
    return output


def _run_model(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    try:
        with torch.no_grad():
            output = model(*inputs)
    except Exception as failure:
        shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype)[6:]}" for x in inputs)
        raise InputError(
            f"{type(model).__name__} fails on inputs {shapes}: {_first_line(failure)}"
        ) from failure
    if not isinstance(output, Tensor):
        raise CaptureError(
            f"{type(model).__name__} returns a {type(output).__name__}, and nrm explains one "
            "tensor. Wrap the model in a module that returns the tensor to explain."
        )
    if not output.is_floating_point():
        raise CaptureError(f"{type(model).__name__} returns {output.dtype}, not real numbers.")
    return output


def _export(model: nn.Module, inputs: Sequence[Tensor]) -> Captured:
    # Two copies of the batch, so that export does not take a batch of one for a constant.
    examples = tuple(torch.cat([x, x]) if x.dim() else x for x in inputs)
    try:
        return _exported(model, examples, batched=True)
    except Exception:
        return _exported(model, tuple(inputs), batched=False)


def _exported(model: nn.Module, inputs: tuple[Tensor, ...], batched: bool) -> Captured:
    shapes = None
    if batched:
        names = list(inspect.signature(model.forward).parameters.values())
        variadic = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in names[: len(inputs)])
        per_input: tuple[Any, ...] = tuple({0: Dim.AUTO} if x.dim() else None for x in inputs)
        shapes = (per_input,) if variadic else per_input
    program = export(model, inputs, dynamic_shapes=shapes, strict=False)
    nodes = {node.name: node for node in program.graph.nodes}
    arguments: list[Node] = []
    constants: dict[Node, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            arguments.append(node)
        else:
            assert spec.target is not None
            holder = program.constants if spec.target in program.constants else program.state_dict
            constants[node] = holder[spec.target].detach()
            node.meta["parameter"] = spec.target
    output = _only_output(program.graph)
    if batched and not all(
        isinstance(node.meta["val"].shape[0], torch.SymInt)
        for node in arguments
        if node.meta["val"].dim()
    ):
        raise CaptureError("the graph holds for one batch size only")
    return Captured(program.graph, arguments, constants, output, "export", batched)


def trace_eagerly(model: nn.Module, inputs: Sequence[Tensor]) -> Captured:
    """An eager trace: right for this input only, because Python may branch on values."""
    traced = trace(model, inputs)
    return Captured(
        traced.graph,
        traced.inputs,
        traced.constants,
        _only_output(traced.graph),
        "eager",
        batched=False,
    )


def _only_output(graph: FxGraph) -> Node:
    returned = graph.output_node().args[0]
    flat = returned if isinstance(returned, (tuple, list)) else [returned]
    if len(flat) != 1 or not isinstance(flat[0], Node):
        raise CaptureError("the model returns several values, or a constant")
    return flat[0]


def _use_functional_operators(graph: FxGraph) -> None:
    """Replace in-place operators; that nothing relied on the side effect is checked by values."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = functional(node.target)


def reproduces(captured: Captured, model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether the captured graph gives the model's own output, to rounding."""
    return _difference(captured, inputs, _run_model(model, inputs)) is None


def _check_reproduces(
    captured: Captured, inputs: Sequence[Tensor], expected: Tensor, name: str
) -> None:
    detail = _difference(captured, inputs, expected)
    if detail is not None:
        raise CaptureError(
            f"the captured graph's output of {name} {detail}. The likely causes are a random "
            "operator, or an in-place operator on a view of a tensor that is used again."
        )


def _difference(captured: Captured, inputs: Sequence[Tensor], expected: Tensor) -> str | None:
    """How the captured graph's output differs from what is expected; `None`: by rounding."""
    try:
        found = run(captured, inputs)
    except (RuntimeError, TypeError, ValueError) as failure:
        return f"cannot be computed ({_first_line(failure)})"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, the model's {tuple(expected.shape)}"
    if not bool(torch.isfinite(expected).all()):
        return "cannot be compared: the model's output holds NaN or infinite values"
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(expected.dtype, 3e-2)
    error = float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
    if error > tolerance:
        return f"differs from the model's by {error:.2g} of its largest value"
    return None


def _first_line(failure: BaseException) -> str:
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0] if text else 'no message'}"
