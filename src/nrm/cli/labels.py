"""Names of classes, and the class that `--target` means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nrm.cli.errors import CommandError
from nrm.cli.torchvision_mismatch import import_torchvision
from nrm.io import read_labels, some

TOP = "top1"
_IMAGENET_CLASSES = 1000


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
