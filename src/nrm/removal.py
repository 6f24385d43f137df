"""What takes the place of removed activations: zero, a mean, or values of one's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from nrm.errors import QueryError
from nrm.graph import Graph, Variable
from nrm.tensors import check_dense, like

Removal = str | float | Mapping[str, str | float | Tensor]
"""`"zero"`, `"mean"`, a number; or by name of layers one of these or a tensor."""

ByVariable = str | float | dict[Variable, str | float | Tensor]
"""The same with variables in the place of names."""


def by_variable(removal: Removal, graph: Graph) -> ByVariable:
    """The removal, with variables in the place of their names.

    Raises:
        QueryError: it is none.
    """
    if isinstance(removal, Mapping):
        return {graph.variable(layer): value for layer, value in removal.items()}
    if removal in ("zero", "mean"):
        return removal
    number = isinstance(removal, Real) and not isinstance(removal, bool)
    if number and math.isfinite(float(removal)):
        return float(removal)
    raise QueryError(
        "removal is 'zero', 'mean', a number or a mapping of layers to numbers or tensors, not "
        f"{removal!r}."
    )


def replacement(removal: ByVariable, variable: Variable, value: Tensor) -> Tensor:
    """`[neurons]`, what the activations of a variable become.

    Arguments:
        value: of the sample.

    Raises:
        QueryError: it has another shape, or is not finite.
    """
    shape = variable.neuron_shape(value.shape)
    given = removal.get(variable, "zero") if isinstance(removal, dict) else removal
    if isinstance(given, str) and given == "mean":
        return _means(value.reshape(shape), variable).reshape(-1)
    if isinstance(given, str) and given == "zero":
        given = 0.0
    wrong = isinstance(given, str | bool | complex)
    if wrong or (isinstance(given, Tensor) and (given.is_complex() or given.dtype is torch.bool)):
        raise QueryError(
            f"the removal of {variable.name!r} is 'zero', 'mean', a number or a tensor, not "
            f"{given!r}."
        )
    if isinstance(given, Tensor):
        check_dense(given, f"the removal of {variable.name!r}", QueryError)
    found = like(given, value).detach().clone()  # callers reuse theirs
    if found.shape not in (torch.Size(), shape):
        raise QueryError(
            f"the removal of {variable.name!r} has shape {tuple(found.shape)}, its neurons "
            f"{tuple(shape)} (without the batch)."
        )
    if not bool(torch.isfinite(found).all()):
        raise QueryError(f"the removal of {variable.name!r} holds NaN or infinite values.")
    return found.expand(shape).reshape(-1)


def _means(values: Tensor, variable: Variable) -> Tensor:
    """For each neuron the mean of its channel; of all, where channels have one neuron each."""
    shape = values.shape
    axes = tuple(range(values.dim()))
    if values.dim() > 1:
        along = variable.channel_axis_of(shape)
        rest = tuple(axis for axis in axes if axis != along)
        if math.prod(shape[axis] for axis in rest) > 1:
            axes = rest
    return values.mean(axes, keepdim=True).expand(shape) if axes else values
