"""Weighted relevance (eq. 33): walks that count more or less, by the neurons that they visit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nrm.errors import QueryError
from nrm.like import check_dense
from nrm.placing import Stops, laid_out, per_sample
from nrm.program import Pass
from nrm.query import Query

Weights = Mapping[str, Tensor]
"""For some layers, a weight of each of their neurons, shaped like the layer without its batch
axis, or with it."""


def weights_of(weights: Weights, forward: Pass) -> Stops:
    """The weights, so that they broadcast to messages.

    Raises:
        QueryError, NeuronSetError: there are none, or they do not fit their layers.
    """
    found: Stops = {}
    if not weights:
        raise QueryError("there are no weights: name at least one layer.")
    for layer, values in weights.items():
        variable = forward.graph.variable(layer)
        if variable in found:
            raise QueryError(f"{layer!r} is a layer that was named before: weigh it once.")
        if isinstance(values, Tensor):
            check_dense(values, f"the tensor of weights of {layer!r}", QueryError)
        if (
            not isinstance(values, Tensor)
            or values.is_complex()
            or not bool(torch.isfinite(values).all())
        ):
            raise QueryError(
                f"the weights of {layer!r} are to be a tensor of real, finite numbers."
            )
        there = laid_out(values.detach().to(forward.output), variable, forward)
        found[variable] = there.unsqueeze(0)
    return found


def expected(weights: Stops, query: Query) -> Tensor:
    """`[batch]`: the sum of the weights on a walk, over all walks of a query.

    Sums and walks change places: each neuron's weight times the relevance of the neuron.
    """
    found = query.marginals(weights)
    total = query.forward.output.new_zeros(query.forward.batch)
    for variable, weight in weights.items():
        inside = found[variable] if weight is None else found[variable] * weight
        total = total + per_sample(inside, variable, query.forward.batch)[0]
    return total
