"""How a column is divided: into channels, places, heads, clusters or time steps.

Every part is a neuron set, with the Python that makes it, so that all that is asked of parts is
asked of sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nrm.circuits.attention import Heads, attention_of, heads_along_an_axis
from nrm.errors import QueryError
from nrm.formulas import NeuronSet, every_neuron
from nrm.graph import Graph
from nrm.joint import Division, partition
from nrm.measure import Measure
from nrm.methods import clusters
from nrm.prepare import Pass
from nrm.sets import channels

How = Literal["channels", "places", "heads", "clusters", "steps"]
"""Channels; the places along another axis; the heads of an attention; spatial clusters of
activations; the hidden states of a recurrent layer, which are a layer for each step."""

CLUSTERS, MOST_CLUSTERS = 6, 64
"""Clusters of a layer where nobody says how many, and the most."""

T = TypeVar("T")


@dataclass(frozen=True)
class By:
    """What a column is divided by.

    Attributes:
        axis: of places.
        of: of clusters: how many there are.
    """

    how: How = "channels"
    axis: int | None = None
    of: int | None = None

    @property
    def word(self) -> str:
        """What stands before a part's number in the notation."""
        return {"heads": "head ", "clusters": "cluster ", "steps": "step "}.get(self.how, "")

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> By:
        """From JSON: `{"axis": 0}`, `{"by": "clusters", "of": 6}`, `{"by": "heads"}`, or nothing.

        Places are told by their axis, and nothing else has one.

        Raises:
            QueryError: it is none of that.
        """
        how, axis, of = given.get("by"), given.get("axis"), given.get("of")
        if axis is not None and not is_index(axis):
            raise QueryError(f"an axis is a whole number, not {shortly(axis)}.")
        if how is not None and how not in get_args(How):
            raise QueryError(f"a layer is divided by one of {get_args(How)}, not {shortly(how)}.")
        told: How = how or ("channels" if axis is None else "places")
        if (told == "places") != (axis is not None):
            raise QueryError(
                f"places have an axis, and nothing else has: here {told}, axis {axis}."
            )
        return cls(told, axis, how_many(of) if told == "clusters" else None)


def how_many(given: Any) -> int:
    """How many clusters are asked for.

    Raises:
        QueryError: it is no such number.
    """
    if given is None:
        return CLUSTERS
    if not is_index(given) or not 1 <= given <= MOST_CLUSTERS:
        raise QueryError(f"there are 1 to {MOST_CLUSTERS} clusters, not {shortly(given)}.")
    return int(given)


@dataclass(frozen=True)
class Part:
    """One part of a column: its neurons, and the Python that gives them."""

    chosen: NeuronSet
    python: str


@dataclass(frozen=True)
class Divided:
    """A layer in parts.

    Attributes:
        layer: its name; for time steps what the names of the states begin with.
        numbers: those of the parts.
        layers: where the parts lie: the layer, or a state for each step.
        labels: of clusters, `[*positions]`: which of them is where.
    """

    layer: str
    by: By
    numbers: Sequence[int]
    layers: tuple[str, ...]
    parts: Mapping[int, Part] = field(default_factory=dict)
    labels: Tensor | None = None

    @property
    def is_one_layer(self) -> bool:
        """Whether walks visit one part at most, so that the parts add up to the layer."""
        return self.by.how != "steps"

    def part(self, number: int) -> Part:
        """One of them.

        Raises:
            QueryError: there is none of this number. (Of channels and places the library says so.)
        """
        if self.by.how in ("channels", "places"):
            along = "" if self.by.axis is None else f", axis={self.by.axis}"
            chosen = channels(self.layer, number, axis=self.by.axis)
            return Part(chosen, f"nrm.channels({self.layer!r}, {number}{along})")
        if number not in self.parts:
            raise QueryError(
                f"{self.layer!r} has no {self.by.word}{number}: they are {min(self.numbers)} to "
                f"{max(self.numbers)}."
            )
        return self.parts[number]

    def sets(self) -> list[NeuronSet]:
        """All parts as neuron sets."""
        return [self.part(number).chosen for number in self.numbers]

    def python(self) -> str:
        """The Python that gives them in a list."""
        if self.by.how in ("channels", "places"):
            along = "" if self.by.axis is None else f", axis={self.by.axis}"
            one = f"nrm.channels({self.layer!r}, k{along})"
            return f"[{one} for k in range({len(self.numbers)})]"
        if self.by.how == "clusters":
            return f"nrm.clusters(R, {self.layer!r}, {self.by.of})"
        return f"[{', '.join(self.part(number).python for number in self.numbers)}]"

    def add_up(self, messages: Mapping[str, Tensor], forward: Pass) -> Tensor:
        """The relevance of each part in double precision: `[parts]`.

        Arguments:
            messages: the relevance of every neuron, by layer.
        """
        if not self.is_one_layer:
            return torch.stack([messages[layer].double().sum() for layer in self.layers]).cpu()
        by: Division = "channel" if self.by.axis is None else self.by.axis
        told = self.layer if self.by.how in ("channels", "places") else self.sets()
        parts = partition(told, by, forward)
        return parts.add_up(messages[self.layer].double().unsqueeze(0))[0, 0].cpu()


def divide(R: Measure, layer: str, by: By, forward: Pass | None = None) -> Divided:
    """A layer divided on a measure.

    Arguments:
        forward: the measure's, if it is at hand: each look at it looks at the whole model.

    Raises:
        NrmError: the layer cannot be divided so.
    """
    forward = R.forward_pass if forward is None else forward
    if by.how in ("channels", "places"):
        variable = R.graph.variable(layer)
        shape = variable.neuron_shape(forward.shape(variable))
        return Divided(layer, by, range(shape[variable.axis_of(shape, by.axis)]), (layer,))
    return remembered(forward, (layer, by), lambda: _divided(R, layer, by, forward))


def _divided(R: Measure, layer: str, by: By, forward: Pass) -> Divided:
    if by.how == "steps":
        states = steps(R.graph).get(layer)
        if states is None:
            raise QueryError(f"{layer!r} are no hidden states of a recurrent layer.")
        parts = {k: Part(every_neuron(name), f"nrm.neurons({name!r})") for k, name in states}
        return Divided(layer, by, list(parts), tuple(name for _, name in states), parts)
    if by.how == "heads":
        found = heads(forward).get(layer)
        if found is None:
            raise QueryError(f"{layer!r} is not where the heads of an attention lie.")
        parts = dict(enumerate(_head(found, layer, indices) for indices in found.indices))
        return Divided(layer, by, range(len(parts)), (layer,), parts)
    assert by.of is not None
    grouped = clusters(R, layer, by.of)
    line = f"nrm.clusters(R, {layer!r}, {by.of})"
    parts = {k: Part(chosen, f"{line}[{k}]") for k, chosen in enumerate(grouped)}
    return Divided(layer, by, range(len(parts)), (layer,), parts, grouped.labels[0])


def _head(found: Heads, layer: str, indices: Sequence[int]) -> Part:
    by_default = found.variable.channel_axis_of(found.variable.neuron_sizes) == found.axis
    axis = "" if by_default else f", axis={found.axis}"
    first, last = indices[0], indices[-1]
    numbers = ", ".join(map(str, indices))
    if len(indices) > 1 and tuple(indices) == tuple(range(first, last + 1)):
        numbers = f"*range({first}, {last + 1})"
    chosen = channels(layer, *indices, axis=found.axis)
    return Part(chosen, f"nrm.channels({layer!r}, {numbers}{axis})")


def heads(forward: Pass) -> dict[str, Heads]:
    """The attentions with several heads, by the layer in which these lie along one axis."""
    return remembered(forward, "heads", lambda: _heads(forward))


def _heads(forward: Pass) -> dict[str, Heads]:
    attentions = (attention_of(variable, forward.graph) for variable in forward.graph.variables)
    found = (heads_along_an_axis(forward, one) for one in attentions if one is not None)
    return {one.variable.name: one for one in found if one is not None}


def steps(graph: Graph) -> dict[str, list[tuple[int, str]]]:
    """The hidden states of each recurrent layer and direction: steps, and their layers."""
    found: dict[str, list[tuple[int, str]]] = {}
    for variable in graph.variables:
        state = _STATE.fullmatch(variable.name)
        if state is not None and not variable.is_leaf:
            found.setdefault(state[1], []).append((int(state[2]), variable.name))
    return {name: sorted(states) for name, states in found.items()}


_STATE = re.compile(r"((?:.*\.)?h_l\d+(?:_reverse)?)\[(\d+)\]")  # as `nrm.capture.recurrent` names

_REMEMBERED: WeakKeyDictionary[Pass, dict[Any, Any]] = WeakKeyDictionary()


def remembered(forward: Pass, key: Any, make: Callable[[], T]) -> T:
    """What is found once for each forward pass: clusters take longer than a message."""
    known = _REMEMBERED.setdefault(forward, {})
    if key not in known:
        known[key] = make()
    found: T = known[key]
    return found


def is_index(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and -(2**31) < given < 2**31


def shortly(given: Any) -> str:
    """A value out of a request, for a message."""
    text = repr(given)
    return text if len(text) < 80 else f"{text[:80]}…"
