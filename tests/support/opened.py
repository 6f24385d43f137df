"""A model of one input, open in the explorer, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import nrm
from nrm.explore import answers, view
from nrm.explore.opened import Input, Opened
from nrm.measure import Measure


def opens(model: nn.Module, x: Sequence[Tensor], kind: Any, **more: Any) -> tuple[Opened, Measure]:
    """A model with one input, open in the explorer."""
    composite = more.pop("composite", None)
    explainer = nrm.Explainer(model, composite, **more.pop("options", {}))
    opened = Opened("it", kind, explainer, [Input("it", tuple(x), "")], "", **more)
    return opened, opened.measure(opened.inputs[0])


def answered(R: Measure, opened: Opened, **wanted: Any) -> tuple[answers.Columns, list[Any], Any]:
    """Columns and flows of an answer, and what is explained."""
    parts = list(view.answer(R, answers.Request.read(wanted), opened, lambda: None))
    (explained,) = (part for part in parts if isinstance(part, answers.Explained))
    (columns,) = (part for part in parts if isinstance(part, answers.Columns))
    return columns, [part for part in parts if isinstance(part, answers.Flows)], explained


def column(columns: answers.Columns, layer: str) -> answers.Shown:
    return next(one for one in columns.columns if one.layer == layer)
