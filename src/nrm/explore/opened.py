"""What is open in the explorer: a model, inputs to explain, and the Python that makes them again.

The command line opens models and pictures (`nrm.cli.explore`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nrm.errors import QueryError
from nrm.explainer import Explainer
from nrm.graph import Graph, Variable
from nrm.measure import Measure
from nrm.targets import Contrast

Kind = Literal["picture", "words", "series", "graph"]
"""How an input is shown: pixels; words; values over time; nodes and edges."""

MOST_COLUMNS = 5
"""Layers that are shown at first."""


@dataclass(frozen=True)
class Input:
    """One input, and how people see it.

    Attributes:
        name: to tell it from others.
        args, named: what the explainer is called with: one sample.
        python: lines that make `inputs`, a tuple, and `named`, a dict; in them stand the names
            that `Opened.python` makes.
        pixels: of a picture, `[H, W]` or `[H, W, 3]` from 0 to 1.
        words: of a text, of which each has one place along the input's first axis.
        edges: of a graph, pairs of nodes.
        marks: names of its places, where they have some.
    """

    name: str
    args: tuple[Any, ...]
    python: str
    named: dict[str, Any] = field(default_factory=dict)
    pixels: npt.NDArray[np.float32] | None = None
    words: Sequence[str] = ()
    edges: Sequence[tuple[int, int]] = ()
    marks: Sequence[str] = ()


@dataclass(frozen=True)
class Column:
    """A layer that may be shown: its parts are channels, or the places along an axis."""

    layer: str
    size: int
    kind: str
    axis: int | None = None


@dataclass(frozen=True)
class Opened:
    """A model and inputs for it.

    Attributes:
        name: the model's.
        kind: what its inputs are.
        inputs: to choose from; at least one.
        python: lines that make `explainer`.
        labels: names of the outputs.
        read: makes an input of a file that somebody sends, its bytes and its name; `None`: nobody
            may.
        place: the layer that relevance is drawn on the input at; by default the input.
        axis: of that layer, along which the places of a text, a series or a graph lie.
    """

    name: str
    kind: Kind
    explainer: Explainer
    inputs: Sequence[Input]
    python: str
    labels: Sequence[str] | None = None
    read: Callable[[bytes, str], Input] | None = None
    place: str | None = None
    axis: int | None = None

    def measure(self, chosen: Input) -> Measure:
        """What is explained of an input by default: its largest output."""
        found: Measure = self.explainer(*chosen.args, **chosen.named)
        if found.batch != 1:
            raise QueryError(f"{chosen.name}: the explorer shows one sample, not {found.batch}.")
        return found

    def label(self, index: int) -> str:
        """The name of an output."""
        known = self.labels is not None and index < len(self.labels)
        return self.labels[index] if known and self.labels is not None else f"output {index}"


def columns_of(graph: Graph, opened: Opened, R: Measure) -> list[Column]:
    """The cuts of a graph that have channels, from the inputs to the output.

    Those whose channels lie along one axis with nothing beside them are left out where the layer
    before says the same: a flattened layer has a channel for every neuron.
    """
    found: list[Column] = []
    for variable in reversed(graph.cuts):
        if variable.is_leaf or variable is graph.output:
            continue
        shape = variable.neuron_shape(R.activations(variable.name).shape)
        if not shape or not _has_channels(variable):
            continue
        size = shape[variable.channel_axis_of(shape)]
        kind = variable.producer.kind if variable.producer else variable.kind
        found.append(Column(variable.name, size, kind))
    return found


def _has_channels(variable: Variable) -> bool:
    """Whether a layer is more than another look at the one before it."""
    producer = variable.producer
    return producer is not None and producer.kind not in ("view", "dropout", "identity")


def chosen_at_first(columns: Sequence[Column], most: int = MOST_COLUMNS - 1) -> list[str]:
    """Some of them, spread over the depth: activations, where there are any."""
    fit = [column for column in columns if column.kind == "activation"] or list(columns)
    if len(fit) <= most:
        return [column.layer for column in fit]
    step = (len(fit) - 1) / (most - 1)
    return [fit[round(k * step)].layer for k in range(most)]


def target_of(chosen: Any, against: Any, R: Measure) -> tuple[Any, str, str]:
    """What is explained: as an explainer takes it, as Python, and in the paper's notation.

    Arguments:
        chosen, against: numbers of outputs, or `None`: the largest one, and nothing.

    Raises:
        QueryError: they are no outputs.
    """
    outputs = R.output.shape[-1] if R.output.dim() > 1 else 1
    for one in (chosen, against):
        whole = isinstance(one, int) and not isinstance(one, bool)
        if one is not None and not (whole and 0 <= one < outputs):
            raise QueryError(f"there is no output {str(one)[:20]}: they are 0 to {outputs - 1}.")
    if R.output.dim() != 2 and not (R.output.dim() < 2 and chosen in (None, 0)):
        raise QueryError("the explorer shows models with one output for each class.")
    if chosen is None:
        chosen = int(R.output.reshape(-1).argmax())
    if against is None:
        return chosen, str(chosen), str(chosen)
    if against == chosen:
        raise QueryError("an output is explained against another one, not against itself.")
    return Contrast(chosen, against), f"nrm.Contrast({chosen}, {against})", f"{chosen} − {against}"
