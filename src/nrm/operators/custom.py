"""Functions and modules of a user's own as operators with a row in the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from nrm.operators.row import Operator
from nrm.operators.table import register

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


def operation(row: Operator) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function one operation of every graph, with a row of its own.

    The function takes tensors and numbers, annotated, and returns a tensor; it is differentiated
    as before.

    Arguments:
        row: how relevance passes it.

    Example:
        >>> @nrm.operators.operation(Identity("activation"))
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
