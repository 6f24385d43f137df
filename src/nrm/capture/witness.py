"""What a model is at one moment, so that a later change is noticed.

Everything that lies in the model counts: the contents of every parameter, buffer and other tensor
(`nrm.capture.digest`), modules, hooks and forwards by identity and what they enclose, all other
attributes of modules and their classes by value. A Python global that the code reads does not lie
in it.
"""

from __future__ import annotations

import enum
import functools
import itertools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nrm.capture.digest import Digest, contents, place_of

Place = tuple[str, str]
"""A module's path (or a class) and the name of an attribute."""

_WITHOUT_EFFECT = frozenset(
    {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_is_full_backward_hook",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_non_persistent_buffers_set",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
    }
)
"""Attributes of modules that change no output."""

_OF_CLASSES = frozenset(
    {
        "__abstractmethods__",
        "__annotate_func__",
        "__annotations__",
        "__annotations_cache__",
        "__dict__",
        "__doc__",
        "__firstlineno__",
        "__module__",
        "__orig_bases__",
        "__parameters__",
        "__static_attributes__",
        "__weakref__",
        "_abc_impl",
    }
)

_EVERYWHERE = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
)
"""Hooks of all modules."""

_ATOMS = frozenset({str, type(None), bytes, torch.dtype, torch.device})
_NUMBERS = frozenset({int, bool})
_OPAQUE = frozenset({"_thread", "asyncio", "concurrent", "io", "logging", "multiprocessing"})
_OPAQUE_TYPES = (types.ModuleType, type, weakref.ref, torch.Generator)
_DEEP = 8  # objects within objects within attributes
_LONG = 2**12  # of what such objects hold


@dataclass(frozen=True)
class State:
    """A model as it was.

    Attributes:
        parts: what each attribute of each module held.
        tensors: the digests of the tensors among them, by where they lie in memory.
    """

    parts: dict[Place, Any]
    tensors: dict[Any, Digest]
    _held: list[Any] = field(repr=False, compare=False)  # so that no `id` is given twice

    def changes(self, other: State) -> set[Place]:
        """Where the other differs."""
        if self.parts == other.parts:
            return set()
        places = self.parts.keys() | other.parts.keys()
        missing = object()
        return {p for p in places if self.parts.get(p, missing) != other.parts.get(p, missing)}

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the model's."""
        return place_of(tensor) in self.tensors

    def digests(self, tensors: Iterable[Tensor]) -> list[Digest]:
        """The digests of some tensors, of which those of the model are known."""
        tensors = list(tensors)
        unknown = [t for t in tensors if place_of(t) not in self.tensors]
        computed = dict(zip(map(place_of, unknown), contents(unknown), strict=True))
        return [self.tensors.get(place_of(t)) or computed[place_of(t)] for t in tensors]


def state_of(model: nn.Module) -> State:
    """What a model is now."""
    walk = _Walk()
    walk.visit(model)
    digests = contents(walk.tensors)
    for place, digest in zip(walk.owners, digests, strict=True):
        walk.parts[place] = (walk.parts[place], digest)
    byplace_of = dict(zip(map(place_of, walk.tensors), digests, strict=True))
    return State(walk.parts, byplace_of, walk.held)


def written(states: Sequence[State]) -> set[Place]:
    """The places that a model, or a hook on it, writes to at every run.

    Arguments:
        states: the model before, between and after runs on different inputs. What only the first
            run wrote is a cache, and does not count.
    """
    steps = [before.changes(after) for before, after in itertools.pairwise(states)]
    return steps[-1] if all(steps) else set()


class _Walk:
    """Visits every module once, and notes all that lies in it."""

    def __init__(self) -> None:
        self.parts: dict[Place, Any] = {}
        self.tensors: list[Tensor] = []
        self.owners: list[Place] = []  # of the tensors
        self.held: list[Any] = []
        self._place: Place = ("", "")
        self._counts: dict[Place, int] = {}
        self._names: dict[int, Any] = {}  # of what was met before
        self._waiting: deque[tuple[str, nn.Module]] = deque()

    def visit(self, model: nn.Module) -> None:
        self._note(("torch", "default dtype"), torch.get_default_dtype())
        for name in _EVERYWHERE:
            self._note(("torch", name), getattr(torch_modules, name, None))
        self._meet(model, "")
        classes: dict[type, list[str]] = {}
        while self._waiting:
            path, module = self._waiting.popleft()
            for name, value in vars(module).items():
                if name[:1] == "_" and isinstance(value, dict) and not value:
                    continue  # no hooks are none
                if name in _WITHOUT_EFFECT:
                    continue
                if name in ("_modules", "_parameters", "_buffers"):
                    for inner, held in value.items():
                        if isinstance(held, nn.Module):
                            self._meet(held, f"{path}.{inner}" if path else inner)
                        self._note((path, inner), held)
                    self.parts[(path, name)] = tuple(value.keys())  # TorchScript's, too
                else:
                    self._note((path, name), value)
            kind = type(module)
            if kind not in classes:
                classes[kind] = slots(kind)
            for name in classes[kind]:
                self._note((path, name), getattr(module, name, None))
        for kind in dict.fromkeys(base for found in classes for base in found.__mro__):
            if kind not in (nn.Module, object):
                self._class(kind)

    def _class(self, kind: type) -> None:
        self.held.append(kind)
        path = f"{kind.__module__}.{kind.__qualname__} {id(kind)}"
        for name, value in vars(kind).items():
            if name not in _OF_CLASSES:
                self._note((path, name), value)

    def _note(self, place: Place, value: Any) -> None:
        self._place = place
        self.parts[place] = self._of(value, 0)

    def _meet(self, module: nn.Module, path: str) -> Any:
        known = self._names.get(id(module))
        if known is None:
            self.held.append(module)
            known = self._names[id(module)] = ("module", path, id(type(module)), id(module))
            self._waiting.append((path, module))
        return known

    def _of(self, value: Any, depth: int) -> Any:
        """A stand-in for a value, equal to the stand-in of a later look where nothing changed."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind in _NUMBERS:
            return (kind, value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._meet(value, ".".join(filter(None, self._place)))
        if kind in (float, complex) or isinstance(value, np.generic):
            return (kind, repr(value))
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            return self._function(value, depth)
        known = self._names.get(id(value))
        if known is not None:
            return known
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject:
                return (value.shape, self._all(value.flat, depth))
            raw = torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
            return (kind, value.shape, value.dtype.str, self._tensor(raw))
        if isinstance(value, Mapping | list | tuple | AnySet | deque):
            return self._container(value, depth)
        return self._object(value, depth)

    def _tensor(self, tensor: Tensor) -> Any:
        known = self._names.get(id(tensor))
        if known is None:
            if isinstance(tensor, FakeTensor):  # what a capture left with a hook
                return self._by_identity(tensor)
            if is_traceable_wrapper_subclass(tensor):
                inner, _ = tensor.__tensor_flatten__()
                return (type(tensor), tuple(self._tensor(getattr(tensor, name)) for name in inner))
            count = self._counts.get(self._place, 0)
            self._counts[self._place] = count + 1
            self.tensors.append(tensor)
            self.owners.append(self._place)
            known = self._names[id(tensor)] = ("tensor", *self._place, count)
        return known

    def _container(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if depth and len(value) > _LONG:
            return self._by_identity(value, len(value))
        self._names[id(value)] = ("itself",)  # should it hold itself
        try:
            if isinstance(value, Mapping):
                pairs = value.items()
                return (kind, tuple((self._of(k, depth), self._of(v, depth)) for k, v in pairs))
            if isinstance(value, AnySet):
                return (kind, frozenset(self._all(value, depth)))
            return (kind, self._all(value, depth))
        finally:
            del self._names[id(value)]

    def _all(self, values: Iterable[Any], depth: int) -> tuple[Any, ...]:
        return tuple(self._of(value, depth) for value in values)

    def _function(self, function: Any, depth: int) -> Any:
        known = self._names.get(id(function))
        if known is not None:
            return known
        if isinstance(function, types.MethodType):
            return (
                "method",
                self._of(function.__func__, depth),
                self._of(function.__self__, depth),
            )
        if isinstance(function, functools.partial):
            return ("partial", self._all((function.func, function.args, function.keywords), depth))
        name = self._by_identity(function, id(function.__code__))
        self.held.append(function.__code__)
        others = (function.__defaults__, function.__kwdefaults__, vars(function))
        return (*name, self._all((*enclosed(function), *others), depth))

    def _object(self, value: Any, depth: int) -> Any:
        """A stand-in for any other object: which one it is, and what it holds."""
        kind = type(value)
        if isinstance(value, enum.Enum):
            return (id(kind), value.name)
        name = self._by_identity(value)
        opaque = isinstance(value, _OPAQUE_TYPES) or kind.__module__.split(".")[0] in _OPAQUE
        if opaque or depth >= _DEEP:
            return name
        parts = [(k, self._of(v, depth + 1)) for k, v in _attributes(value)]
        return (*name, tuple(parts))

    def _by_identity(self, value: Any, *further: Any) -> Any:
        self.held.append(value)
        known = self._names[id(value)] = (type(value), id(value), *further)
        return known


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for name in slots(type(value)):
        if hasattr(value, name):
            yield name, getattr(value, name)


def slots(kind: type) -> list[str]:
    """Attributes of a class's objects that lie in no `__dict__`, as Python mangles their names."""
    found = []
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if not name.startswith("__"):
                found.append(name)
            elif not name.endswith("__"):
                found.append(f"_{base.__name__.lstrip('_')}{name}")
    return found


def enclosed(function: types.FunctionType) -> list[Any]:
    """What a function encloses; `None` for what is not assigned yet."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            found.append(None)
    return found
