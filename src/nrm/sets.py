"""Neuron sets by index, channel, patch or mask; and their masks on a forward pass (Def. 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nrm.errors import NeuronSetError
from nrm.formulas import Member, NeuronSet, Selector, every_neuron
from nrm.graph import Graph, Variable
from nrm.prepare import Pass
from nrm.tensors import check_dense

Index = int | slice | Sequence[int]


def neurons(layer: str, *indices: Any) -> NeuronSet:
    """Neurons of a layer by index, without the batch axis; all of them if none is given.

    Arguments:
        layer: address of a variable, e.g. `"features.28"`, `"input"`, `"output"`.
        indices: each one neuron: an int for a layer of one axis, otherwise a tuple with one
            entry per axis, where slices take several (`(12, slice(None), slice(None))`).
    """
    if not indices:
        return every_neuron(layer)
    # One entry for each axis.
    chosen = tuple(_frozen(index if isinstance(index, tuple) else (index,)) for index in indices)
    return _made("neurons", layer, indices, _Indexed(layer, chosen))


def channels(layer: str, *indices: int, axis: int | None = None) -> NeuronSet:
    """All neurons of some channels of a layer.

    Arguments:
        layer: address of a variable.
        indices: channel numbers.
        axis: the channel axis, not counting the batch; by default that of the layer (the first
            for convolutions, the last for linear layers).

    Raises:
        NeuronSetError: no channels given.
    """
    if not indices:
        raise NeuronSetError(f"channels({layer!r}) names no channel: the set is empty.")
    for index in indices:
        if isinstance(index, list | tuple):
            one_by_one = ", ".join(map(str, index))
            raise NeuronSetError(
                f"channels are given one by one, nrm.channels({layer!r}, {one_by_one}), not as a "
                f"list: put a star in front of it, *{list(index)!r}."
            )
    return _made("channels", layer, indices, _OfChannels(layer, _frozen(indices), axis), axis)


def patch(layer: str, *spatial: Index) -> NeuronSet:
    """All channels of a spatial patch: one index or slice for each axis but the channels'.

    Example:
        >>> patch("features.28", slice(0, 7), slice(0, 7))  # upper left quarter of 14 x 14
    """
    return _made("patch", layer, spatial, _InPatch(layer, _frozen(spatial)))


def mask(layer: str, chosen: Tensor, *, in_front: bool | None = None) -> NeuronSet:
    """The neurons where a boolean mask is true.

    Arguments:
        chosen: boolean, shaped like the layer without its batch axis; with a batch axis, in front
            or where the layer has it, each sample has a set of its own.
        in_front: whether the batch axis lies in front, for layers that have it elsewhere. By
            default shapes tell; where they do not, queries refuse the mask.
    """
    if not isinstance(chosen, Tensor) or chosen.dtype is not torch.bool:
        what = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
        raise NeuronSetError(f"a mask is a boolean tensor, got {what}.")
    check_dense(chosen, f"the mask of {layer!r}", NeuronSetError)
    chosen = chosen.detach().clone()  # callers reuse theirs
    text = f"mask({layer!r}, {int(chosen.sum())} neurons)"
    bits = np.packbits(chosen.cpu().numpy())
    key = (tuple(chosen.shape), hashlib.sha256(bits.tobytes()).hexdigest(), in_front)
    return NeuronSet((Member(layer, _Masked(layer, chosen, in_front), text, key),))


# Selectors are values, not functions, so that sets can be pickled and sent to other processes.


@dataclass(frozen=True)
class _Indexed:
    """Neurons by index.

    Attributes:
        chosen: for each, one entry for each axis.
    """

    layer: str
    chosen: tuple[Any, ...]

    def __call__(self, variable: Variable, shape: torch.Size) -> Tensor:
        picked = torch.zeros(shape, dtype=torch.bool)
        for index in self.chosen:
            if len(index) != len(shape):
                raise NeuronSetError(
                    f"{self.layer!r} has neurons of shape {tuple(shape)}, so an index needs "
                    f"{len(shape)} entries, not {index}."
                )
            picked |= _block(index, shape, self.layer)
        return picked


@dataclass(frozen=True)
class _OfChannels:
    layer: str
    chosen: tuple[Any, ...]
    axis: int | None

    def __call__(self, variable: Variable, shape: torch.Size) -> Tensor:
        index: list[Any] = [slice(None)] * len(shape)
        along = variable.channel_axis_of(shape) if self.axis is None else self.axis
        if not -len(shape) <= along < len(shape):
            raise NeuronSetError(
                f"{self.layer!r} has no axis {self.axis}: its neurons are {tuple(shape)}."
            )
        index[along] = self.chosen
        return _block(index, shape, self.layer)


@dataclass(frozen=True)
class _InPatch:
    """All channels of a patch.

    Attributes:
        chosen: one entry for each axis but the channels'.
    """

    layer: str
    chosen: tuple[Any, ...]

    def __call__(self, variable: Variable, shape: torch.Size) -> Tensor:
        along = variable.channel_axis_of(shape)
        if len(self.chosen) != len(shape) - 1:
            raise NeuronSetError(
                f"{self.layer!r} has {len(shape) - 1} spatial axes (neurons of shape "
                f"{tuple(shape)}), but the patch has {len(self.chosen)}."
            )
        index: list[Any] = list(self.chosen)
        index.insert(along, slice(None))
        return _block(index, shape, self.layer)


@dataclass(frozen=True, eq=False)
class _Masked:
    """The neurons of a mask.

    Attributes:
        in_front: whether its samples lie there, if it has several; `None`: as shapes tell.
    """

    layer: str
    chosen: Tensor
    in_front: bool | None = None

    def __call__(self, variable: Variable, shape: torch.Size) -> Tensor:
        chosen = self.chosen
        if self.in_front is None:
            hint = "Say mask(..., in_front=True), or False."
            what = f"the mask of {self.layer!r}"
            chosen = with_samples_in_front(chosen, variable, shape, what, hint)
        elif not self.in_front and variable.batch_axis and chosen.dim() == len(shape) + 1:
            chosen = chosen.movedim(variable.batch_axis, 0)
        if chosen.shape != shape and chosen.shape[1:] != shape:
            raise NeuronSetError(
                f"the mask has shape {tuple(chosen.shape)}, the neurons of {self.layer!r} have "
                f"{tuple(shape)} (without the batch)."
            )
        return chosen


def _block(index: Sequence[Any], shape: torch.Size, layer: str) -> Tensor:
    """The mask of a block of neurons: one index, slice or list of indices for each axis."""
    picked = torch.ones(shape, dtype=torch.bool)
    for axis, (entry, size) in enumerate(zip(index, shape, strict=True)):
        along = torch.zeros(size, dtype=torch.bool)
        along[_entry(entry, size, layer)] = True
        picked &= along.view((-1,) + (1,) * (len(shape) - 1 - axis))
    return picked


def _entry(entry: Any, size: int, layer: str) -> list[int]:
    """One axis of an index, checked against the axis' size."""
    if isinstance(entry, slice):
        taken = list(range(size))[entry]
        if not taken:
            raise NeuronSetError(f"{entry} takes nothing of an axis of {size} of {layer!r}.")
        return taken
    if hasattr(entry, "tolist"):  # tensors and arrays
        entry = entry.tolist()
    if isinstance(entry, Sequence) and not isinstance(entry, str):
        if not entry:
            raise NeuronSetError(f"an index of {layer!r} is empty.")
        return [i for one in entry for i in _integer(one, size, layer)]
    return _integer(entry, size, layer)


def _integer(index: Any, size: int, layer: str) -> list[int]:
    index = index.tolist() if hasattr(index, "tolist") else index
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        hint = " Use nrm.mask for booleans." if isinstance(index, bool) else ""
        raise NeuronSetError(f"{index!r} is no index of {layer!r}.{hint}")
    position = index.__index__()
    if not -size <= position < size:
        raise NeuronSetError(
            f"index {position} is out of range: {layer!r} has {size} there (0 to {size - 1})."
        )
    return [position % size]


def _made(
    how: str, layer: str, indices: Sequence[Any], select: Selector, axis: int | None = None
) -> NeuronSet:
    along = "" if axis is None else f", axis={axis}"
    text = f"{how}({layer!r}{''.join(f', {index!r}' for index in indices)}{along})"
    # Large tensors are shown in part, so that their text does not tell them apart.
    key = None if all(map(_is_plain, indices)) else repr(_frozen(indices))
    return NeuronSet((Member(layer, select, text, key),))


def _frozen(index: Any) -> Any:
    """An index that the caller cannot change any more: a tuple for lists, tensors and arrays."""
    if isinstance(index, Tensor):
        check_dense(index, "an index of neurons", NeuronSetError)
    if hasattr(index, "tolist"):
        index = index.tolist()
    return tuple(map(_frozen, index)) if isinstance(index, (list, tuple)) else index


def _is_plain(index: Any) -> bool:
    if isinstance(index, (list, tuple)):
        return all(map(_is_plain, index))
    return isinstance(index, (int, slice))


# -- on a forward pass: the masks by which messages stop -------------------------------------------

Mask = Tensor | None
"""1 at some neurons of a variable and 0 at others, `[K, *shape]` or broadcasting to it; `None`: 1
at all."""
Stops = dict[Variable, Mask]
"""A neuron set on a graph: its mask at each variable where it lies."""


def variables_of(chosen: NeuronSet, graph: Graph) -> tuple[Variable, ...]:
    """Where a neuron set lies, each variable once.

    Raises:
        UnknownLayerError: a layer does not exist.
    """
    return tuple(dict.fromkeys(graph.variable(layer) for layer in chosen.layers))


def resolve(chosen: NeuronSet, forward: Pass) -> Stops:
    """The masks of a neuron set, in the number type of messages.

    Raises:
        UnknownLayerError, NeuronSetError: the set does not exist, or is empty.
        QueryError: it lies at a variable that mixes the samples, and there are several.
    """
    picked: dict[Variable, Tensor] = {}
    for member in chosen.members:
        variable = forward.graph.variable(member.layer)
        neurons = variable.neuron_shape(forward.shape(variable))
        mask = laid_out(member.select(variable, neurons), variable, forward)
        picked[variable] = picked[variable] | mask if variable in picked else mask
    if not any(bool(mask.any()) for mask in picked.values()):
        raise NeuronSetError(f"the neuron set {chosen} is empty.")
    stops: Stops = {}
    for variable, mask in picked.items():
        weights = mask.to(forward.output.dtype).to(forward.output.device)
        stops[variable] = None if bool(mask.all()) else weights
    return stops


def with_samples_in_front(
    values: Tensor, variable: Variable, neurons: torch.Size, what: str, hint: str
) -> Tensor:
    """Values of a variable's neurons with their batch axis in front, if they have one.

    Arguments:
        values: `[*neurons]`, `[batch, *neurons]`, or shaped like the variable.
        what: they are called in the message.
        hint: what to do where they may be either.

    Raises:
        NeuronSetError: there are as many samples as steps, so that it may be either.
    """
    axis = variable.batch_axis
    if not axis or variable.shared != (1, 1) or values.dim() != len(neurons) + 1:
        return values
    moved = values.movedim(axis, 0)
    if moved.shape[1:] != neurons or torch.equal(moved, values):
        return values
    if values.shape[1:] == neurons:
        raise NeuronSetError(
            f"{what} has shape {tuple(values.shape)}, and the layer its samples along axis {axis}: "
            f"those of the values may lie there or in front. {hint}"
        )
    return moved


def laid_out(values: Tensor, variable: Variable, forward: Pass) -> Tensor:
    """Values of a variable's neurons so that they broadcast to messages: `[1, *shape]`.

    Arguments:
        values: `[*neurons]`, the same for all samples, or `[batch, *neurons]`.

    Raises:
        NeuronSetError: they have another shape.
        QueryError: the variable mixes the samples, and there are several.
    """
    neurons, batch = variable.neuron_shape(forward.shape(variable)), forward.batch
    if forward.copies > 1 and values.shape == (batch // forward.copies, *neurons):
        values = values.repeat(forward.copies, *[1] * len(neurons))
    if values.shape[1:] == neurons and values.dim() > len(neurons) and len(values) != batch:
        raise NeuronSetError(
            f"values of {variable.name!r} have {len(values)} samples, the batch {batch}."
        )
    if values.shape not in (neurons, (batch, *neurons)):
        raise NeuronSetError(
            f"values of {variable.name!r} have shape {tuple(values.shape)}, its neurons "
            f"{tuple(neurons)} (without the batch of {batch})."
        )
    if not variable.tells_samples(batch) and is_same_by_row(values, variable):
        return values.unsqueeze(0)
    variable.require_samples_apart(batch)
    by_sample = values if values.dim() > len(neurons) else values.unsqueeze(0)
    return variable.restored(by_sample.unsqueeze(0), batch)


def is_same_by_row(values: Tensor, variable: Variable) -> bool:
    """Whether values are the same along all axes in which samples may lie, as of a channel."""
    free = [axis for axis, size in enumerate(variable.shape) if size is None]
    return all(bool((values == values.narrow(axis, 0, 1)).all()) for axis in free)


def divide(joint: Tensor, known: Tensor) -> Tensor:
    """Conditional relevance, 0 where the condition has none (eq. 11)."""
    return torch.where(known == 0, 0.0, joint / torch.where(known == 0, 1.0, known))
