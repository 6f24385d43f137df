"""What is open in the explorer: a model, inputs to explain, and the Python that makes them again.

The command line opens models and pictures (`nrm.cli.opening`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from nrm.errors import InputError, QueryError
from nrm.explainer import Explainer
from nrm.io import shown as as_seen
from nrm.measure import Measure

Kind = Literal["picture", "words", "series", "graph"]
"""How an input is shown: pixels; words; values over time; nodes and edges."""


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
        columns: layers that are shown at first; by default some that are spread over the depth.
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
    columns: Sequence[str] = ()

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
