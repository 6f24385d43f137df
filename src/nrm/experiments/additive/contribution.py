"""What a network loses without some neurons: the reference that relevance is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nrm.errors import InputError, QueryError
from nrm.formulas import NeuronSet
from nrm.graph import Graph, Variable, run

AT_ONCE = 16
"""How many copies of the input run together, where the captured graph takes any batch."""


@dataclass(frozen=True)
class Contributions:
    """What an output loses without the sets of two families.

    Attributes:
        output: `f(x)`.
        first, second: `[sets]`, `f(x) - f(x \\ S)` of each set alone.
        total: `[first sets, second sets]`, `f(x) - f(x \\ (S_a | S_b))`.
    """

    output: Tensor
    first: Tensor
    second: Tensor
    total: Tensor

    @property
    def joint(self) -> Tensor:
        """`f(x) - f(x \\ S_a) - f(x \\ S_b) + f(x \\ (S_a | S_b))` (eq. 57)."""
        return self.first[:, None] + self.second - self.total


def contributions(
    graph: Graph,
    inputs: Sequence[Tensor],
    target: int,
    first: Sequence[NeuronSet],
    second: Sequence[NeuronSet],
) -> Contributions:
    """The contributions of two families of neuron sets, and of all their pairs, to an output.

    Arguments:
        graph: what the explainer captured.
        inputs: one sample.
        target: the output neuron.

    Raises:
        InputError: there are several samples.
        QueryError: a family is empty, or neurons cannot be removed.
    """
    if not first or not second:
        raise QueryError("give each family one neuron set or more.")
    unions = [NeuronSet(a.members + b.members) for a in first for b in second]
    found = outputs_without(graph, inputs, [None, *first, *second, *unions])[:, target]
    lost = found[0] - found[1:]
    alone, pairs = lost[: -len(unions)], lost[-len(unions) :]
    return Contributions(
        output=found[0],
        first=alone[: len(first)],
        second=alone[len(first) :],
        total=pairs.view(len(first), len(second)),
    )


def outputs_without(
    graph: Graph, inputs: Sequence[Tensor], removed: Sequence[NeuronSet | None]
) -> Tensor:
    """The model's output for one sample, once for every set, with its activations zero.

    Returns:
        `[sets, outputs]`; `None` removes nothing.

    Raises:
        InputError: there are several samples.
        QueryError: neurons cannot be removed.
    """
    axis = graph.captured.batch_axis
    if axis is not None and any(x.shape[axis] != 1 for x in inputs):
        raise InputError(
            f"neurons are removed from one sample at a time, not from {inputs[0].shape[axis]}."
        )
    for layer in _layers(removed):
        if graph.variable(layer).node is None:
            raise QueryError(f"{layer!r} enters late and is computed nowhere: nothing to remove.")
    at_once = AT_ONCE if graph.captured.batched else 1
    parts = [
        _run(graph, inputs, removed[start : start + at_once])
        for start in range(0, len(removed), at_once)
    ]
    return torch.cat(parts)


def _run(graph: Graph, inputs: Sequence[Tensor], removed: Sequence[NeuronSet | None]) -> Tensor:
    """The captured graph on copies of one sample, each without its set."""
    captured, copies = graph.captured, len(removed)
    places = {graph.variable(layer).node: graph.variable(layer) for layer in _layers(removed)}
    axis = captured.batch_axis
    repeated = [x if axis is None else x.repeat_interleave(copies, axis) for x in inputs]
    output: Tensor = run(
        captured,
        repeated,
        change=lambda node, value: (
            _zeroed(value, places[node], removed) if node in places else value
        ),
    )
    return output


def _layers(removed: Sequence[NeuronSet | None]) -> set[str]:
    return {layer for chosen in removed if chosen is not None for layer in chosen.layers}


def _zeroed(value: Tensor, variable: Variable, removed: Sequence[NeuronSet | None]) -> Tensor:
    """Each copy of a variable's value without the neurons of its set."""
    axis = variable.batch_axis
    samples = value.unsqueeze(0) if axis is None else value.movedim(axis, 0)
    shape = samples.shape[1:]
    gone = torch.zeros(samples.shape, dtype=torch.bool)
    for copy, chosen in enumerate(removed):
        for member in chosen.members if chosen is not None else ():
            if member.layer in (variable.name, *variable.aliases):
                gone[copy] |= member.select(variable, shape).view(shape)
    kept = samples.masked_fill(gone.to(value.device), 0)
    return kept[0] if axis is None else kept.movedim(0, axis)
