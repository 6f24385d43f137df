"""A model's modules once more around the same tensors, for captures to work on.

`torch.export` and traces put stand-ins in the place of a module's parameters, and hooks on it, and
take them away again: what else runs the model meanwhile, or interrupts, would meet them. They get
the shadow; the model is never touched.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import torch
from torch import nn

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
