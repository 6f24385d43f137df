"""Which operators on complex numbers are linear: the parts of Fourier transforms and rotations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from nrm.operators.table import lookup

_ALONE = (
    "real", "imag", "view_as_real", "view_as_complex", "complex", "conj", "conj_physical", "_conj",
    "_conj_physical", "resolve_conj", "resolve_neg", "neg", "to", "_to_copy", "clone",
    "contiguous", "alias", "detach", "lift_fresh_copy", "sum", "mean", "cumsum", "stft", "istft",
)  # fmt: skip
"""Linear in all that they read."""

_SUMS = ("add", "sub", "rsub")
_PRODUCTS = ("mul", "multiply", "matmul", "mm", "bmm", "einsum")


def is_linear(node: Node, moving: Sequence[Node]) -> bool:
    """Whether a node is linear in some of the nodes that it reads, jointly.

    Arguments:
        moving: of tensors of real or complex numbers; the others that it reads are constant.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = str(node.target).split(".")[1]
    if name in _SUMS:  # a constant would be a bias
        return list(moving) == [leaf for leaf in node.args if isinstance(leaf, Node)] and all(
            isinstance(leaf, Node) for leaf in node.args
        )
    if name in _PRODUCTS:
        return len(moving) == 1 and _times_read(node, moving[0]) == 1
    if name in ("div", "divide", "true_divide"):
        return list(moving) == [node.args[0]] and not node.kwargs
    if name in ("constant_pad_nd", "pad"):
        return not any(node.args[3:] if name == "pad" else node.args[2:])
    row = lookup(node.target)
    if row is not None and row.moves and row.kind == "view":
        return len(moving) == len(node.all_input_nodes)
    return name in _ALONE or name.startswith("fft_")


def _times_read(node: Node, parent: Node) -> int:
    """How often a node reads another."""
    places: list[bool] = []
    torch.fx.node.map_arg((node.args, node.kwargs), lambda leaf: places.append(leaf is parent))
    return sum(places)
