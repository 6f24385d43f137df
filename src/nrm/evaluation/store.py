"""A folder of finished samples, so that what was interrupted goes on, for the same settings alone.

Texts tell settings apart, the same in every process: of functions, tensors and models.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from nrm.capture.digest import lasting
from nrm.capture.witness import enclosed
from nrm.errors import InputError
from nrm.formulas import Member
from nrm.io import write_text


def digest(value: Any) -> str:
    """The same for values that are described in the same way."""
    return _hash(described(value).encode())


def described(value: Any, inside: tuple[int, ...] = ()) -> str:
    """What a setting is: the parts that it is made of.

    Tensors are told apart by their values, models by their modules and weights, functions by their
    name, their code and what they enclose; not by the globals that they read. Of what is none of
    these counts what it shows of itself; and of what shows nothing, what it would be pickled with.

    Arguments:
        inside: what is being described around it, by its `id`.
    """
    if id(value) in inside:
        return "itself"
    name, parts = _parts(value)
    within = (*inside, id(value))
    return f"{name}({', '.join(described(part, within) for part in parts)})" if parts else name


def _parts(value: Any) -> tuple[str, Sequence[Any]]:
    """What something is called, and what it consists of."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Tensor):
        return _array(value), ()
    if isinstance(value, np.ndarray):
        return f"array {value.shape} {value.dtype} {_hash(value.tobytes())}", ()
    if isinstance(value, nn.Module):
        weights = [dict(value.named_parameters()), dict(value.named_buffers())]
        return _shown(value), [*weights, *filter(None, map(_settings, value.modules()))]
    if isinstance(value, partial):
        return "partial", [value.func, value.args, value.keywords]
    if isinstance(value, types.FunctionType):
        return f"{value.__module__}.{value.__qualname__}", _function(value)
    if isinstance(value, types.MethodType):
        return "method", [value.__func__, value.__self__]
    if isinstance(value, Member):  # what it holds, not how it is shown
        return "Member", [value.layer, value.select]
    if is_dataclass(value) and not isinstance(value, type):
        return kind, [
            x for field in fields(value) for x in (field.name, getattr(value, field.name))
        ]
    if isinstance(value, Mapping):
        return "map", [x for pair in value.items() for x in pair]
    if isinstance(value, AnySet):
        return f"set {sorted(map(described, value))}", ()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "list", list(value) or [None]
    if type(value).__repr__ is object.__repr__:  # type: ignore[comparison-overlap]
        return kind, [_state(value)]
    return _shown(value), ()


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside its weights and its parts, which are looked at already."""
    beside = {n: x for n, x in vars(module).items() if not n.startswith("_") and n != "training"}
    return {n: x for n, x in beside.items() if not isinstance(x, nn.Module)}


def _state(value: object) -> Any:
    """What an object would be pickled with; nothing, if it cannot be."""
    try:
        return value.__getstate__()
    except Exception:  # any code may be behind it
        return None


def _shown(value: Any) -> str:
    """Without places in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _function(function: types.FunctionType) -> list[Any]:
    settings = [function.__defaults__, function.__kwdefaults__, enclosed(function)]
    return [_code(function.__code__), *settings]


def _code(code: types.CodeType) -> list[Any]:
    """What a function does, without where it was written."""
    constants = [_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [_hash(code.co_code), code.co_names, constants]


def _array(tensor: Tensor) -> str:
    return f"tensor {tuple(tensor.shape)} {tensor.dtype} {lasting(tensor)[:32]}"


def _hash(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:32]


# -- the folder ------------------------------------------------------------------------------------

_SETTINGS = "settings"


class Store:
    """One JSON file for each sample, and one that says of what settings they are.

    A file is there as a whole or not at all, with a digest of what it holds: one that was damaged
    is as if it were not there. Several processes may share a folder.

    Raises:
        InputError: the folder is of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = wanted = json.loads(json.dumps(settings))  # as it comes back
        known = self.read(_SETTINGS)
        if known is None and any(file.suffix == ".json" for file in self.folder.iterdir()):
            raise InputError(
                f"{self.folder} holds samples, and no settings of theirs that can be read. Give "
                "another folder, or delete this one."
            )
        if known is None:
            self.write(_SETTINGS, wanted)
        elif known != wanted:
            raise InputError(
                f"{self.folder} holds an evaluation with other settings: "
                f"{_differences(known, wanted)}. Give another folder, or delete this one."
            )

    def read(self, key: str) -> Any | None:
        """What was written, if anything was, and it is whole."""
        try:
            held = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            return held["value"] if held["digest"] == _digest(held["value"]) else None
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None  # cut off where the machine went down, or not ours

    def write(self, key: str, value: Any) -> None:
        """Keep what was found; what JSON has no word for is a mistake (`ValueError`)."""
        value = json.loads(json.dumps(value, allow_nan=False))  # as it comes back
        held = {"digest": _digest(value), "value": value}
        write_text(self.folder / f"{key}.json", json.dumps(held, indent=1) + "\n")

    def once(self, key: str, find: Callable[[], Any]) -> Any:
        """What was kept, or found now and kept: as JSON gives it back either way."""
        known = self.read(key)
        if known is None:
            self.write(key, find())
            known = self.read(key)
        return known


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    other = [
        f"{name} {_short(known.get(name))} instead of {_short(wanted.get(name))}"
        for name in dict.fromkeys((*known, *wanted))
        if known.get(name) != wanted.get(name)
    ]
    return "; ".join(other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
