"""What a command names: a model and its weights, a device, a composite, classes.

Models are `module:factory`, whatever package they are from.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nrm import composites
from nrm.capture.call import Output, choose
from nrm.cli.commands import AUTO, TOP, CommandError, as_text, out_of_memory
from nrm.cli.weights import Read, holds_nan, load_weights
from nrm.composites import Composite
from nrm.errors import CaptureError, InputError, NrmError, first_line, one_line, printable, some
from nrm.io import Say
from nrm.torchvision_mismatch import import_torchvision, is_mismatch

_IMAGENET_CLASSES = 1000
_BOX = "EpsilonGammaBox"


# -- models ----------------------------------------------------------------------------------------


def load_model(spec: str, weights: Path | None, device: torch.device) -> nn.Module:
    """The model in evaluation mode on a device, with the weights of a file (see `loaded`)."""
    return loaded(spec, weights, device)[0]


def loaded(
    spec: str,
    weights: Path | None,
    device: torch.device,
    part: str | None = None,
    say: Say = lambda text: None,
) -> tuple[nn.Module, Read]:
    """The model in evaluation mode on a device, and how its weights were read.

    Arguments:
        spec: `module:factory`; the factory is called without arguments, a module is taken as
            it is.
        weights: a file of them; without it the model keeps those that its factory gives it.
        part: of the file (see `nrm.cli.weights.load_weights`).
    """
    model = build(spec)
    read = Read() if weights is None else load_weights(model, weights, part, say)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise CommandError(
            f"{spec} has parameters with no shape before its first use: {some(lazy)}"
        )
    return model.eval().to(device), read


def build(spec: str) -> nn.Module:
    """What `module:factory` makes."""
    found = find_attribute(spec)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise CommandError(f"{spec} is a {type(found).__name__}, not a model or a factory of one")
    try:
        model = found()
    except Exception as error:  # any code may stand behind a name
        raise CommandError(
            f"{spec} called without arguments fails: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{spec} made a {type(model).__name__}, not a torch.nn.Module")
    return model


def find_attribute(spec: str) -> Any:
    """The object that `module:name` names; the folder that `nrm` runs in is searched last."""
    module_name, colon, attribute = spec.partition(":")
    if not (colon and module_name and attribute):
        raise CommandError(
            f"{spec!r} is not of the form module:name, e.g. torchvision.models:squeezenet1_0"
            f"{_as_module(module_name, attribute or '...')}"
        )
    found: Any = _import(module_name, attribute)
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=4)
            hint = f"; nearest names: {', '.join(near)}" if near else ""
            raise CommandError(f"{module_name} has no {attribute!r}{hint}")
        found = getattr(found, part)
    return found


def _import(name: str, attribute: str) -> ModuleType:
    hint = _as_module(name, attribute)
    if name.startswith("."):  # relative to no package
        raise CommandError(f"{name!r} is not the name of a module{hint}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last: what lies there is in the place of no installed package
    try:
        if name.partition(".")[0] == "torchvision":
            import_torchvision()
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            if not is_mismatch(error):
                raise
            import_torchvision()
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == "torchvision":
            raise CommandError(
                f"{name} needs torchvision, which is not installed: pip install 'nrm[vision]'"
            ) from error
        if name == missing or name.startswith(f"{missing}."):
            raise CommandError(f"there is no module {missing!r} to import{hint}") from error
        raise CommandError(f"{name} cannot be imported: it needs {missing!r}") from error
    except Warning:
        raise  # a warning that the user has made an error
    except Exception as error:  # importing runs any code
        raise CommandError(
            f"{name} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error


def _as_module(name: str, attribute: str) -> str:
    """What to write instead of the path of a Python file, if a name looks like one."""
    path = Path(os.path.normpath(name))
    if path.suffix != ".py" and len(path.parts) < 2:
        return ""
    if path.is_absolute() or ".." in path.parts:
        where = as_text(path.parent)
        return f"; did you mean {path.stem}:{attribute}, with {where} on PYTHONPATH (or run there)?"
    module = ".".join((*path.parts[:-1], path.stem))
    return f"; did you mean {module}:{attribute}? A module is named as Python imports it"


# -- what a model returns --------------------------------------------------------------------------


def output_of(
    model: nn.Module, x: Tensor, wanted: str | None, what: str = "a picture"
) -> tuple[Output, Tensor]:
    """What the model makes of an input, and how an explainer is told which of its outputs.

    Arguments:
        wanted: of several outputs, the name or the index of one, or a path of these with dots
            between.
        what: the input, for messages.

    Raises:
        CommandError: the model fails, or there is no such output, or several and none is wanted.
    """
    try:
        with torch.no_grad():
            result = model(x)
    except Exception as error:  # any code may stand behind a model
        if out_of_memory(error):
            raise
        raise CommandError(
            f"the model fails on {what} of shape {tuple(x.shape)}: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    if isinstance(result, Tensor):
        if wanted is not None:
            raise CommandError("--output has no effect: the model returns one tensor; leave it out")
        return None, result
    found = {".".join(map(str, steps)): (steps, tensor) for steps, tensor in _tensors(result)}
    if wanted is None and len(found) == 1:
        return None, next(iter(found.values()))[1]
    shapes = [f"{printable(name)} {list(t.shape)}" for name, (_, t) in found.items()]
    there = some(shapes, 9) or "no tensor at all"
    if not found:
        raise CommandError(f"the model returns a {type(result).__name__}, and no tensor in it")
    if wanted is None:
        raise CommandError(
            f"the model returns a {type(result).__name__}; choose one tensor of it with --output: "
            f"{there}"
        )
    if wanted in found:
        steps, tensor = found[wanted]
    else:
        steps = steps_of(wanted)
        try:
            tensor = choose(result, steps, "the model")
        except CaptureError as error:
            raise CommandError(f"--output {wanted!r}: there is none; there are: {there}") from error
    return steps[0] if len(steps) == 1 else steps, tensor


def steps_of(output: str) -> tuple[str | int, ...]:
    """The names and indices of an output that is named by a path with dots between."""
    return tuple(int(s) if re.fullmatch(r"-?\d+", s) else s for s in output.split("."))


def _tensors(
    result: Any, steps: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    """Every tensor in what a model returned, and the way to it."""
    if isinstance(result, Tensor):
        yield steps, result
        return
    items: Any = ()
    if isinstance(result, Mapping):
        items = result.items()
    elif isinstance(result, list | tuple):
        items = enumerate(result)
    elif hasattr(result, "__dataclass_fields__"):
        items = ((name, getattr(result, name, None)) for name in result.__dataclass_fields__)
    for key, value in items:
        yield from _tensors(value, (*steps, key))


def classes_of(output: Tensor) -> Tensor:
    """`[classes]`: the output for one picture; one number, where the model gives but one.

    Of a map `[1, classes, *places]`, as segmentation makes, the mean of each class.

    Raises:
        CommandError: it is of another shape.
    """
    if output.numel() == 1 or (output.dim() == 2 and output.shape[0] == 1 and output.numel()):
        return output.reshape(-1)
    if output.dim() > 2 and output.shape[0] == 1 and output.numel():
        return output[0].flatten(1).mean(1)
    raise CommandError(
        "the model's output must be [1, classes] for one picture, or a map [1, classes, height, "
        f"width], not {tuple(output.shape)}"
    )


def refuse_nan(model: nn.Module, output: Tensor) -> None:
    """Refuse an output that is no number for one of them.

    Raises:
        CommandError: weights of the model are none.
        InputError: they are, so that it must be the picture.
    """
    if not bool(output.isnan().any()):
        return
    broken = [name for name, value in model.state_dict().items() if holds_nan(value)]
    if broken:
        raise CommandError(f"the model's output is NaN: there are NaN in {some(broken, 3)}")
    raise InputError("the model's output for this picture holds NaN")


# -- devices and composites ------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """A device that this torch can put numbers on, and get them back from.

    Raises:
        CommandError: there is none of that name, or it holds no values (`meta`).
    """
    try:
        device = torch.device(name)
        back = torch.ones(1).to(device).add(1).cpu()
    except Exception as error:  # each backend fails in its own way
        raise CommandError(f"device {name!r} cannot be used: {first_line(error)}") from error
    if back.tolist() != [2.0]:
        raise CommandError(f"device {name!r} cannot be used: it computes 1 + 1 = {back.tolist()}")
    return device


def find_composite(text: str, bounds: tuple[Tensor, Tensor] | None) -> Composite | None:
    """A composite by its name, with parameters or without; `None`: the one that suits the model.

    Arguments:
        text: in whatever case: one of nrm's own, or of a module that is imported already; and
            its parameters in brackets, numbers or other literals: `GammaFlat(0.1)`,
            `EpsilonGammaFlat(gamma=0.1)`.
        bounds: smallest and largest input, which the box rule needs.

    Raises:
        CommandError: there is none, or it takes other parameters.
    """
    name, given, options = _called(text)
    known = {one.casefold(): one for one in (AUTO, *composites.names())}
    if name.casefold() not in known:
        near = difflib.get_close_matches(name.casefold(), known, n=1)
        hint = f"did you mean {known[near[0]]}? " if near else ""
        raise CommandError(
            f"no composite is called {name!r}; {hint}there are {', '.join(known.values())}"
        )
    chosen = known[name.casefold()]
    if chosen == AUTO:
        if given or options:
            raise CommandError(f"composite {AUTO} takes no parameters; name one that does")
        return None
    make = composites.maker(chosen)
    takes = inspect.signature(make)
    if chosen == _BOX and not given and not {"low", "high"} & options.keys():
        if bounds is None:
            raise CommandError(
                f"{chosen} needs the bounds of the inputs, which are known without --transform "
                f"only: give them, e.g. {chosen}(0, 1)"
            )
        options |= {"low": bounds[0], "high": bounds[1]}
    try:
        takes.bind(*given, **options)
        return make(*given, **options)
    except (TypeError, ValueError, ArithmeticError, NrmError) as error:
        why = first_line(error)
        raise CommandError(
            f"composite {printable(text)} cannot be made: {why}. Parameters: {_parameters(takes)}"
        ) from error


def _called(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """A name, and the literals in brackets after it; nothing in them is run."""
    name, bracket, _ = text.strip().partition("(")
    if not bracket:
        return name.strip(), [], {}
    wrong = CommandError(
        f"composite {text[:80]!r}: give a name, or a name with numbers in brackets, "
        "e.g. GammaFlat(0.1) or EpsilonGammaFlat(gamma=0.1)"
    )
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise wrong
        given = [ast.literal_eval(argument) for argument in call.args]
        options = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise wrong from error
    if len(options) < len(call.keywords):  # **what
        raise wrong
    return call.func.id, given, options


def _parameters(signature: inspect.Signature) -> str:
    """Names of parameters, with their defaults."""
    named = [
        name if one.default is one.empty else f"{name}={one.default!r}"
        for name, one in signature.parameters.items()
    ]
    return ", ".join(named) or "none"


# -- classes ---------------------------------------------------------------------------------------


def known_labels(classes: int) -> list[str] | None:
    """For 1000 classes the names of ImageNet's, if torchvision, which knows them, is there."""
    if classes != _IMAGENET_CLASSES:
        return None
    try:
        weights = import_torchvision().models.SqueezeNet1_0_Weights.IMAGENET1K_V1
    except (ImportError, RuntimeError):
        return None
    return list(weights.meta["categories"])


def find_target(wanted: str, labels: Sequence[str] | None, logits: Tensor) -> int:
    """The class that is meant: `top1`, an index, or a name in whatever case.

    Arguments:
        logits: `[classes]`, the model's output.
    """
    if wanted.casefold() == TOP:
        return int(logits.argmax())
    classes = len(logits)
    if re.fullmatch(r"[+-]?\d+", wanted.strip()):
        index = int(wanted)
        if not 0 <= index < classes:
            raise CommandError(
                f"target {index} is out of range: the model has {classes} outputs "
                f"(0 to {classes - 1})"
            )
        return index
    if labels is None:
        raise CommandError(
            f"target {wanted!r}: the model's classes have no names; give an index, {TOP}, or "
            "names with --labels"
        )
    return _by_name(wanted, labels)


def split_place(wanted: str, places: Sequence[int]) -> tuple[str, tuple[int, ...] | None]:
    """A class, and the place of a map that is named behind it: `15,40,60`.

    Arguments:
        places: how large the map is; empty, where the output is none. Commas belong to the name
            then.

    Raises:
        CommandError: the place lies outside of the map, or the output is no map.
    """
    parts = [part.strip() for part in wanted.split(",")]
    numbers = [part for part in parts[1:] if re.fullmatch(r"[+-]?\d+", part)]
    if not numbers or len(numbers) < len(parts) - 1:
        return wanted, None
    if len(numbers) != len(places):
        shape = f"a map of {' x '.join(map(str, places))}" if places else "[1, classes]"
        names = "class,y,x" if len(places) == 2 else f"the class and {len(places)} coordinates"
        raise CommandError(
            f"target {wanted!r} names {len(numbers)} coordinates, but the model's output is "
            f"{shape}; give {names if places else 'the class alone'}"
        )
    place = tuple(map(int, numbers))
    if not all(0 <= at < size for at, size in zip(place, places, strict=True)):
        raise CommandError(
            f"target {wanted!r} is outside of the map of {' x '.join(map(str, places))}"
        )
    return parts[0], place


def _by_name(wanted: str, labels: Sequence[str]) -> int:
    name = wanted.strip().casefold()
    folded = [label.casefold() for label in labels]
    found = [k for k, label in enumerate(folded) if label == name]
    if not found:  # ImageNet's files list synonyms: "tench, Tinca tinca"
        found = [k for k, label in enumerate(folded) if name in re.split(r"\s*,\s*", label)]
    if len(found) == 1:
        return found[0]
    if found:
        raise CommandError(
            f"target {wanted!r} is ambiguous: {some([f'{labels[k]} ({k})' for k in found])}; "
            "give the index"
        )
    near = [k for k, label in enumerate(folded) if name and name in label]
    for match in difflib.get_close_matches(name, folded, n=5):
        near += [k for k, label in enumerate(folded) if label == match and k not in near]
    hint = f"; nearest names: {some([f'{labels[k]} ({k})' for k in near])}" if near else ""
    raise CommandError(f"no class is called {wanted!r}{hint}")
