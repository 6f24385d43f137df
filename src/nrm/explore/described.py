"""What a page is told when it opens: the model, its inputs as pictures or words, its layers."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from nrm.explore.opened import Input, Opened
from nrm.explore.session import Session


def described(opened: Opened, session: Session) -> dict[str, Any]:
    """As JSON."""
    columns, first = session.columns(0)
    return {
        "model": opened.name,
        "kind": opened.kind,
        "sends": opened.read is not None,
        "inputs": [_input(one) for one in session.inputs()],
        "columns": columns,
        "first": first,
        "labels": list(opened.labels) if opened.labels is not None else None,
        "place": opened.place,
        "axis": opened.axis,
    }


def _input(given: Input) -> dict[str, Any]:
    found: dict[str, Any] = {"name": given.name}
    if given.pixels is not None:
        pixels = np.rint(np.clip(given.pixels, 0, 1) * 255).astype(np.uint8)
        found["pixels"] = base64.b64encode(pixels.tobytes()).decode()
        found["shape"] = list(pixels.shape)
    if given.words:
        found["words"] = list(given.words)
    if given.edges:
        found["edges"] = [list(edge) for edge in given.edges]
    if given.marks:
        found["marks"] = list(given.marks)
    return found
