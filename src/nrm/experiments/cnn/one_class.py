"""A network without the classes that are not explained."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from typing import Any

from torch import Tensor, nn


def of_class(model: nn.Module, number: int) -> nn.Module:
    """The model with one class for output; the other weights are those of the model itself.

    SqueezeNet finds its classes by a convolution of 1000 filters at every position. One class
    needs one of them: its relevance and its interventions are the same, and take a quarter of
    the time.

    Arguments:
        model: its last convolution or linear layer is that of the classes, followed by nothing
            that mixes them.
    """
    shared: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    narrow = deepcopy(model, shared)
    *_, head = (m for m in narrow.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    head.weight = _row(head.weight, number)
    if head.bias is not None:
        head.bias = _row(head.bias, number)
    if isinstance(head, nn.Conv2d):
        head.out_channels = 1
    else:
        head.out_features = 1
    return narrow


def _row(values: Tensor, number: int) -> nn.Parameter:
    return nn.Parameter(values.detach()[number : number + 1].clone(), requires_grad=False)
