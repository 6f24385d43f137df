"""What a page asks for, and the parts of an answer, as they go over the line in JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from nrm.errors import QueryError
from nrm.explore.columns import Wanted

Output = int | Sequence[int]
"""An output: a class, or one number for each axis of the outputs."""
Mode = Literal["joint", "given"]

MOST_SHOWN, MOST_LAYERS = 512, 16
"""Parts of a column that are drawn, and columns."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        target, against: outputs; `None`: the largest, and nothing.
        columns: layers, by name where they are divided as by default.
        selection: as `nrm.explore.selection` reads it.
        mode: whether numbers are jointly with the selection or given it.
        top: parts of a column to show.
    """

    target: Output | None = None
    against: Output | None = None
    columns: Sequence[str | Wanted] = ()
    selection: Any = None
    mode: Mode = "joint"
    top: int = 12

    @classmethod
    def read(cls, given: Any) -> Request:
        """A request from JSON.

        Raises:
            QueryError: it is none.
        """
        if not isinstance(given, dict):
            raise QueryError("a request is an object.")
        columns, top = given.get("columns", []), given.get("top", cls.top)
        if not isinstance(columns, list):
            raise QueryError("columns are a list of layers.")
        if len(columns) > MOST_LAYERS:
            raise QueryError(f"at most {MOST_LAYERS} columns are shown at once.")
        if not isinstance(top, int) or isinstance(top, bool) or not 1 <= top <= MOST_SHOWN:
            raise QueryError(f"of a column 1 to {MOST_SHOWN} parts are shown.")
        mode = given.get("mode", "joint")
        if mode not in ("joint", "given"):
            raise QueryError("numbers are 'joint' with the selection or 'given' it.")
        wanted = [Wanted.read(column) for column in columns]
        return cls(
            given.get("target"), given.get("against"), wanted, given.get("selection"), mode, top
        )


@dataclass(frozen=True)
class Cost:
    """What it took.

    Attributes:
        passes: messages through the network or a part of it; a contraction of all pairs counts as
            one.
    """

    milliseconds: float
    passes: int


@dataclass(frozen=True)
class Number:
    """A relevance, which it is in the paper's notation, and the Python that gives it."""

    value: float
    notation: str
    python: str


@dataclass(frozen=True)
class Explained:
    """The output that is explained: its class and name, and its value in the model's units.

    Attributes:
        outputs: the largest of all, each with its name and value; where outputs lie at several
            places, those of the one that is explained.
        count: how many there are.
        place: of several: which is explained, one number for each axis along which they lie.
        places: the sizes of these axes.
        after: how many of these come before the class, where an output is named.
    """

    target: int | None
    against: int | None
    label: str
    scale: float
    what: str
    outputs: list[tuple[int, str, float]]
    count: int
    place: list[int]
    places: list[int]
    after: int
    kind: Literal["explained"] = "explained"


@dataclass(frozen=True)
class Node:
    """One part of a column.

    Attributes:
        python: its neurons.
    """

    index: int
    value: float
    python: str


@dataclass(frozen=True)
class Shown:
    """A column: its most relevant parts, and what all others hold together.

    Attributes:
        axis, by, of: how it is divided, as in a selection.
        word: what stands before a part's number in the notation.
        total: of all parts; `None` where a walk may visit several, so that they have none.
        nodes: the most relevant first; words and time steps as one reads them.
        each: Python for one part, whose neurons take the place of `#`.
        where: of clusters which is where: 8-bit numbers in base64, of the shape `positions`.
    """

    layer: str
    axis: int | None
    by: str
    of: int | None
    word: str
    size: int
    total: float | None
    nodes: list[Node]
    others: int
    rest: float
    notation: str
    python: str
    each: str
    where: str | None = None
    positions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Heatmap:
    """Relevance at the input.

    Attributes:
        values: 32-bit floats in base64, of this shape: `[H, W]` of a picture, added up over
            colours; `[places]` otherwise.
        each: Python for one place, whose number takes the place of `#`.
    """

    layer: str
    shape: list[int]
    values: str
    total: float
    notation: str
    python: str
    each: str


@dataclass(frozen=True)
class Columns:
    """What one run forward and back gives.

    Attributes:
        cautions: what there is to know of these numbers, as for `Flows` and `Found`; said of every
            answer anew. Those of flows are what is not said of their columns.
    """

    total: Number
    columns: list[Shown]
    heatmap: Heatmap
    cost: Cost
    cautions: list[str] = field(default_factory=list)
    kind: Literal["columns"] = "columns"


@dataclass(frozen=True)
class Flows:
    """The joint relevance of parts of two adjacent columns: `[lower, upper, relevance]`.

    Attributes:
        python: for one flow; the neurons of its lower part and then of its upper one take the
            place of each `#`.
    """

    lower: str
    upper: str
    links: list[tuple[int, int, float]]
    how: str
    notation: str
    python: str
    cost: Cost
    cautions: list[str] = field(default_factory=list)
    kind: Literal["flows"] = "flows"


@dataclass(frozen=True)
class Done:
    """The whole answer is there."""

    cost: Cost
    kind: Literal["done"] = "done"


@dataclass(frozen=True)
class Searching:
    """How far a search is: nothing that is not found yet is larger by more than the gap.

    Attributes:
        gap: `None` while nothing is known.
    """

    gap: float | None
    kind: Literal["searching"] = "searching"


@dataclass(frozen=True)
class Found:
    """The most relevant flows through all columns: of each its parts, from the inputs up."""

    layers: list[str]
    flows: list[tuple[list[int], float]]
    gap: float | None
    notation: str
    python: str
    cost: Cost
    cautions: list[str] = field(default_factory=list)
    kind: Literal["found"] = "found"


Part = Explained | Columns | Flows | Done | Searching | Found


def numbers(heatmap: Heatmap) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The values of a heatmap, as they were."""
    return np.frombuffer(base64.b64decode(heatmap.values), "<f4").reshape(heatmap.shape)
