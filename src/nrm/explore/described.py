"""What a page is told when it opens: the model, its inputs as pictures or words, its layers."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

from nrm.explore.opened import Input, Opened, Sample
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
        "referenced": list(opened.referenced),
    }


def sample(one: Sample) -> dict[str, Any]:
    """A sample of a data set, with its heatmap as one of an answer."""
    values = np.ascontiguousarray(one.relevance, dtype="<f4")
    heatmap = {"shape": list(values.shape), "values": base64.b64encode(values.tobytes()).decode()}
    return {"name": one.name, "value": one.value, **_pixels(one.pixels), "heatmap": heatmap}


def _pixels(given: npt.NDArray[np.float32]) -> dict[str, Any]:
    pixels = np.rint(np.clip(given, 0, 1) * 255).astype(np.uint8)
    return {"pixels": base64.b64encode(pixels.tobytes()).decode(), "shape": list(pixels.shape)}


def _input(given: Input) -> dict[str, Any]:
    found: dict[str, Any] = {"name": given.name}
    if given.pixels is not None:
        found |= _pixels(given.pixels)
    if given.words:
        found["words"] = list(given.words)
    if given.edges:
        found["edges"] = [list(edge) for edge in given.edges]
    if given.marks:
        found["marks"] = list(given.marks)
    return found
