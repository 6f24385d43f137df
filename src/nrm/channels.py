"""Relevance by channel: summing messages over the neurons of a channel, and splitting them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nrm.errors import QueryError
from nrm.graph import Variable
from nrm.neurons import channel_axis


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
