"""Capture a model as a flat graph of operators: torch.export first, an eager trace otherwise.

Neither changes the model. Both give the same thing, a `Captured`, whose outputs are compared with
the model's own before anyone relies on it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx import Graph as FxGraph
from torch.fx import Node

from nrm.errors import CaptureError, InputError
from nrm.graph.baked import holds_numbers_of
from nrm.graph.blocks import collapse
from nrm.graph.complex_parts import collapse_complex
from nrm.graph.eager import trace
from nrm.graph.expansion import expand
from nrm.graph.folding import fold_constants
from nrm.graph.model_call import ModelCall
from nrm.graph.precision import as_rounded, is_rounded, wide, widen
from nrm.graph.recurrent import StepsAlongBatchError
from nrm.graph.regions import inline
from nrm.graph.variables import is_symbolic
from nrm.operators import functional


@dataclass
class Captured:
    """A model as a flat graph, in single precision where the model's is half (see `precision`).

    Attributes:
        graph: operators only; parameters, buffers and inputs are placeholders.
        inputs: the placeholders of the tensors that the model is called with, in order.
        names: what the inputs are called.
        constants: the parameters, buffers and constants behind the other placeholders, by node.
        output: the node of the explained output.
        method: `"export"`, or `"eager"` for a trace that holds for one input only.
        batched: whether the graph holds for any batch size.
        batch_axis: where the batch lies in every input; `None`: all of it is one sample.
    """

    graph: FxGraph
    inputs: list[Node]
    names: list[str]
    constants: dict[Node, Tensor]
    output: Node
    method: str
    batched: bool
    batch_axis: int | None

    @property
    def reusable(self) -> bool:
        """Whether other inputs of the same shape may use the same graph."""
        return self.method == "export"

    @property
    def rounds(self) -> bool:
        """Whether the model computes anything in half precision."""
        return is_rounded(self.graph)


def capture(call: ModelCall, batch_axis: int | None) -> Captured:
    """Capture a model as called.

    Raises:
        InputError: the model itself refuses the inputs.
        CaptureError: no graph reproduces the model's output.
    """
    expected = _run_model(call, call.tensors)
    name = type(call.model).__name__
    with _by_parts():
        try:
            program, batched = _export(call, batch_axis)
        except Exception as export_failure:  # torch.export raises many kinds
            try:
                captured = _rewritten(trace_eagerly(call, batch_axis))
            except Exception as trace_failure:
                raise CaptureError(
                    f"{name} could be captured neither by torch.export "
                    f"({_first_line(export_failure)}) nor by an eager trace "
                    f"({_first_line(trace_failure)})."
                ) from export_failure
            detail = _difference(captured, call.tensors, expected)
            if detail is None:
                _refuse_baked(captured, call)
        else:
            try:
                captured = _rewritten(_of_program(program, call, batched, batch_axis))
            except StepsAlongBatchError:  # not samples, but time
                program, batched = export(call, tuple(call.tensors), strict=False), False
                captured = _rewritten(_of_program(program, call, batched, batch_axis))
            detail = _difference(captured, call.tensors, expected)
            if detail is not None:  # something relied on writing in place
                program, batched = _export(call, batch_axis)
                program = program.run_decompositions({})
                captured = _rewritten(_of_program(program, call, batched, batch_axis))
                detail = _difference(captured, call.tensors, expected)
    if detail is not None:
        raise CaptureError(
            f"the captured graph's output of {name} {detail}. The likely causes are a random "
            "operator, or an in-place operator on a view of a tensor that is used again."
        )
    return captured


def run(
    captured: Captured,
    inputs: Sequence[Tensor],
    at: Node | None = None,
    change: Callable[[Node, Any], Any] = lambda node, value: value,
) -> Any:
    """The captured model's output, computed plainly.

    Arguments:
        at: another node, whose value is wanted instead.
        change: what takes the place of each node's value from there on.
    """
    at = captured.output if at is None else at
    needed = {at}
    for node in reversed(captured.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    given = dict(zip(captured.inputs, map(wide, inputs), strict=True))
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in captured.graph.nodes:
            if node not in needed:
                continue
            if node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg(
                    (node.args, node.kwargs), lambda leaf: values[leaf]
                )
                value = node.target(*args, **kwargs)
            else:
                value = given[node] if node in given else captured.constants[node]
            values[node] = change(node, value)
    return values[at]


@contextmanager
def _by_parts() -> Iterator[None]:
    """Transformer layers by their parts, not as one fused operator; quietly, without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    symbols = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    disabled = symbols.disabled
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Export warns of attributes that a recurrent layer sets; the outputs are compared.
            warnings.simplefilter("ignore")
            symbols.disabled = True  # it prints whole graphs where export gives up
            yield
    finally:
        symbols.disabled = disabled
        torch.backends.mha.set_fastpath_enabled(before)


def _run_model(call: ModelCall, inputs: Sequence[Tensor]) -> Tensor:
    name = type(call.model).__name__
    try:
        with torch.no_grad():
            output: Tensor = call(*inputs)
    except CaptureError:
        raise
    except Exception as failure:
        shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype)[6:]}" for x in inputs)
        raise InputError(f"{name} fails on inputs {shapes}: {_first_line(failure)}") from failure
    if not output.is_floating_point():
        raise CaptureError(f"{name} returns {output.dtype}, not real numbers.")
    return output


def _export(call: ModelCall, batch_axis: int | None) -> tuple[ExportedProgram, bool]:
    """The exported program, and whether it holds for any batch size."""
    inputs = tuple(call.tensors)
    if batch_axis is not None:
        # At least two samples, so that export does not take a batch of one for a constant.
        examples = tuple(
            torch.cat([x, x], batch_axis) if x.shape[batch_axis] == 1 else x for x in inputs
        )
        try:
            dynamic = tuple({batch_axis: Dim.AUTO} for _ in examples)
            program = export(call, examples, dynamic_shapes=(dynamic,), strict=False)
            if all(is_symbolic(node.meta["val"].shape[batch_axis]) for node in _arguments(program)):
                return program, True
        except Exception:  # the model fixes its batch size: try that
            pass
    return export(call, inputs, strict=False), False


def _arguments(program: ExportedProgram) -> list[Node]:
    nodes = {node.name: node for node in program.graph.nodes}
    return [
        nodes[spec.arg.name]
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    ]


def _of_program(
    program: ExportedProgram, call: ModelCall, batched: bool, batch_axis: int | None
) -> Captured:
    nodes = {node.name: node for node in program.graph.nodes}
    constants: dict[Node, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        node = nodes[spec.arg.name]
        assert spec.target is not None
        holder = program.constants if spec.target in program.constants else program.state_dict
        constants[node] = holder[spec.target].detach()
        node.meta["parameter"] = spec.target.removeprefix(f"{ModelCall.PREFIX}.")
        if spec.kind is InputKind.PARAMETER:
            node.meta["trained"] = True
    return Captured(
        program.graph,
        _arguments(program),
        call.names,
        constants,
        _only_output(program.graph),
        "export",
        batched,
        batch_axis,
    )


def trace_eagerly(call: ModelCall, batch_axis: int | None) -> Captured:
    """An eager trace: right for this input only, because Python may branch on values."""
    traced = trace(call, call.tensors)
    return Captured(
        traced.graph,
        traced.inputs,
        call.names,
        traced.constants,
        _only_output(traced.graph),
        "eager",
        batched=False,
        batch_axis=batch_axis,
    )


def _rewritten(captured: Captured) -> Captured:
    """The graph as rules see it: no writing in place, no operators that hide a network."""
    inline(captured.graph)
    widen(captured.graph, captured.constants)
    _use_functional_operators(captured.graph)
    collapse(captured.graph)
    expand(captured.graph)
    collapse_complex(captured.graph, captured.inputs)
    fold_constants(captured.graph, captured.inputs)
    captured.output = _only_output(captured.graph)
    return captured


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


def reproduces(captured: Captured, call: ModelCall) -> bool:
    """Whether the captured graph gives the model's own output, to rounding."""
    return _difference(captured, call.tensors, _run_model(call, call.tensors)) is None


def _difference(captured: Captured, inputs: Sequence[Tensor], expected: Tensor) -> str | None:
    """How the captured graph's output differs from what is expected; `None`: by rounding."""
    try:
        found: Tensor = run(captured, inputs, change=as_rounded)
    except (RuntimeError, TypeError, ValueError) as failure:
        return f"cannot be computed ({_first_line(failure)})"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, the model's {tuple(expected.shape)}"
    if not bool(torch.isfinite(expected).all()):
        return "cannot be compared: the model's output holds NaN or infinite values"
    tolerance = 1e-10 if expected.dtype is torch.float64 else 1e-4
    tolerance = 3e-2 if captured.rounds else tolerance
    error = float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
    if not error <= tolerance:
        return f"differs from the model's by {error:.2g} of its largest value"
    return None


def _refuse_baked(captured: Captured, call: ModelCall) -> None:
    """Refuse a trace in which something that depends on the input is a constant."""
    if captured.rounds or not holds_numbers_of(
        call.tensors, lambda x: call(*x), lambda x: run(captured, x, change=as_rounded)
    ):
        return
    raise CaptureError(
        f"{type(call.model).__name__} takes numbers out of tensors that depend on the input "
        "(.item(), float(), .tolist(), numpy) and computes with them. They would count as "
        "constants: keep them in tensors."
    )


def _first_line(failure: BaseException) -> str:
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0] if text else 'no message'}"
