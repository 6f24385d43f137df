"""Capture a model as a flat graph of operators: torch.export first, an eager trace otherwise.

Both work on a shadow of the model (`nrm.capture.tracing`), one at a time in the whole process,
because both change what all of torch shares meanwhile. Both give the same thing, a `Captured`.
Before anyone relies on it, it is proved on the inputs as they are, at their own batch size: the
output's values are the model's, and every value has the shape that the graph says it has.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx import Graph as FxGraph
from torch.fx import Node

from nrm.capture import lengths
from nrm.capture.call import ModelCall, as_rounded, unify, wide, widen
from nrm.capture.expand import expand
from nrm.capture.nodes import Captured, ancestors, carrying, is_symbolic
from nrm.capture.recurrent import StepsAlongBatchError
from nrm.capture.rewrite import (
    ResultsApart,
    collapse,
    collapse_complex,
    fold_constants,
    inline,
    tell_apart,
    write_through,
)
from nrm.capture.run import evaluate
from nrm.capture.shapes import exporting
from nrm.capture.store import Shared
from nrm.capture.tracing import (
    capturing,
    holds_numbers_of,
    restored,
    shadow,
    trace,
)
from nrm.errors import CaptureError, InputError, NrmError
from nrm.operators import functional
from nrm.tensors import not_finite


def capture(
    call: ModelCall,
    batch_axis: int | None,
    exports: bool = True,
    shared: Shared | None = None,
) -> Captured:
    """Capture a model as called.

    Arguments:
        exports: whether torch.export is tried. It takes long to fail, and fails again.
        shared: what other captures of the model left for this one, which adds to it.

    Raises:
        InputError: the model itself refuses the inputs.
        CaptureError: no graph reproduces the model's output.
    """
    shared = shared or Shared()
    with capturing():
        expected = _run_model(call, call.tensors)
        _refuse_not_finite(call, expected)
        try:
            return _capture(call, _shadowed, batch_axis, expected, exports, shared)
        except (CaptureError, TypeError) as failure:
            # Some classes bear no second module; some functions enclose the model itself.
            try:
                return _capture(call, _itself, batch_axis, expected, exports, shared)
            except CaptureError as again:
                _refuse_scripts(call)
                raise again from failure


def _refuse_not_finite(call: ModelCall, output: Tensor) -> None:
    """Refuse an output of which nothing can be said, and say where it is from."""
    if not bool(torch.isfinite(output).all()):
        held = not_finite(call.model)
        raise CaptureError(
            f"the output of {type(call.model).__name__} holds NaN or infinite values for these "
            f"inputs: {held or 'its parameters are finite, so that something overflows'}. Look at "
            "what the model itself returns."
        )


def _refuse_scripts(call: ModelCall) -> None:
    """Say of TorchScript that it is what cannot be captured."""
    for name, module in call.model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"its module {name!r}" if name else "the model"
            raise CaptureError(
                f"{what} is TorchScript, which runs where Python cannot follow it. Explain the "
                "model in Python that it was made from."
            )


Using = Callable[[ModelCall], AbstractContextManager[ModelCall]]
"""What a capture may run; another one each time, since a failed capture leaves its traces in it."""


@contextmanager
def _shadowed(call: ModelCall) -> Iterator[ModelCall]:
    yield shadow(call)


@contextmanager
def _itself(call: ModelCall) -> Iterator[ModelCall]:
    with restored(call):
        yield call


def _capture(
    call: ModelCall,
    using: Using,
    batch_axis: int | None,
    expected: Tensor,
    exports: bool,
    shared: Shared,
) -> Captured:
    name = type(call.model).__name__
    why, detail = "it failed before", None
    if exports:
        try:
            for captured in _exported(call, using, batch_axis, shared):
                with using(call) as once:
                    detail = _unlike(captured, once, expected)
                if detail is None:
                    return captured
        except NrmError:
            raise
        except Exception as failure:  # torch.export raises many kinds
            why = _first_line(failure)
    try:
        with using(call) as once:
            captured = _rewritten(trace_eagerly(once, batch_axis), call.tensors, shared.widened)
    except Exception as failure:
        if detail is None:
            raise CaptureError(
                f"{name} could be captured neither by torch.export ({why}) nor by an eager trace "
                f"({_first_line(failure)})."
            ) from failure
    else:
        detail = _difference(captured, call.tensors, expected)
        if detail is None:
            with using(call) as once:
                _refuse_baked(captured, once)
            return captured
    raise CaptureError(
        f"the captured graph's output of {name} {detail}. The likely causes are a random "
        "operator, or an in-place operator on a view of a tensor that is used again."
    )


def _exported(
    call: ModelCall, using: Using, batch_axis: int | None, shared: Shared
) -> Iterator[Captured]:
    """Exported graphs, the most general first; the next where one fails to be the model."""
    of_any = lengths.family(call, batch_axis)
    kept = shared.of_any_length.get(of_any)
    if kept is not None:
        captured = _at_length(kept, call, shared)
        if captured is not None:
            yield captured
        shared.of_any_length.pop(of_any, None)
    if of_any is not None:
        captured = _of_any_length(call, using, of_any, shared)
        if captured is not None:
            yield captured
            shared.of_any_length.pop(of_any, None)
    for free in (True, False):
        if free and batch_axis is None:
            continue
        with using(call) as once:
            program = _export(once, batch_axis if free else None)
        if program is None:  # the model fixes its batch size
            continue
        try:
            exported = _of_program(program, call, free, batch_axis)
            captured = _rewritten(exported, call.tensors, shared.widened)
        except StepsAlongBatchError:  # not samples, but time
            if not free:
                raise
            continue
        yield captured
        if _Sizes(captured, call.tensors).hold:  # or something relied on writing in place
            with using(call) as once:
                program = _export(once, batch_axis if free else None)
            assert program is not None
            program = program.run_decompositions({})
            exported = _of_program(program, call, free, batch_axis)
            yield _rewritten(exported, call.tensors, shared.widened)


def _of_any_length(
    call: ModelCall, using: Using, of_any: Hashable, shared: Shared
) -> Captured | None:
    """The graph at this length, of an export for any, which is kept; `None`: there is none."""
    with using(call) as once:
        program = _export(once, 0, lengths.AXIS)
    if program is None:
        return None
    exported = _of_program(program, call, True, 0)
    if lengths.is_free(exported):
        inline(exported.graph)
        shared.of_any_length[of_any] = exported
    return _at_length(exported, call, shared)


def _at_length(exported: Captured, call: ModelCall, shared: Shared) -> Captured | None:
    """A graph for any length at that of a call; `None` where it is to be captured for itself."""
    try:
        if lengths.is_free(exported):  # else as good as any other
            exported = lengths.at_length(exported, call.tensors)
        return _rewritten(exported, call.tensors, shared.widened)
    except Exception:  # of many kinds; what is to be refused, the capture for itself refuses
        return None


def _run_model(call: ModelCall, inputs: Sequence[Tensor]) -> Tensor:
    name = type(call.model).__name__
    try:
        with torch.no_grad():
            output: Tensor = call.forward(*inputs)  # hooks on every module are not on ours
    except CaptureError:
        raise
    except Exception as failure:
        shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype)[6:]}" for x in inputs)
        raise InputError(f"{name} fails on inputs {shapes}: {_first_line(failure)}") from failure
    if not output.is_floating_point():
        raise CaptureError(f"{name} returns {output.dtype}, not real numbers.")
    return output


def _export(
    call: ModelCall, batch_axis: int | None, length_axis: int | None = None
) -> ExportedProgram | None:
    """The exported program for any size along some axes; `None` where the model fixes the batch."""
    inputs = tuple(call.tensors)
    if batch_axis is None:
        with ResultsApart(), exporting():
            return export(call, inputs, strict=False)
    # At least two samples, so that export does not take a batch of one for a constant.
    examples = tuple(
        torch.cat([x, x], batch_axis) if x.shape[batch_axis] == 1 else x for x in inputs
    )
    axes = [axis for axis in (batch_axis, length_axis) if axis is not None]
    dynamic = tuple(dict.fromkeys(axes, Dim.AUTO) for _ in examples)
    try:
        with ResultsApart(), exporting():
            program = export(call, examples, dynamic_shapes=(dynamic,), strict=False)
    except Exception:  # of many kinds
        return None
    free = (is_symbolic(node.meta["val"].shape[batch_axis]) for node in _arguments(program))
    return program if all(free) else None


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
    with ResultsApart():
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


def _rewritten(
    captured: Captured,
    inputs: Sequence[Tensor],
    copies: MutableMapping[Any, Tensor] | None = None,
) -> Captured:
    """The graph as rules see it: no writing in place, no operators that hide a network."""
    inline(captured.graph)
    tell_apart(captured.graph)
    widen(captured.graph, captured.constants, copies)
    real = carrying(captured.graph, captured.inputs, captured.names)
    unify(captured.graph, real, ancestors([captured.output]))
    if captured.method == "eager":
        write_through(captured.graph)
    _use_functional_operators(captured.graph)
    collapse(captured.graph)
    expand(captured.graph, real, lambda node: evaluate(captured, inputs, at=node))
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
    """Whether the captured graph is the model at this batch size too."""
    with capturing():
        expected = _run_model(call, call.tensors)
        return _unlike(captured, call, expected) is None


def _unlike(captured: Captured, call: ModelCall, expected: Tensor) -> str | None:
    """How the captured graph differs from the model at this batch size; `None`: by rounding."""
    detail = _difference(captured, call.tensors, expected)
    along = captured.batch_axis
    if detail is not None or not captured.batched or along is None:
        return detail
    if call.tensors[0].shape[along] != 1 or not any(map(torch.is_floating_point, call.tensors)):
        return None
    # For one sample Python may go another way, of which a graph for more says nothing, and which
    # these values may not show: try others.
    others = [x * -2 if x.is_floating_point() else x for x in call.tensors]
    try:
        with torch.no_grad():
            expected = call.forward(*others)
    except Exception:  # it takes no such values
        return None
    return _difference(captured, others, expected) if bool(expected.isfinite().all()) else None


def _difference(captured: Captured, inputs: Sequence[Tensor], expected: Tensor) -> str | None:
    """How the captured graph differs from the model whose output is given; `None`: by rounding."""
    sizes = _Sizes(captured, inputs)

    def seen(node: Node, value: Any) -> Any:
        sizes.compare(node, value)
        return as_rounded(node, value)

    try:
        found: Tensor = evaluate(captured, inputs, change=seen)
    except (RuntimeError, TypeError, ValueError) as failure:
        return f"cannot be computed ({_first_line(failure)})"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, the model's {tuple(expected.shape)}"
    if found.dtype != wide(expected).dtype and not captured.mixed:
        return f"is of {found.dtype}, the model's of {expected.dtype}"
    if not bool(torch.isfinite(expected).all()):
        return "cannot be compared: the model's output holds NaN or infinite values"
    tolerance = 1e-10 if expected.dtype is torch.float64 and not captured.mixed else 1e-4
    tolerance = 3e-2 if captured.rounds else tolerance
    error = float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
    if not error <= tolerance:
        return f"differs from the model's by {error:.2g} of its largest value"
    return sizes.other


class _Sizes:
    """Whether a graph for any batch size is one for the size of these inputs.

    A batch of one may take other ways in Python and in torch (`squeeze`), and a graph is captured
    with more than one.

    Attributes:
        other: what fails to hold.
    """

    def __init__(self, captured: Captured, inputs: Sequence[Tensor]) -> None:
        self.other: str | None = None
        self._known: dict[sympy.Basic, sympy.Integer] = {}
        self._sizes: dict[sympy.Basic, int | None] = {}
        conditions: list[sympy.Basic] = []
        for node, x in zip(captured.inputs, inputs, strict=True):
            for size, actual in zip(node.meta["val"].shape, x.shape, strict=True):
                if is_symbolic(size) and size.node.expr.is_Symbol:
                    self._known[size.node.expr] = sympy.Integer(actual)
                    conditions = [guard.expr for guard in size.node.shape_env.guards]
        decided = dict(lengths.known_length(captured))
        if any(size > 1 for size in self._known.values()):  # those for one were never asked
            decided |= self._known
        for condition in conditions if decided else ():
            if condition.xreplace(decided) == sympy.false:
                self.other = f"holds only where {condition}"

    @property
    def hold(self) -> bool:
        return self.other is None

    def compare(self, node: Node, value: Any) -> None:
        """Note where a value has another shape than the graph says."""
        said = node.meta.get("val")
        if isinstance(value, (tuple, list)) and isinstance(said, (tuple, list)):
            pairs = list(zip(said, value, strict=False))
        else:
            pairs = [(said, value)]
        for one, other in pairs:
            if not isinstance(one, Tensor) or not isinstance(other, Tensor):
                continue
            expected = [self._number(size) for size in one.shape]
            if one.dim() != other.dim() or any(
                size not in (None, actual)
                for size, actual in zip(expected, other.shape, strict=True)
            ):
                self.other = self.other or (
                    f"depends on the batch size: {node.name} has shape {tuple(other.shape)}, "
                    f"in larger batches {tuple(one.shape)}"
                )

    def _number(self, size: int | torch.SymInt) -> int | None:
        """A size at this batch size, where that decides it."""
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        if expression not in self._sizes:
            value = expression.xreplace(self._known)
            self._sizes[expression] = int(value) if value.is_number else None
        return self._sizes[expression]


def _refuse_baked(captured: Captured, call: ModelCall) -> None:
    """Refuse a trace in which something that depends on the input is a constant."""
    if captured.rounds or not holds_numbers_of(
        call.tensors,
        lambda x: call(*x),
        lambda x: evaluate(captured, x, change=as_rounded),
        captured.mixed,
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
