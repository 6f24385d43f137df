"""Capturing by running the model: its shadow, what the process lends for it, and the eager trace.

`torch.export` and traces put stand-ins in the place of a module's parameters, and hooks on it, and
take them away again: what else runs the model meanwhile, or interrupts, would meet them. They get a
shadow, the modules once more around the same tensors; the model is never touched.

Captures run one at a time and silently (`capturing`), since they change torch itself. Where
torch.export refuses a model, `trace` records what one run with real tensors computes; numbers that
Python took out of tensors meanwhile are constants of the trace, which `holds_numbers_of` notices.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from nrm.capture.witness import slots

M = TypeVar("M", bound=nn.Module)

_CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set, frozenset, deque)


def shadow(module: M) -> M:
    """Modules of the same classes and attributes, with the very same tensors.

    What is written while it runs stays with it: containers, hooks and other functions with what
    they enclose, objects that hold modules, are called, or whose methods are hooks, are there once
    more. All else is shared.

    Raises:
        TypeError: a module's class cannot be made without arguments of its own.
    """
    return cast(M, _of(module, {}))


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """All that modules hold is afterwards what it was, whatever happens within."""
    saved = [
        (held, dict(vars(held)), {k: _copied(v) for k, v in vars(held).items() if _is_simple(v)})
        for held in module.modules()
    ]
    try:
        yield
    finally:
        for held, attributes, containers in saved:
            for name, content in containers.items():
                container = attributes[name]
                if isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)
            vars(held).clear()
            vars(held).update(attributes)


def _is_simple(value: Any) -> bool:
    return type(value) in (dict, OrderedDict, list, set)


def _copied(value: Any) -> Any:
    return type(value)(value)


def _of(value: Any, known: dict[int, Any]) -> Any:
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, nn.Module):
        if isinstance(value, torch.jit.ScriptModule):
            return value
        copy = object.__new__(type(value))
        known[id(value)] = copy
        _fill(copy, value, known)
        return copy
    if isinstance(value, types.MethodType):
        owner = value.__self__
        if not isinstance(owner, nn.Module) and _is_plain(owner):
            owner = _object(owner, known)
        return types.MethodType(value.__func__, _of(owner, known))
    if isinstance(value, types.FunctionType):
        return _function(value, known) if value.__closure__ else value
    if type(value) is functools.partial:
        return functools.partial(
            _of(value.func, known), *_of(value.args, known), **_of(value.keywords, known)
        )
    if type(value) in _CONTAINERS:
        return _container(value, known)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_of(item, known) for item in value))
    if _is_plain(value) and (callable(value) or _holds_modules(value)):
        return _object(value, known)
    return value


def _object(value: Any, known: dict[int, Any]) -> Any:
    if id(value) not in known:
        copy = known[id(value)] = object.__new__(type(value))
        _fill(copy, value, known)
    return known[id(value)]


def _fill(copy: Any, value: Any, known: dict[int, Any]) -> None:
    vars(copy).update((name, _of(held, known)) for name, held in vars(value).items())
    for name in slots(type(value)):
        if hasattr(value, name):
            object.__setattr__(copy, name, _of(getattr(value, name), known))


def _function(value: types.FunctionType, known: dict[int, Any]) -> types.FunctionType:
    """The same code around what it enclosed, once more."""
    cells = value.__closure__ or ()
    fresh = [cell for cell in cells if id(cell) not in known]
    known.update((id(cell), types.CellType()) for cell in fresh)
    copy = types.FunctionType(
        value.__code__,
        value.__globals__,
        value.__name__,
        value.__defaults__,
        tuple(known[id(cell)] for cell in cells),
    )
    known[id(value)] = copy
    copy.__kwdefaults__, copy.__qualname__ = value.__kwdefaults__, value.__qualname__
    vars(copy).update(vars(value))
    for cell in fresh:
        with suppress(ValueError):  # not assigned yet
            known[id(cell)].cell_contents = _of(cell.cell_contents, known)
    return copy


def _container(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        copy = value.copy()  # a defaultdict's factory too
        known[id(value)] = copy
        for key, held in value.items():
            copy[key] = _of(held, known)
        return copy
    if isinstance(value, tuple | frozenset):
        return type(value)(_of(item, known) for item in value)
    copy = value.copy()
    known[id(value)] = copy
    copy.clear()
    for item in value:
        copy.add(_of(item, known)) if isinstance(copy, set) else copy.append(_of(item, known))
    return copy


def _is_plain(value: Any) -> bool:
    """Whether an object is all in its attributes."""
    kind = type(value)
    if isinstance(value, type | types.ModuleType | torch.Tensor | nn.Module):
        return False
    made, reduced = (getattr(kind, name) for name in ("__new__", "__reduce_ex__"))
    made_plainly = made is object.__new__ and reduced is object.__reduce_ex__
    return made_plainly and kind.__module__ != "builtins" and hasattr(value, "__dict__")


def _holds_modules(value: Any) -> bool:
    for held in vars(value).values():
        items = held.values() if isinstance(held, dict) else held
        if not isinstance(held, dict | list | tuple | set):
            items = (held,)
        if any(isinstance(getattr(item, "__self__", item), nn.Module) for item in items):
            return True
    return False


# -- one capture at a time -------------------------------------------------------------------------

_CAPTURES = threading.RLock()
"""Of all explainers: torch.export and traces change torch itself while they run."""


@contextmanager
def capturing() -> Iterator[None]:
    """Alone among captures; transformer layers by their parts; quietly, without gradients."""
    with _CAPTURES, ExitStack() as after, torch.no_grad():
        fused = torch.backends.mha.get_fastpath_enabled()
        after.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        after.enter_context(_masks_as_given())
        # Export warns of attributes that a recurrent layer sets; the outputs are compared.
        after.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        after.enter_context(_silent())
        yield


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """Transformers that take a mask as it is, without a look at its values.

    Whether it is a causal one decides which of two ways to the same numbers they go, and export
    cannot follow a decision by values.
    """
    module, name = torch.nn.modules.transformer, "_detect_is_causal_mask"
    before = getattr(module, name, None)
    if before is None:  # an inner function of torch's, which may go
        yield
        return

    def as_given(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    setattr(module, name, as_given)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what torch tells of failing captures, whole graphs among it, by this thread."""
    here = threading.get_ident()

    def is_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    loggers = [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "torch"
    ]
    before = sys.stderr
    quiet = cast(TextIO, _Elsewhere(before, here))
    try:
        for logger in loggers:
            logger.addFilter(is_elsewhere)
        sys.stderr = quiet
        yield
    finally:
        if sys.stderr is quiet:  # or someone else's by now
            sys.stderr = before
        for logger in loggers:
            logger.removeFilter(is_elsewhere)


class _Elsewhere:
    """A stream for all threads but one, whose writing goes nowhere."""

    def __init__(self, stream: TextIO | None, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread or self._stream is None:
            return len(text)
        return self._stream.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# -- the eager trace -----------------------------------------------------------------------------
#
# Python control flow is followed with the values of the one input given, so the trace holds for
# that input only.


@dataclass
class Traced:
    """The flat graph of one eager run; tensors that are not inputs are placeholders too."""

    graph: FxGraph
    inputs: list[Node]
    constants: dict[Node, Tensor]


def _hooks_of_all_modules() -> bool:
    """Whether somebody hooked every module there is; torch before 2.7 has no word for it."""
    held = torch.nn.modules.module
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return any(getattr(held, f"_global_{kind}") for kind in kinds)


def trace(model: nn.Module, inputs: Sequence[Tensor]) -> Traced:
    """Run `model` on `inputs` and record every operator, with the module each ran in."""
    scopes = _Scopes(model)
    # Hooks of all modules are for the user's, of which this is none.
    run = model.forward if _hooks_of_all_modules() else model
    with scopes, torch.no_grad():
        traced = make_fx(
            lambda *arguments: run(*arguments),
            tracing_mode="real",
            pre_dispatch=True,
            _error_on_data_dependent_ops=False,
        )(*inputs)
    names = {
        id(tensor): name
        for source in (model.named_parameters(), model.named_buffers())
        for name, tensor in source
    }
    graph = traced.graph
    constants: dict[Node, Tensor] = {}
    first_call = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "get_attr":
            if node is not first_call:
                first_call.prepend(node)  # constants first, as export has them
            tensor = getattr(traced, node.target)
            node.meta["val"] = tensor
            node.meta["parameter"] = names.get(id(tensor), node.name).removeprefix("model.")
            if isinstance(tensor, nn.Parameter):
                node.meta["trained"] = True
            constants[node] = tensor.detach()
        elif node.op == "call_function":
            node.meta["nn_module_stack"] = scopes.stack_of(node.name)
            if "val" not in node.meta and "tensor_meta" in node.meta:
                node.meta["val"] = node.meta["tensor_meta"]
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    for node, value in zip(arguments, inputs, strict=True):
        node.meta["val"] = value
    return Traced(graph, arguments, constants)


class _Scopes:
    """Notes, by hooks that are gone afterwards, in which module call each node was recorded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: dict[str, int] = {}
        self.open: list[tuple[str, tuple[str, str]]] = []
        self.stacks: dict[str, dict[str, tuple[str, str]]] = {}
        self.seen = 0

    def __enter__(self) -> _Scopes:
        self.hooks = ExitStack()
        for path, module in self.model.named_modules():
            before = module.register_forward_pre_hook(self._entering(path, module))
            after = module.register_forward_hook(self._leaving)
            self.hooks.callback(before.remove)
            self.hooks.callback(after.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self.hooks.close()

    def stack_of(self, node: str) -> dict[str, tuple[str, str]]:
        return self.stacks.get(node, {})

    def _entering(self, path: str, module: nn.Module) -> Any:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"

        def hook(module: nn.Module, arguments: Any) -> None:
            self._note()
            call = self.calls[path] = self.calls.get(path, -1) + 1
            key = path + (f"@{call}" if call else "")
            self.open.append((key, (path, kind)))

        return hook

    def _leaving(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._note()
        self.open.pop()

    def _note(self) -> None:
        """Everything recorded since the last note belongs to the modules open now."""
        mode = get_proxy_mode()
        if mode is None:
            return
        nodes = list(mode.tracer.graph.nodes)
        for node in nodes[self.seen :]:
            self.stacks[node.name] = dict(self.open)
        self.seen = len(nodes)


# -- whether a trace holds numbers that Python computed from the input ---------------------------
#
# `.item()`, `.tolist()` and numpy leave the trace, and what comes back is recorded as a constant. A
# branch that Python took is one too, but small changes of the input do not change it.

_CHANGES = {torch.float64: (1e-3, 1e-6), torch.float32: (1e-2, 1e-3)}
"""How much inputs are changed by, relative to their values."""

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}


def holds_numbers_of(
    inputs: Sequence[Tensor],
    model: Callable[[Sequence[Tensor]], Tensor],
    trace: Callable[[Sequence[Tensor]], Tensor],
    single: bool = False,
) -> bool:
    """Whether a trace follows small changes of its inputs in another way than the model does.

    Where they part as soon as anything changes, and less the smaller the change is.

    Arguments:
        inputs: those of the trace; those that hold no real values stay as they are.
        single: the model computes a part in single precision, whatever the inputs are.
    """
    errors = []
    for place in range(2):
        changed = [_changed(x, place, single) for x in inputs]
        if all(new is old for new, old in zip(changed, inputs, strict=True)):
            return False
        try:
            expected, found = model(changed), trace(changed)
        except Exception:  # any code may stand behind a model; the trace is for other sizes
            return False
        kind = torch.float32 if single else expected.dtype
        if expected.shape != found.shape or kind not in _ROUNDING:
            return False
        size = float(expected.abs().max()) or 1.0
        errors.append(float((expected - found).abs().max()) / size)
        if not errors[-1] > _ROUNDING[kind]:
            return False
    return errors[0] > 3 * errors[1]


def _changed(x: Tensor, place: int, single: bool) -> Tensor:
    """The input with all its values changed a little; zeros stay."""
    if x.dtype not in _CHANGES:
        return x
    seeded = torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=seeded, dtype=x.dtype) * 2 - 1
    by = _CHANGES[torch.float32 if single else x.dtype][place]
    return x * (1 + by * noise.to(x.device))
