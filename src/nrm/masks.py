"""Neuron sets on a forward pass: the masks by which messages stop at them (Definition 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from nrm.errors import NeuronSetError
from nrm.formulas import NeuronSet
from nrm.graph import Graph, Variable
from nrm.prepare import Pass

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


def laid_out(values: Tensor, variable: Variable, forward: Pass) -> Tensor:
    """Values of a variable's neurons so that they broadcast to messages: `[1, *shape]`.

    Arguments:
        values: `[*neurons]`, the same for all samples, or `[batch, *neurons]`.

    Raises:
        NeuronSetError: they have another shape.
        QueryError: the variable mixes the samples, and there are several.
    """
    neurons, batch = variable.neuron_shape(forward.shape(variable)), forward.batch
    if values.shape[1:] == neurons and values.dim() > len(neurons) and len(values) != batch:
        raise NeuronSetError(
            f"values of {variable.name!r} have {len(values)} samples, the batch {batch}."
        )
    if values.shape not in (neurons, (batch, *neurons)):
        raise NeuronSetError(
            f"values of {variable.name!r} have shape {tuple(values.shape)}, its neurons "
            f"{tuple(neurons)} (without the batch of {batch})."
        )
    variable.require_samples_apart(batch)
    by_sample = values if values.dim() > len(neurons) else values.unsqueeze(0)
    return variable.restored(by_sample.unsqueeze(0))


def divide(joint: Tensor, known: Tensor) -> Tensor:
    """Conditional relevance, 0 where the condition has none (eq. 11)."""
    return torch.where(known == 0, 0.0, joint / torch.where(known == 0, 1.0, known))
