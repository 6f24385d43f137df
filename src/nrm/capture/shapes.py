"""What an export is spared: shapes that are known, sizes computed before, notes nobody reads.

Export records a layer as one operator, and computes it with tensors that have shapes alone to learn
what comes out. torch does so as the layer is composed of others: a recurrent layer step by step, a
linear one through products, which with free sizes takes longer than all else. Free sizes are
expressions, and every tensor of a shape has them computed anew. Of each operator, too, export notes
where it was called and how its result lies in memory, and it writes the graph as Python.

Nothing of this changes what is recorded. Where a version of torch does not have what is left out,
it is not.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import _lazy_graph_module
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.sym_node import SymNode

from nrm.capture.recurrent import STEPS

aten = torch.ops.aten

_SIZES = ("add", "sub", "mul", "floordiv", "mod", "eq", "ne", "le", "lt", "ge", "gt")
"""Methods of sizes that are computed once."""


@contextmanager
def exporting() -> Iterator[None]:
    """Export at its quickest; alone among captures."""
    with ExitStack() as during:
        during.enter_context(shapes_at_once())
        during.enter_context(_sizes_once())
        during.enter_context(_without_layouts())
        during.enter_context(_without_stack_traces())
        during.enter_context(_without_python())
        during.enter_context(_without_collections())
        yield


@contextmanager
def shapes_at_once() -> Iterator[None]:
    """Layers, of tensors without values and for this thread, say at once what they give.

    Nothing is left of what they are composed of: only for who records them as operators.
    """
    here = threading.get_ident()
    place = torch._C.DispatchKey.CompositeImplicitAutograd
    missing = object()
    before = {operator: operator.py_kernels.get(place, missing) for operator in _SHAPES}

    def at_once(operator: Any) -> Callable[..., Any]:
        def kernel(x: Tensor, *others: Any, **named: Any) -> Any:
            if threading.get_ident() == here and isinstance(x, FakeTensor):
                found = _SHAPES[operator](x, *others, **named)
                if found is not None:
                    return found
            if before[operator] is missing:
                return operator._op_dk(place, x, *others, **named)
            return before[operator](x, *others, **named)

        return kernel

    try:
        for operator in _SHAPES:
            operator.py_kernels[place] = at_once(operator)
        yield
    finally:
        for operator, itself in before.items():
            if itself is missing:
                del operator.py_kernels[place]
            else:
                operator.py_kernels[place] = itself


@contextmanager
def _sizes_once() -> Iterator[None]:
    """What is computed of sizes, for this thread, is computed once.

    Sizes are expressions, and say the same wherever they are equal. Those that the model itself
    computes are left alone: they are nodes of the graph.
    """
    here = threading.get_ident()
    before = {name: getattr(SymNode, name) for name in _SIZES if hasattr(SymNode, name)}
    recording = getattr(proxy_tensor, "get_proxy_mode", lambda: True)
    recorded = False  # a node of the graph is being made of a size

    def once(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        known: dict[Any, Any] = {}

        def computed(one: Any, other: Any) -> Any:
            nonlocal recorded
            if threading.get_ident() != here or recorded:
                return method(one, other)
            if recording():
                recorded = True
                try:
                    return method(one, other)
                finally:
                    recorded = False
            # Of one export all sizes belong together, and live as long as what is kept here.
            key = (id(one.shape_env), one._expr, one.pytype, other._expr, other.pytype)
            if key not in known:
                known[key] = (method(one, other), one)
            return known[key][0]

        return computed

    try:
        for name, method in before.items():
            setattr(SymNode, name, once(method))
        yield
    finally:
        for name, method in before.items():
            setattr(SymNode, name, method)


@contextmanager
def _without_layouts() -> Iterator[None]:
    """Nodes say what tensor they give (`val`), and not once more how it lies in memory."""
    with _put(proxy_tensor, "_extract_tensor_metadata", lambda value: None):
        yield


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Nothing is noted of where in the model's code an operator was called."""
    with _put(torch.fx.config, "do_not_emit_stack_traces", True):  # of newer versions of torch
        yield


@contextmanager
def _without_python() -> Iterator[None]:
    """A graph is written as Python when it is run as Python, which it is not."""
    with _put(_lazy_graph_module, "_use_lazy_graph_module_flag", True):
        yield


@contextmanager
def _without_collections() -> Iterator[None]:
    """Nothing looks for rings of objects, of which an export makes many, and keeps them all."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _put(holder: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value, where there is one."""
    missing = object()
    before = getattr(holder, name, missing)
    if before is missing:
        yield
        return
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """What `aten.linear` gives; `None` where that is not plain."""
    plain = x.dim() > 1 and weight.dim() == 2 and isinstance(x.shape[-1], int)
    if not plain or x.shape[-1] != weight.shape[1] or x.dtype is not weight.dtype:
        return None
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _recurrent(
    x: Tensor,
    initial: Any,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """What `aten.lstm.input` and the like give."""
    kinds = initial if isinstance(initial, list | tuple) else [initial]
    steps, samples = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    size = (2 if bidirectional else 1) * kinds[0].shape[-1]
    output = x.new_empty((steps, samples, size))
    return (output.transpose(0, 1) if batch_first else output, *map(torch.empty_like, kinds))


_SHAPES: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    **{getattr(aten, name).input: _recurrent for name in STEPS},
}
