"""What becomes one operation of the graph though it is no operator of torch's.

Functions and modules of a user's own, with a row in the table; and linear maps by way of complex
numbers (Fourier transforms, rotations), of which it is told here which operators are linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.operators.aten import GROUPED_PRODUCT
from nrm.operators.call import Call
from nrm.operators.products import by_groups
from nrm.operators.routing import Filling
from nrm.operators.row import Operator
from nrm.operators.table import function_of, register, row_of

_LIBRARY = torch.library.Library("nrm", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class Block:
    """A module call that stands in the graph as one operator.

    Attributes:
        kind: the module's class, by which its row is found.
        body: what it computes, from its inputs and parameters.
    """

    kind: str
    body: Callable[..., Any]
    _schema: Any  # torch.fx and `Call` look for it, as operators have it

    @classmethod
    def of(cls, kind: str, body: Callable[..., Any], names: Sequence[str]) -> Block:
        """A block whose inputs and parameters have names."""
        arguments = [SimpleNamespace(name=n, kwarg_only=False, default_value=None) for n in names]
        return cls(kind, body, SimpleNamespace(arguments=arguments, is_mutable=False))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)

    def __str__(self) -> str:
        return self.kind

    @property
    def __name__(self) -> str:
        return self.kind.rpartition(".")[2]


GROUPED = Block.of(GROUPED_PRODUCT, by_groups, ["input", "weight", "offs"])
"""The product of rows with the matrix of their group, in any precision."""


def operation(row: Operator) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function one operation of every graph, with a row of its own.

    The function takes tensors and numbers, annotated, and returns a tensor; it is differentiated
    as before.

    Arguments:
        row: how relevance passes it.

    Example:
        >>> @nrm.operators.operation(nrm.operators.PassThrough("activation"))
        ... def cube(x: Tensor) -> Tensor:
        ...     return x**3
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{function.__module__}_{function.__qualname__}"
        name = "".join(c if c.isalnum() else "_" for c in name)
        while hasattr(torch.ops.nrm, name):  # defined again, as in a notebook
            name += "_"
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
        register(row, f"nrm.{name}")
        operator: Callable[..., Any] = getattr(torch.ops.nrm, name)
        return operator

    return decorate


# -- which operators on complex numbers are linear -------------------------------------------------

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
    found = row_of(node)
    if found is not None and found[1].moves and found[1].kind in ("view", "where"):
        return _fills_with_zero(*found) and all(
            parent in moving or _picks_out(parent) or _is_zero(parent)
            for parent in node.all_input_nodes
        )
    if name == "copy":  # of what it writes over, nothing is read but its shape
        return node.args[1] in moving
    return name in _ALONE or name.startswith(("fft_", "_fft_"))


def _fills_with_zero(call: Call, row: Operator) -> bool:
    """Whether what takes the place of numbers, if anything does, is zero."""
    filler = row.filler if isinstance(row, Filling) else None
    return filler is None or (isinstance(call[filler], int | float) and call[filler] == 0)


def _is_zero(node: Node) -> bool:
    """Whether a node is a tensor of zeros, or a part of one."""
    if node.op != "call_function":
        return False
    if function_of(node).fills == 0:
        return True
    found = row_of(node)
    return found is not None and found[1].moves and all(map(_is_zero, node.all_input_nodes))


def _picks_out(node: Node) -> bool:
    """Whether a node holds indices or a mask."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _times_read(node: Node, parent: Node) -> int:
    """How often a node reads another."""
    places: list[bool] = []
    torch.fx.node.map_arg((node.args, node.kwargs), lambda leaf: places.append(leaf is parent))
    return sum(places)


def written_over(
    base: Tensor,
    src: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    """`aten.slice_scatter`, of which torch has no derivative for complex numbers."""
    places = torch.arange(base.shape[dim], device=base.device)[start:end:step]
    return base.index_copy(dim, places, src)


def written(base: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten.copy`, of which torch has none."""
    return src.to(base.dtype).expand_as(base)


DIFFERENTIABLE: dict[object, Callable[..., Tensor]] = {
    torch.ops.aten.slice_scatter.default: written_over,
    torch.ops.aten.copy.default: written,
}
"""What computes the same on complex numbers, with derivatives."""
