"""Importing a torchvision whose compiled operators do not fit the installed torch.

A torchvision built for another torch (a CUDA build beside a torch for CPUs only) cannot load its
compiled operators, and its import fails as soon as it registers something for one of them. The
models need none: declaring the operators, without an implementation, is enough.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

import torch

MISMATCH = (
    "torchvision's compiled operators do not fit the installed torch: its models work, its "
    "detection operators (nms, qnms) do not"
)
_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # declarations last as long as their library does


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its missing operators if that is what it takes.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if not is_mismatch(error) or _declared:
            raise
    # What the failed import left behind would be taken for imported.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in _OPERATORS:
        signature = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(signature)  # type: ignore[no-untyped-call]
    _declared.append(library)
    module = importlib.import_module("torchvision")
    warnings.warn(MISMATCH, RuntimeWarning, stacklevel=2)
    return module


def is_mismatch(error: RuntimeError) -> bool:
    """Whether an import failed for want of one of torchvision's operators."""
    return "torchvision::" in str(error)
