"""What a result was made from: so that it can be told from others, and made again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nrm
from nrm.capture.digest import lasting
from nrm.cli.errors import as_text

_OTHERS = ("torchvision", "numpy", "PIL", "matplotlib")


def weights_used(model: nn.Module, file: Path | None) -> dict[str, Any]:
    """Where a model's weights come from, and which they are.

    Without a file the factory gave them: random ones, or whatever it loaded.

    Returns:
        the file with its SHA-256, and that of the values that were used.
    """
    return {
        "source": "factory" if file is None else "file",
        "file": None if file is None else as_text(file),
        "sha256": None if file is None else file_digest(file),
        "values_sha256": _values_digest(model),
    }


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def versions(spec: str = "") -> dict[str, str]:
    """Of Python, of nrm, and of the packages that had a part in a result.

    Arguments:
        spec: `module:factory`, whose package is one of them.
    """
    found = {
        "python": platform.python_version(),
        "nrm": nrm.__version__,
        "torch": str(torch.__version__),
    }
    for name in (*_OTHERS, spec.partition(":")[0].partition(".")[0]):
        module = sys.modules.get(name)
        version = getattr(module, "__version__", None) or (module and _installed(name))
        if version and name not in found:
            found[name] = str(version)
    return found


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def _values_digest(model: nn.Module) -> str:
    """The SHA-256 of all parameters and buffers, with their names."""
    lines = [
        f"{name} {value.dtype} {tuple(value.shape)} {lasting(value)}\n"
        for name, value in (*model.named_parameters(), *model.named_buffers())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
