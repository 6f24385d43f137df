"""Numbers and tensors as another tensor has them.

`torch.as_tensor(0.7)` is of single precision whatever it meets later, so that a double model loses
half its digits. Whatever a user gives, and whatever constant a graph holds, comes through here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nrm.errors import InputError, NrmError


def like(value: Any, reference: Tensor) -> Tensor:
    """A number, array or tensor with the type of `reference`, on its device.

    Python numbers, lists and arrays go there at once, without a detour over single precision.
    """
    return torch.as_tensor(value, dtype=reference.dtype, device=reference.device)


def check_dense(x: Tensor, what: str, error: type[NrmError] = InputError) -> None:
    """Refuse a tensor whose elements are not all there, each a number of its own.

    Arguments:
        what: it is called in the message.
        error: what to raise.

    Raises:
        NrmError: says what it is, and how to make a dense tensor of it.
    """
    if x.is_nested:
        kind, cure = "nested", "give torch.nested.to_padded_tensor(x, 0.0), and the model a mask"
    elif x.is_mkldnn:
        kind, cure = "in MKL-DNN's layout", "give x.to_dense()"
    elif x.layout is not torch.strided:
        kind, cure = f"sparse ({x.layout})", "give x.to_dense()"
    elif x.is_quantized:
        kind, cure = f"quantised ({x.dtype})", "give x.dequantize()"
    elif x.is_meta:
        kind, cure = "on the meta device, where tensors hold no values", "give it values"
    else:
        return
    raise error(f"{what} is {kind}, and is to be a dense tensor: {cure}.")
