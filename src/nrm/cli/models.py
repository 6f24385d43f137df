"""Models by name: `module:factory` and a file of weights."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nrm.cli.errors import CommandError
from nrm.cli.torchvision_mismatch import import_torchvision, is_mismatch
from nrm.io import first_line, load_weights, one_line, some


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
