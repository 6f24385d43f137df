"""The operator table: one row for every operator that relevance can pass.

`nrm.operators.aten` fills it with torch's operators, `register` with others. A row says how
relevance passes an operator, whether it is a gate in a product, keeps explicit zeros, may run in
place. In-place variants (`relu_`) use the row of the plain operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.operators.call import UNKNOWN, Call, Function, picks
from nrm.operators.propagation import Propagation, Setting
from nrm.operators.row import Operator

_TABLE: dict[str, Operator] = {}

_STANDARD: dict[str, Operator] = {}
"""The rows that the library gives, whatever is registered later."""

_FUNCTIONS: dict[str, Function] = {}
"""What is known of operators that have no row."""


def register(operator: Operator, *names: str | OpOverload | OpOverloadPacket | type) -> None:
    """Give operators their row.

    Arguments:
        operator: the row.
        names: operators, by name (`"aten.conv2d"`: every overload; `"aten.mean.dim"`: one;
            `"mylib.myop"`) or as they are (`torch.ops.mylib.myop`); or module classes, each of
            whose calls becomes one operation. Functions: see `operation`.

    Raises:
        TypeError: something else was named.
    """
    for name in names:
        if isinstance(name, type) and issubclass(name, nn.Module):
            name = f"{name.__module__}.{name.__qualname__}"
        elif isinstance(name, OpOverload | OpOverloadPacket):
            name = str(name)
        elif not isinstance(name, str):
            raise TypeError(
                f"a row is for an operator or a module class, not {name!r}. An operator is named "
                "as torch.ops.mylib.myop, also one that torch.library.custom_op made; a function "
                "of your own is decorated with nrm.operators.operation."
            )
        _TABLE[name.replace("::", ".")] = operator


def unregister(*names: str) -> None:
    """Take rows out of the table again, by the names that they were registered by."""
    for name in names:
        del _TABLE[name]


def keep_as_standard() -> None:
    """Take the rows that are there for those of the library."""
    _STANDARD.update(_TABLE)


def describe(function: Function, *names: str) -> None:
    """Say what operators compute that relevance does not pass, by name as `register` takes it."""
    for name in names:
        _FUNCTIONS[name] = function


def registered() -> Mapping[str, Operator]:
    """Every row of the table, by the name that it was registered by."""
    return MappingProxyType(_TABLE)


def has_row(name: str) -> bool:
    """Whether something of this very name has a row."""
    return name in _TABLE


def lookup(target: OpOverload) -> Operator | None:
    """The row of an operator, `None` where it has none."""
    name = str(target)
    return _TABLE.get(name) or _TABLE.get(name.rpartition(".")[0])


def standard(call: Call) -> Operator | None:
    """The row that this library gives a call's operator, whatever row has been registered since.

    `None` for operators of a user's own: what a row says of relevance says nothing of values.
    """
    name = str(call.target)
    row = _STANDARD.get(name) or _STANDARD.get(name.rpartition(".")[0])
    try:
        return None if row is None else row.specialize(call)
    except UnsupportedOperatorError:
        return None


def row_of(node: Node) -> tuple[Call, Operator] | None:
    """A node's call with the row that covers it; `None` where there is none.

    A node that picks one of several results is a call of what gave them (see `Call.of`).
    """
    source: object = node
    while isinstance(source, Node) and picks(source):
        source = source.args[0]
    if not hasattr(getattr(source, "target", None), "_schema"):
        return None
    call = Call.of(node)
    row = lookup(call.target)
    try:
        return None if row is None else (call, row.specialize(call))
    except UnsupportedOperatorError:
        return None  # refused by name if a walk gets there


def function_of(node: Node) -> Function:
    """What a node computes, as far as that is known."""
    found = None if picks(node) else row_of(node)
    if found is not None:
        call, row = found
        return row.function_of(call)
    name = str(node.target)
    return _FUNCTIONS.get(name) or _FUNCTIONS.get(name.rpartition(".")[0]) or UNKNOWN


def carries_none(target: OpOverload) -> bool:
    """Whether an operator's result says nothing of its operand's values (`zeros_like`)."""
    return _FUNCTIONS.get(str(target).rpartition(".")[0], UNKNOWN).carries_none


def reads_sizes(target: object) -> bool:
    """Whether an operator reads nothing of a tensor but how large it is."""
    return str(target).startswith(("aten.sym_", "aten.size"))


_READS_LAYOUT = ("aten.as_strided", "aten.as_strided_copy", "aten.as_strided_scatter")


def reads_layout(target: object) -> bool:
    """Whether an operator's result depends on how its operand lies in memory (`as_strided`)."""
    return str(target).rpartition(".")[0] in _READS_LAYOUT


def functional(target: OpOverload) -> OpOverload:
    """The plain operator for one that minds memory: `relu` for `relu_`, `reshape` for `view`, and
    without `out=` for one with it.

    Others as they are.
    """
    if target is torch.ops.aten.view.default:
        return torch.ops.aten.reshape.default
    packet, _, overload = str(target).rpartition(".")
    namespace, _, name = packet.partition(".")
    in_place = name.endswith("_") and not name.endswith("__")
    if not in_place and not any(argument.is_out for argument in target._schema.arguments):
        return target
    plain = getattr(getattr(torch.ops, namespace), name[:-1] if in_place else name, None)
    wanted = _types(target)
    # Overloads of one name may differ: `pow_.Scalar` raises a tensor, `pow.Scalar` a number.
    for candidate in (overload, *(plain.overloads() if plain is not None else ())):
        found = getattr(plain, candidate, None)
        if found in (None, target) or found._schema.is_mutable:
            continue
        if _types(found) == wanted:
            return found  # type: ignore[no-any-return]
    return target


def _types(target: OpOverload) -> list[str]:
    return [str(argument.type) for argument in target._schema.arguments if not argument.is_out]


def in_place(target: OpOverload) -> OpOverload:
    """The in-place variant of an elementwise operator that has a safe one; others as they are."""
    row = lookup(target)
    return target if row is None or row.in_place is None else row.in_place


class OneOf(Operator):
    """An operator that is one kind or another, as its arguments say: `scatter_reduce`, `pad`.

    Arguments:
        choices: `(condition on the call, row)`, the first that applies counts.
    """

    def __init__(self, *choices: tuple[Callable[[Call], bool], Operator]) -> None:
        super().__init__("")
        self.choices = choices

    def specialize(self, call: Call) -> Operator:
        for applies, operator in self.choices:
            if applies(call):
                return operator
        chosen = {
            name: value for name, value in call.arguments.items() if isinstance(value, str | bool)
        }
        raise UnsupportedOperatorError(f"no rule covers {call.target} with {chosen}.")

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        return self.specialize(call).prepare(call, values, setting)
