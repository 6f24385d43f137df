"""What a command names: a model and its weights, a device, a composite, classes.

Models are `module:factory`, whatever package they are from.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nrm import composites
from nrm.cli.commands import AUTO, TOP, CommandError, out_of_memory
from nrm.composites import Composite
from nrm.errors import first_line, one_line, some
from nrm.io import load_weights, read_labels
from nrm.torchvision_mismatch import import_torchvision, is_mismatch

_IMAGENET_CLASSES = 1000
_BOX = "EpsilonGammaBox"


# -- models ----------------------------------------------------------------------------------------


def load_model(spec: str, weights: Path | None, device: torch.device) -> nn.Module:
    """The model in evaluation mode on a device.

    Arguments:
        spec: `module:factory`; the factory is called without arguments, a module is taken as
            it is.
        weights: a state dict as `.safetensors`, `.pt` or `.pth`; without it the model keeps the
            weights that its factory gives it.
    """
    model = build(spec)
    if weights is not None:
        load_weights(model, weights)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise CommandError(
            f"{spec} has parameters with no shape before its first use: {some(lazy)}"
        )
    return model.eval().to(device)


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
        )
    found: Any = _import(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=4)
            hint = f"; nearest names: {', '.join(near)}" if near else ""
            raise CommandError(f"{module_name} has no {attribute!r}{hint}")
        found = getattr(found, part)
    return found


def _import(name: str) -> ModuleType:
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
            raise CommandError(f"there is no module {missing!r} to import") from error
        raise CommandError(f"{name} cannot be imported: it needs {missing!r}") from error
    except Warning:
        raise  # a warning that the user has made an error
    except Exception as error:  # importing runs any code
        raise CommandError(
            f"{name} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """`[classes]`: what the model makes of the picture."""
    try:
        with torch.no_grad():
            output = model(x)
    except Exception as error:  # any code may stand behind a model
        if out_of_memory(error):
            raise
        raise CommandError(
            f"the model fails on a picture of shape {tuple(x.shape)}: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[0] != 1:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CommandError(f"the model's output must be [1, classes] for one picture, not {what}")
    return output[0]


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


def find_composite(name: str, bounds: tuple[Tensor, Tensor] | None) -> Composite | None:
    """A composite with its default parameters; `None` for the one that suits the model.

    Arguments:
        name: in whatever case: one of nrm's own, or of a module that is imported already.
        bounds: smallest and largest input, which the box rule needs.
    """
    known = {one.casefold(): one for one in (AUTO, *composites.names())}
    if name.casefold() not in known:
        near = difflib.get_close_matches(name.casefold(), known, n=1)
        hint = f"did you mean {known[near[0]]}? " if near else ""
        raise CommandError(
            f"no composite is called {name!r}; {hint}there are {', '.join(known.values())}"
        )
    chosen = known[name.casefold()]
    if chosen == AUTO:
        return None
    if chosen == _BOX and bounds is None:
        raise CommandError(
            f"{chosen} needs the bounds of the inputs, which are known without --transform only"
        )
    given = bounds if chosen == _BOX and bounds is not None else ()
    try:
        return composites.by_name(chosen, *given)
    except TypeError as error:
        raise CommandError(
            f"composite {chosen} cannot be made by its name alone: {first_line(error)}"
        ) from error


# -- classes ---------------------------------------------------------------------------------------


def find_labels(path: Path | None, classes: int) -> list[str] | None:
    """The names in a file, or for 1000 classes those of ImageNet that torchvision knows."""
    if path is not None:
        labels = read_labels(path)
        if len(labels) != classes:
            raise CommandError(
                f"labels {path}: {len(labels)} names, but the model has {classes} outputs"
            )
        return labels
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
