"""What is open in the explorer: a model, inputs to explain, and the Python that makes them again.

The command line opens models and pictures (`nrm.cli.opening`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nrm.errors import InputError, QueryError
from nrm.explainer import Explainer
from nrm.graph import Graph
from nrm.io import shown as as_seen
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
class Sample:
    """A sample of a data set in which a channel is most relevant, and where in it.

    Attributes:
        value: the channel's relevance there.
        relevance: `[H, W]`, jointly with the channel.
    """

    name: str
    value: float
    pixels: npt.NDArray[np.float32]
    relevance: npt.NDArray[np.float32]


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
        references: for some layers (`nrm relmax`), the samples of a channel.
        referenced: these layers.
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
    references: Callable[[str, int], Sequence[Sample]] | None = None
    referenced: Sequence[str] = ()

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


def pictures(
    explainer: Explainer,
    x: Tensor,
    labels: Sequence[str] | None = None,
    shown: Sequence[npt.NDArray[np.float32]] | None = None,
) -> Opened:
    """A model of pictures that is there already, with a batch of them.

    Arguments:
        x: the model's input, `[N, C, H, W]`.
        shown: how people see each, `[H, W, 3]` or `[H, W]` from 0 to 1; by default `x` itself,
            from its smallest value to its largest.

    Example:
        >>> nrm.explore.widget.show(nrm.explore.opened.pictures(explainer, images, names))
    """
    if x.dim() != 4:
        raise InputError(f"pictures are [N, C, H, W], not of shape {tuple(x.shape)}")
    each = [as_seen(one) for one in x] if shown is None else shown
    inputs = [
        Input(f"picture {k}", (x[k : k + 1],), "", pixels=pixels) for k, pixels in enumerate(each)
    ]
    name = type(explainer.model).__name__
    return Opened(name, "picture", explainer, inputs, "", labels)


def columns_of(graph: Graph, opened: Opened, R: Measure) -> list[Column]:
    """The cuts of a graph that have parts to show, from the inputs to the output.

    Layers in which the places of a text, a series or a graph lie along the same axis as in the
    input are divided by these, all others into channels.
    """
    forward, places = R.forward_pass, None  # once: each look at it looks at the whole model
    if opened.axis is not None:
        place = graph.variable(opened.place or graph.inputs[0].name)
        places = place.neuron_shape(forward.shape(place))[opened.axis]
    found: list[Column] = []
    # Walks that end at biases, where these are inputs, cross no more layers.
    for variable in reversed(graph.crossings(leaving_out=("bias", "constant"))):
        producer = variable.producer
        if producer is None or variable is graph.output or producer.kind in _SAME:
            continue
        sizes = variable.neuron_shape(forward.shape(variable))
        if not sizes:
            continue
        axis = opened.axis
        if axis is None or len(sizes) <= max(axis, 1) or sizes[axis] != places:
            axis = None
        size = sizes[variable.channel_axis_of(sizes) if axis is None else axis]
        if size > 1:
            found.append(Column(variable.name, size, producer.kind, axis))
    return found


_SAME = ("view", "dropout", "identity")
"""Kinds of operations after which a layer is the one before it once more."""


def chosen_at_first(columns: Sequence[Column], most: int = MOST_COLUMNS - 1) -> list[str]:
    """Some of them, spread over the depth: those divided into places, else activations."""
    fit = [column for column in columns if column.axis is not None]
    fit = fit or [column for column in columns if column.kind == "activation"] or list(columns)
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
    output = R.graph.output
    axes = output.neuron_shape(R.output.shape)
    outputs = axes[-1] if axes else 1
    if math.prod(axes) != outputs:
        raise QueryError(
            "the explorer shows models with one output for each class, not outputs "
            f"{tuple(axes)}: give Explainer(output=...) a function that picks one row of them."
        )
    for one in (chosen, against):
        whole = isinstance(one, int) and not isinstance(one, bool)
        if one is not None and not (whole and 0 <= one < outputs):
            raise QueryError(f"there is no output {str(one)[:20]}: they are 0 to {outputs - 1}.")
    if chosen is None:
        chosen = int(R.output.reshape(-1).argmax())
    before = (0,) * (len(axes) - 1)

    def place(index: int) -> Any:
        return (*before, index) if before else index

    if against is None:
        return place(chosen), str(place(chosen)), str(chosen)
    if against == chosen:
        raise QueryError("an output is explained against another one, not against itself.")
    contrast = Contrast(place(chosen), place(against))
    return contrast, f"nrm.Contrast({place(chosen)}, {place(against)})", f"{chosen} − {against}"
