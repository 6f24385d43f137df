"""Numbers and tensors as another tensor has them.

`torch.as_tensor(0.7)` is of single precision whatever it meets later, so that a double model loses
half its digits. Whatever a user gives, and whatever constant a graph holds, comes through here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def like(value: Any, reference: Tensor) -> Tensor:
    """A number, array or tensor with the type of `reference`, on its device.

    Python numbers, lists and arrays go there at once, without a detour over single precision.
    """
    return torch.as_tensor(value, dtype=reference.dtype, device=reference.device)
