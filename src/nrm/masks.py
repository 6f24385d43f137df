"""Neuron sets on a graph: their masks, and how far a message sums to one number per sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from nrm.errors import NeuronSetError, QueryError
from nrm.formulas import NeuronSet
from nrm.graph import Graph, Variable
from nrm.prepare import Pass
from nrm.sets import channel_axis

S = TypeVar("S")
Stops = dict[Variable, Tensor | None]
"""A neuron set on a graph: masks that broadcast to messages; `None` for a whole variable."""


def variables_of(chosen: NeuronSet, graph: Graph) -> tuple[Variable, ...]:
    """Where a neuron set lies, each variable once.

    Raises:
        UnknownLayerError: a layer does not exist.
    """
    return tuple(dict.fromkeys(graph.variable(layer) for layer in chosen.layers))


def resolve(chosen: NeuronSet, forward: Pass) -> Stops:
    """The masks of a neuron set.

    Raises:
        UnknownLayerError, NeuronSetError: the set does not exist, or is empty.
    """
    stops: Stops = {}
    picked: dict[Variable, Tensor] = {}
    for member in chosen.members:
        variable = forward.graph.variable(member.layer)
        shape = neuron_shape(variable, forward)
        mask = laid_out(member.select(variable, shape), variable, forward)
        picked[variable] = picked[variable] | mask if variable in picked else mask
    if not any(bool(mask.any()) for mask in picked.values()):
        raise NeuronSetError(f"the neuron set {chosen} is empty.")
    for variable, mask in picked.items():
        weights = mask.to(forward.output.dtype).to(forward.output.device)
        stops[variable] = None if bool(mask.all()) else weights.unsqueeze(0)
    return stops


def laid_out(values: Tensor, variable: Variable, forward: Pass) -> Tensor:
    """Values of a variable's neurons, without the batch axis or with it in front, so that they
    broadcast to the variable.

    Raises:
        NeuronSetError: they have another shape.
        QueryError: the variable mixes samples, and there are several.
    """
    shape, axis = neuron_shape(variable, forward), variable.batch_axis
    samples = len(values) if values.dim() == len(shape) + 1 else forward.batch
    if values.shape[1:] == shape and samples != forward.batch:
        raise NeuronSetError(
            f"values of {variable.name!r} have {samples} samples, the batch {forward.batch}."
        )
    if values.shape not in (shape, (forward.batch, *shape)):
        raise NeuronSetError(
            f"values of {variable.name!r} have shape {tuple(values.shape)}, its neurons "
            f"{tuple(shape)} (without the batch of {forward.batch})."
        )
    if values.dim() == len(shape) and axis is not None:
        return values.unsqueeze(axis)
    if axis is None and forward.batch > 1:
        raise QueryError(
            f"{variable.name!r} mixes the batch with another axis, so sets of its neurons "
            "can only be given for one sample at a time."
        )
    if values.dim() > len(shape):
        return values[0] if axis is None else values.movedim(0, axis)
    return values


def neuron_shape(variable: Variable, forward: Pass) -> torch.Size:
    """The shape of a variable without its batch axis."""
    shape = list(forward.shape(variable))
    if variable.batch_axis is not None:
        del shape[variable.batch_axis]
    return torch.Size(shape)


def in_order(graph: Graph, sets: Mapping[S, Collection[Variable]]) -> list[S] | None:
    """The sets in an order in which every walk that meets all of them does so, if there is one.

    Arguments:
        sets: where each lies.
    """
    upstream = {variable: graph.upstream(variable) for lies in sets.values() for variable in lies}
    remaining, order = list(sets), []
    while remaining:
        for one in remaining:
            others = [other for other in remaining if other is not one]
            if not any(v in upstream[w] for v in sets[one] for o in others for w in sets[o]):
                order.append(one)
                remaining = others
                break
        else:
            return None
    return order


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


def by_sample(values: Tensor, tensor: Tensor, variable: Variable) -> Tensor:
    """`[batch]` shaped so that it broadcasts against a variable's tensor.

    Raises:
        QueryError: the variable mixes samples, and there are several.
    """
    if variable.batch_axis is not None:
        return values.view((-1,) + (1,) * (tensor.dim() - 1 - variable.batch_axis))
    if len(values) == 1:
        return values
    raise QueryError(
        f"{variable.name!r} mixes the batch with another axis, so its relevance cannot be told "
        "apart by sample. Explain one sample at a time."
    )


def divide(joint: Tensor, known: Tensor) -> Tensor:
    """Conditional relevance, 0 where the condition has none (eq. 11)."""
    return torch.where(known == 0, 0.0, joint / torch.where(known == 0, 1.0, known))


# -- Relevance by channel: summing messages over the neurons of a channel, and splitting them.


def sum_by_channel(message: Tensor, variable: Variable, along: int | None = None) -> Tensor:
    """`[K, *shape]` summed over all neurons of a channel: `[K, batch, C]`.

    Arguments:
        along: another axis, not counting the batch, whose places are taken for channels.
    """
    axis = _axis(message, variable, along)
    if variable.batch_axis is None:  # all of it is one sample
        first = message.movedim(axis, 1).unsqueeze(1)
    else:
        first = message.movedim((variable.batch_axis + 1, axis), (1, 2))
    return first.reshape(*first.shape[:3], -1).sum(-1)


def split_by_channel(
    message: Tensor, variable: Variable, chosen: Sequence[int], along: int | None = None
) -> Tensor:
    """The parts of a message `[K, *shape]` that channels hold: `[K * len(chosen), *shape]`."""
    axis = _axis(message, variable, along)
    split = message.new_zeros((len(chosen), *message.shape))
    for part, channel in zip(split, chosen, strict=True):
        part.narrow(axis, channel, 1).copy_(message.narrow(axis, channel, 1))
    return split.transpose(0, 1).flatten(0, 1)


def keep_channels(
    message: Tensor, variable: Variable, chosen: Sequence[int], along: int | None = None
) -> Tensor:
    """The part of a message `[K, *shape]` that some channels hold together."""
    axis = _axis(message, variable, along)
    kept = message.new_zeros(message.shape[axis])
    kept[list(chosen)] = 1
    return message * kept.view(-1, *(1,) * (message.dim() - 1 - axis))


def only_sample(message: Tensor, variable: Variable, sample: int) -> Tensor:
    """The message of one sample; that of the others becomes zero."""
    if variable.batch_axis is None:
        return message
    kept = torch.zeros_like(message)
    axis = variable.batch_axis + 1
    kept.narrow(axis, sample, 1).copy_(message.narrow(axis, sample, 1))
    return kept


def require_samples_apart(variable: Variable, batch: int) -> None:
    """Refuse a variable that mixes the samples of a batch in one axis."""
    if variable.batch_axis is None and batch > 1:
        raise QueryError(
            f"{variable.name!r} has no batch axis of its own, so its channels cannot be told "
            "apart by sample. Choose another layer, or explain one sample at a time."
        )


def _axis(message: Tensor, variable: Variable, along: int | None) -> int:
    """Where the channels lie in a message `[K, *shape]`."""
    shape = list(message.shape[1:])
    if variable.batch_axis is not None:
        del shape[variable.batch_axis]
    if along is None:
        axis = channel_axis(variable, torch.Size(shape)) + 1
    elif -len(shape) <= along < len(shape):
        axis = along % len(shape) + 1
    else:
        raise QueryError(f"{variable.name!r} has no axis {along}: its neurons are {tuple(shape)}.")
    if variable.batch_axis is None:
        return axis
    batch = variable.batch_axis + 1
    return axis + 1 if axis >= batch else axis
