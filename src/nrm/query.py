"""From neuron sets to message passing: in which order a walk can meet the sets of a query."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from nrm.errors import NeuronSetError, QueryError
from nrm.graph import Graph, Variable
from nrm.neurons import NeuronSet
from nrm.passing import Messages, send
from nrm.program import Pass

Stops = dict[Variable, Tensor | None]
"""A neuron set on a graph: masks that broadcast to messages; `None` for a whole variable."""


def resolve(chosen: NeuronSet, forward: Pass) -> Stops:
    """The masks of a neuron set.

    Raises:
        UnknownLayerError, NeuronSetError: the set does not exist, or is empty.
    """
    stops: Stops = {}
    picked: dict[Variable, Tensor] = {}
    for layer, select, _ in chosen.members:
        variable = forward.graph.variable(layer)
        shape = neuron_shape(variable, forward)
        mask = select(variable, shape)
        if mask.dim() == len(shape) and variable.batch_axis is not None:
            mask = mask.unsqueeze(variable.batch_axis)
        elif variable.batch_axis is None and forward.batch > 1:
            raise QueryError(
                f"{variable.name!r} mixes the batch with another axis, so sets of its neurons "
                "can only be given for one sample at a time."
            )
        elif mask.dim() > len(shape):
            if mask.shape[0] != forward.batch:
                raise NeuronSetError(
                    f"a mask of {layer!r} has {mask.shape[0]} samples, the batch {forward.batch}."
                )
            axis = variable.batch_axis
            mask = mask[0] if axis is None else mask.movedim(0, axis)
        picked[variable] = picked[variable] | mask if variable in picked else mask
    if not any(bool(mask.any()) for mask in picked.values()):
        raise NeuronSetError(f"the neuron set {chosen} is empty.")
    for variable, mask in picked.items():
        weights = mask.to(forward.output.dtype).to(forward.output.device)
        stops[variable] = None if bool(mask.all()) else weights.unsqueeze(0)
    return stops


def neuron_shape(variable: Variable, forward: Pass) -> torch.Size:
    """The shape of a variable without its batch axis."""
    shape = list(forward.shape(variable))
    if variable.batch_axis is not None:
        del shape[variable.batch_axis]
    return torch.Size(shape)


def joint_messages(
    forward: Pass,
    start: Messages,
    sets: Sequence[Stops],
    normalized: bool = True,
    open_to: Stops | None = None,
    ends: Stops | None = None,
) -> Messages:
    """The messages of the walks that pass all `sets`, at `ends`.

    Without `ends` they stay where the walks complete the sets, or travel on to the leaves: their
    sum is the same. Where the sets can be put in an order in which every walk meets them, one run
    does it. Where they interleave, the walks that pass all are those of inclusion and exclusion:
    `1[all] = sum over nonempty T of (-1)^(|T|+1) 1[any of T]`.
    """
    order = in_order(forward.graph, sets)
    if order is not None:
        messages = start
        for stops in order:
            messages = send(forward, messages, stops, normalized, open_to)
        return messages if ends is None else send(forward, messages, ends, normalized, open_to)
    total: Messages = {}
    ends = ends or dict.fromkeys(forward.graph.leaves)
    for size in range(1, len(sets) + 1):
        for chosen in combinations(sets, size):
            arrived = send(forward, start, union(chosen), normalized, open_to)
            # Walks complete at different neurons for different unions: add up at the ends.
            for end, message in send(forward, arrived, ends, normalized, open_to).items():
                signed = message if size % 2 else -message
                total[end] = total[end] + signed if end in total else signed
    return total


def in_order(graph: Graph, sets: Sequence[Stops]) -> list[Stops] | None:
    """The sets in an order in which every walk that meets all of them does so, if there is one."""
    upstream = {variable: graph.upstream(variable) for stops in sets for variable in stops}
    remaining, order = list(sets), []
    while remaining:
        for stops in remaining:
            others = [other for other in remaining if other is not stops]
            if not any(v in upstream[w] for v in stops for other in others for w in other):
                order.append(stops)
                remaining = others
                break
        else:
            return None
    return order


def union(sets: Sequence[Stops]) -> Stops:
    """The neurons in any of the sets."""
    united: Stops = {}
    for stops in sets:
        for variable, mask in stops.items():
            before = united.get(variable, mask)
            if mask is None or before is None:
                united[variable] = None
            else:
                united[variable] = torch.maximum(before, mask)
    return united


def per_sample(message: Tensor, variable: Variable, batch: int) -> Tensor:
    """`[K, *shape]` summed over neurons: `[K, batch]`.

    Raises:
        QueryError: the variable mixes samples, and there are several.
    """
    if variable.batch_axis is not None:
        first = message.movedim(variable.batch_axis + 1, 1)
        return first.reshape(*first.shape[:2], -1).sum(-1)
    if batch == 1:
        return message.reshape(len(message), -1).sum(1, keepdim=True)
    raise QueryError(
        f"{variable.name!r} mixes the batch with another axis, so its relevance cannot be told "
        "apart by sample. Explain one sample at a time."
    )
