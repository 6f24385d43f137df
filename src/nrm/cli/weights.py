"""Files of weights, as they are common: what is in them, and under which names.

A checkpoint keeps the state dict among other things (`PARTS`), and names its tensors after what the
model was wrapped in when it was saved (`module.conv.weight`). Both are seen through, and said. A
file fits where every tensor of the model has one in the file and the other way round: what is left
over on either side is refused by name. No code in a file is ever run.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nrm.cli.commands import as_text
from nrm.errors import InputError, first_line, printable, some
from nrm.io import Say

KINDS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".th", ".pth.tar")
"""How the names of files of weights end; all but the first are torch's."""

PARTS = (
    "state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params",
    "ema", "model_ema", "ema_state_dict", "state_dict_ema", "shadow",
)  # fmt: skip
"""Under which a checkpoint keeps the state dict: the first that is there is read."""

_WRAPPERS = ("module.", "model.", "net.", "_orig_mod.")
"""What names begin with that were saved of a wrapper (DataParallel, Lightning, torch.compile)."""

_WITHIN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Wrappers that stand anywhere in a name."""

_MOST_WRAPPERS = 3
_DEEPEST = 3  # a state dict in a checkpoint
_IDLE = "num_batches_tracked"  # of batch norms: read in training only, and unknown to old files
_COUNT = "n_averaged"  # of `torch.optim.swa_utils.AveragedModel`: no weight


@dataclass(frozen=True)
class Read:
    """How the tensors of a file became the model's.

    Attributes:
        part: of the file, with dots between; `None`: all of it.
        names: what was done to the names, in words; `None`: nothing.
    """

    part: str | None = None
    names: str | None = None


def load_weights(
    model: nn.Module, path: Path, part: str | None = None, say: Say = lambda text: None
) -> Read:
    """Load the state dict of a file that fits the model tensor by tensor.

    Arguments:
        part: of the file, with dots between; by default the first of `PARTS` that it has.
        say: is told which part was read, and how its names differ.

    Raises:
        InputError: it cannot be read, or does not fit.
    """
    shown = as_text(path)
    held = read_weights(path)
    part, state, others = _part(held, part, shown)
    own = model.state_dict()
    names, how = _names(list(state), list(own))
    given = {names[name]: value for name, value in state.items()}
    called = {new: old for old, new in names.items()}
    for key in own:  # of an old file, or of an average
        if key.rpartition(".")[2] == _IDLE and key not in given:
            given[key] = own[key]
    if _COUNT not in own and given.get(_COUNT, torch.empty(0)).numel() == 1:
        del given[_COUNT]
    missing = [key for key in own if key not in given]
    unknown = [printable(called[key]) for key in given if key not in own]
    shapes = [
        f"{key} is {tuple(given[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in given and not is_lazy(value) and given[key].shape != value.shape
    ]
    wrong = [
        f"{what}: {some(keys, 3)}"
        for what, keys in (
            ("missing keys", missing),
            ("unknown keys", unknown),
            ("other shapes", shapes),
        )
        if keys
    ]
    if wrong:
        of = f"its part {part!r} " if part else ""
        hint = f" It also holds {some(others)} (--weights-part)." if others else ""
        raise InputError(f"{shown}: {of}does not fit the model. {'; '.join(wrong)}.{hint}")
    broken = [name for name, value in given.items() if holds_nan(value)]
    if broken:
        raise InputError(f"weights {shown}: there are NaN in {some(broken, 3)}")
    model.load_state_dict(given)
    if part or how:
        also = f" (it also holds {some(others)})" if others else ""
        what = f"its part {part!r}{also}" if part else "all of it"
        say(f"weights {shown}: {what}{f', names {how}' if how else ''}")
    return Read(part, how)


def read_weights(path: Path) -> Any:
    """What a file of weights holds; no code in it is run.

    Raises:
        InputError: there is none, or it cannot be read safely.
    """
    import safetensors
    import safetensors.torch

    shown = as_text(path)
    if path.is_dir():
        raise InputError(f"weights {shown}: it is a folder, not a file")
    if not path.is_file():
        raise InputError(f"weights {shown}: no such file")
    if not path.name.lower().endswith(KINDS):
        raise InputError(f"weights {shown}: expected a {', '.join(KINDS[:-1])} or {KINDS[-1]} file")
    if path.suffix.lower() == KINDS[0]:
        try:
            return safetensors.torch.load_file(path)
        except OSError:
            raise
        except Exception as error:  # bytes that are none of safetensors' fail in many ways
            raise InputError(f"weights {shown}: cannot be read: {first_line(error)}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # as bytes do that are none of torch's
        raise InputError(f"weights {shown}: {_unreadable(path, error)}") from error


def _unreadable(path: Path, error: Exception) -> str:
    """Why torch could not read a file, in words."""
    with path.open("rb") as stream:
        begin = stream.read(2)
    if begin != b"PK" and begin[:1] != b"\x80":  # neither an archive nor a pickle
        return "not a file of weights that torch.save wrote"
    said = str(error)
    if isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in said:
        needed = re.search(r"GLOBAL ([\w.]+)", said)
        what = printable(needed[1]) if needed else "more than tensors and plain values"
        return (
            f"not a state dict alone: it holds {what}, which only running code could make. "
            "Where you trust it, save its weights anew: "
            "torch.save(model.state_dict(), 'weights.pt')"
        )
    return f"cannot be read: {printable(first_line(error))}"


# -- which part --------------------------------------------------------------------------------


def _part(
    held: Any, wanted: str | None, shown: str
) -> tuple[str | None, Mapping[str, Tensor], list[str]]:
    """The state dict in a file: where it was, itself, and where others are."""
    found = {".".join(steps): (steps, state) for steps, state in _state_dicts(held)}
    if wanted is not None:
        if wanted not in found:
            there = some([printable(name) for name in found if name]) or "none"
            raise InputError(
                f"weights {shown}: no part {wanted!r} with weights; there are: {there}"
            )
        return wanted, found[wanted][1], [name for name in found if name != wanted]
    if "" in found:
        return None, found[""][1], []
    known = [name for name, (steps, _) in found.items() if set(steps) <= set(PARTS)]
    known.sort(key=lambda name: [PARTS.index(step) for step in found[name][0]])
    if not known and len(found) == 1:
        known = list(found)
    if known:
        return known[0], found[known[0]][1], [printable(n) for n in found if n != known[0]]
    if found:
        listed = some([printable(name) for name in found])
        raise InputError(
            f"weights {shown}: it holds several sets of weights, {listed}: "
            "choose one with --weights-part"
        )
    what = f"a {type(held).__name__}"
    if isinstance(held, Mapping):
        odd = [
            f"{printable(str(key))} is a {type(value).__name__}"
            for key, value in held.items()
            if not isinstance(value, Tensor)
        ]
        what = some(odd, 3) or "it is empty"
    raise InputError(f"weights {shown}: not a state dict (names and their tensors): {what}")


def _state_dicts(
    held: Any, steps: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Tensor]]]:
    """Every mapping of names to nothing but tensors, and where it is."""
    if not isinstance(held, Mapping) or not held:
        return
    if not all(isinstance(key, str) for key in held):
        return  # an optimiser's
    if all(isinstance(value, Tensor) for value in held.values()):
        yield steps, held
    elif len(steps) < _DEEPEST:
        for key, value in held.items():
            yield from _state_dicts(value, (*steps, key))


# -- under which names -----------------------------------------------------------------------------


def _names(given: Sequence[str], own: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """The model's name for each of a file's, and how they differ, in words.

    Of all ways to leave out wrappers of the file, and to put on the model's, that which most names
    fit, the simplest first.
    """
    known = set(own)
    best, fits, how = {name: name for name in given}, -1, None
    for within, wrapper, wrapped in product(
        (False, True), _wrappers(map(_unwrapped, given)), _wrappers(own)
    ):
        found = {}
        for name in given:
            inner = _unwrapped(name) if within else name
            kept = inner.startswith(wrapper)
            found[name] = wrapped + inner.removeprefix(wrapper) if kept else inner
        number = len(known.intersection(found.values()))
        if number > fits and len(set(found.values())) == len(given):
            best, fits = found, number
            inside = [w for w in _WITHIN if within and any(w in name for name in given)]
            without = [repr(w) for w in ([wrapper] if wrapper else []) + inside]
            words = [f"without {' and '.join(without)}"] if without else []
            words += [f"with {wrapped!r} before"] if wrapped else []
            how = ", ".join(words) or None
    return best, how


def _unwrapped(name: str) -> str:
    """A name without the wrappers that may stand anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in _WITHIN)


def _wrappers(names: Iterator[str] | Sequence[str]) -> list[str]:
    """What at least one name begins with that wrappers make, the shortest first."""
    names = list(names)
    found = [""]
    for prefix in found:
        if prefix.count(".") < _MOST_WRAPPERS:
            longer = (prefix + wrapper for wrapper in _WRAPPERS)
            found += [p for p in longer if any(name.startswith(p) for name in names)]
    return found


def holds_nan(value: Tensor) -> bool:
    """Whether a tensor does; infinite numbers are none, and masks hold them."""
    real = value.is_floating_point() and value.element_size() > 1
    return real and bool(torch.isnan(value).any())
