"""The columns that may be shown: cuts, where heads of attention lie, and hidden states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nrm.errors import QueryError
from nrm.explore.divided import CLUSTERS, By, Divided, divide, heads, how_many, remembered, steps
from nrm.explore.opened import Opened
from nrm.graph import Graph, Variable
from nrm.measure import Measure
from nrm.prepare import Pass

MOST_COLUMNS = 5
"""Layers that are shown at first."""


@dataclass(frozen=True)
class Way:
    """One way to divide a layer, and into how many parts."""

    by: By
    size: int


@dataclass(frozen=True)
class Column:
    """A layer that may be shown.

    Attributes:
        ways: to divide it, the one that is taken where nobody says, first.
        group: of a single hidden state: the column that holds those of all steps.
    """

    layer: str
    kind: str
    ways: tuple[Way, ...]
    group: str | None = None

    @property
    def axis(self) -> int | None:
        """Along which the first way's places lie."""
        return self.ways[0].by.axis

    @property
    def size(self) -> int:
        """How many parts the first way has."""
        return self.ways[0].size


@dataclass(frozen=True)
class Wanted:
    """A column as it is asked for.

    Attributes:
        how: it is to be divided; `None`: as by default.
        of: of clusters: how many.
    """

    layer: str
    how: str | None = None
    of: int | None = None

    @classmethod
    def read(cls, given: Any) -> Wanted:
        """The name of a layer, or `{"layer": ..., "by": ..., "of": ...}`.

        Raises:
            QueryError: it is none of that.
        """
        found = {"layer": given} if isinstance(given, str) else given
        if not isinstance(found, Mapping) or not isinstance(found.get("layer"), str):
            raise QueryError("a column is the name of a layer, or an object with 'layer'.")
        how = found.get("by")
        if how is not None and not isinstance(how, str):
            raise QueryError("'by' says in a word how a column is divided.")
        return cls(found["layer"], how, how_many(found.get("of")) if how == "clusters" else None)


def columns_of(
    graph: Graph, opened: Opened, R: Measure, forward: Pass | None = None
) -> list[Column]:
    """What may be a column, from the inputs to the output.

    The cuts of a graph that have parts to show: those in which the places of a text, a series or a
    graph lie along the same axis as in the input are divided by these first, all others into
    channels. Beside them where the heads of an attention lie, and the hidden states of recurrent
    layers: these are no cuts, and what they hold is the share of the walks that visit them.

    Arguments:
        forward: the measure's, if it is at hand: each look at it looks at the whole model.
    """
    forward = R.forward_pass if forward is None else forward
    key = ("columns", opened.place, opened.axis)
    return remembered(forward, key, lambda: _columns_of(graph, opened, forward))


def _columns_of(graph: Graph, opened: Opened, forward: Pass) -> list[Column]:
    places = None
    if opened.axis is not None:
        place = graph.variable(opened.place or graph.inputs[0].name)
        places = place.neuron_shape(forward.shape(place))[opened.axis]
    attentions = heads(forward)

    def ways(variable: Variable) -> list[Way]:
        """How a layer can be divided; where there are heads, these first."""
        sizes = variable.neuron_shape(forward.shape(variable))
        if not sizes:
            return []
        there, along = attentions.get(variable.name), opened.axis
        channel = variable.channel_axis_of(sizes)
        found = [Way(By(), sizes[channel])]
        apart = there is None or there.axis != along  # heads are no places, as many as there are
        if along is not None and apart and len(sizes) > max(along, 1) and sizes[along] == places:
            found.insert(0, Way(By("places", along), sizes[along]))
        if there is not None:
            found.insert(0, Way(By("heads"), len(there.indices)))
        if math.prod(sizes) > sizes[channel]:
            found.append(Way(By("clusters", of=CLUSTERS), CLUSTERS))
        return found if found[0].size > 1 else []

    placed: dict[Variable, Column] = {}
    # Walks that end at biases, where these are inputs, cross no more layers.
    for variable in graph.crossings(leaving_out=("bias", "constant")):
        producer = variable.producer
        if producer is None or variable is graph.output or producer.kind in _SAME:
            continue
        if found := ways(variable):
            placed[variable] = Column(variable.name, producer.kind, tuple(found))
    for name in attentions:
        variable = graph.variable(name)
        placed[variable] = Column(name, "attention", tuple(ways(variable)))
    return _in_order(graph, placed, forward)


def _in_order(graph: Graph, placed: dict[Variable, Column], forward: Pass) -> list[Column]:
    """Columns from the inputs to the output, each recurrent layer's states with its last one."""
    found = [(float(variable.index), column) for variable, column in placed.items()]
    for name, states in steps(graph).items():
        if len(states) < 2:
            continue
        last = 0
        for _, layer in states:
            variable = graph.variable(layer)
            size = variable.neuron_shape(forward.shape(variable)).numel()
            last = max(last, variable.index)
            if variable not in placed and size > 1:
                one = Column(layer, "hidden state", (Way(By(), size),), name)
                found.append((variable.index, one))
        every = Column(name, "hidden states", (Way(By("steps"), len(states)),))
        found.append((last + 0.5, every))
    return [column for _, column in sorted(found, key=lambda one: one[0])]


_SAME = ("view", "dropout", "identity")
"""Kinds of operations after which a layer is the one before it once more."""


def chosen_at_first(columns: Sequence[Column], most: int = MOST_COLUMNS - 1) -> list[str]:
    """Some of them, spread over the depth: those divided into places or steps, else activations."""
    cuts = [column for column in columns if column.kind not in ("attention", "hidden state")]
    fit = [column for column in cuts if column.ways[0].by.how in ("places", "steps")]
    fit = fit or [column for column in cuts if column.kind == "activation"] or cuts
    if len(fit) <= most:
        return [column.layer for column in fit]
    step = (len(fit) - 1) / (most - 1)
    return [fit[round(k * step)].layer for k in range(most)]


def divided_columns(
    R: Measure, opened: Opened, wanted: Sequence[str | Wanted], forward: Pass | None = None
) -> list[Divided]:
    """The columns that are asked for, divided, from the inputs to the output.

    Raises:
        NrmError: one is no column, or cannot be divided so.
    """
    forward = R.forward_pass if forward is None else forward
    known = {column.layer: column for column in columns_of(R.graph, opened, R, forward)}
    asked = {one.layer: one for one in map(_as_wanted, wanted)}
    for layer in asked:
        if layer not in known:
            R.graph.variable(layer)  # says so, where there is none of that name
            raise QueryError(
                f"{layer!r} is no column: it is no cut with several channels, it holds no heads of "
                "an attention, and it is no hidden state."
            )
    found = []
    for layer, column in known.items():
        if layer in asked:
            found.append(divide(R, layer, _way(column, asked[layer]), forward))
    return found


def _as_wanted(given: str | Wanted) -> Wanted:
    return Wanted(given) if isinstance(given, str) else given


def _way(column: Column, wanted: Wanted) -> By:
    if wanted.how is None:
        return column.ways[0].by
    for way in column.ways:
        if way.by.how == wanted.how:
            return By("clusters", of=wanted.of) if wanted.how == "clusters" else way.by
    known = ", ".join(way.by.how for way in column.ways)
    raise QueryError(f"{column.layer!r} is divided by {known}, not by {wanted.how[:20]!r}.")
