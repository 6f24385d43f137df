"""What shapes layers give, said at once while a model is exported.

Export records a layer as one operator, and computes it with tensors that have shapes alone to learn
what comes out. torch does so as the layer is composed of others: a recurrent layer step by step, a
linear one through products, which with free sizes takes longer than all else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nrm.capture.recurrent import STEPS

aten = torch.ops.aten


@contextmanager
def shapes_at_once() -> Iterator[None]:
    """Layers, of tensors without values and for this thread, say at once what they give.

    Nothing is left of what they are composed of: only for who records them as operators.
    """
    here = threading.get_ident()
    place = torch._C.DispatchKey.CompositeImplicitAutograd
    missing = object()
    before = {operator: operator.py_kernels.get(place, missing) for operator in _SHAPES}

    def at_once(operator: Any) -> Callable[..., Any]:
        def kernel(x: Tensor, *others: Any, **named: Any) -> Any:
            if threading.get_ident() == here and isinstance(x, FakeTensor):
                found = _SHAPES[operator](x, *others, **named)
                if found is not None:
                    return found
            if before[operator] is missing:
                return operator._op_dk(place, x, *others, **named)
            return before[operator](x, *others, **named)

        return kernel

    try:
        for operator in _SHAPES:
            operator.py_kernels[place] = at_once(operator)
        yield
    finally:
        for operator, itself in before.items():
            if itself is missing:
                del operator.py_kernels[place]
            else:
                operator.py_kernels[place] = itself


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """What `aten.linear` gives; `None` where that is not plain."""
    plain = x.dim() > 1 and weight.dim() == 2 and isinstance(x.shape[-1], int)
    if not plain or x.shape[-1] != weight.shape[1] or x.dtype is not weight.dtype:
        return None
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _recurrent(
    x: Tensor,
    initial: Any,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """What `aten.lstm.input` and the like give."""
    kinds = initial if isinstance(initial, list | tuple) else [initial]
    steps, samples = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    size = (2 if bidirectional else 1) * kinds[0].shape[-1]
    output = x.new_empty((steps, samples, size))
    return (output.transpose(0, 1) if batch_first else output, *map(torch.empty_like, kinds))


_SHAPES: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    **{getattr(aten, name).input: _recurrent for name in STEPS},
}
