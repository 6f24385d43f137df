"""One operation prepared for messages, as a graph prepares it, with every `R(i|j)` laid out."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._ops import OpOverloadPacket
from torch.fx import Graph, Node

from nrm.errors import UnsupportedOperatorError
from nrm.operators import Block, Call, Operator, Propagation, Setting, Slot, ToFirstOrder, fill
from nrm.rules import Rule

CLOSE = 1e-7
"""How far numbers in double precision may be apart, relative to the largest."""


@dataclass
class Case:
    """An operation ready for messages.

    Attributes:
        name: what is checked, for errors.
        node_call: the call on graph nodes; `call` has values, and slots for the operands.
        slots: the operands' arguments and nodes.
        given: every tensor of the call, by node.
        values: the operands' values.
    """

    name: str
    row: Operator
    node_call: Call
    call: Call
    slots: list[tuple[str, Node]]
    given: dict[Node, Tensor]
    values: list[Tensor]
    setting: Setting
    output: Tensor
    propagation: Propagation
    dense: list[Tensor] = field(init=False)
    """For each operand, the late leaf last, `R(i|j)` as `[parents, neurons]`."""

    def __post_init__(self) -> None:
        self.dense = self.lay_out(self.propagation)

    @property
    def operands(self) -> list[str]:
        late = [] if self.setting.late_leaf is None else [self.setting.late_leaf]
        return [name for name, _ in self.slots] + late

    @property
    def shapes(self) -> list[torch.Size]:
        late = [] if self.setting.late_leaf is None else [self.propagation.late_shape()]
        return [value.shape for value in self.values] + late

    @property
    def wanted(self) -> list[bool]:
        return [True] * len(self.operands)

    def run(self, values: Sequence[Tensor]) -> Tensor:
        """The function, of other values of its operands."""
        result: Tensor = fill(self.call, values)()
        return result

    def lay_out(self, propagation: Propagation, normalized: bool = True) -> list[Tensor]:
        """What one message from each neuron becomes, as a matrix for each operand."""
        count = self.output.numel()
        messages = torch.eye(count, dtype=torch.float64).view(count, *self.output.shape)
        pulled = propagation.send_on(messages, self.wanted, normalized)
        return [
            torch.zeros(shape.numel(), count, dtype=torch.float64)
            if part is None
            else part.reshape(count, -1).mT.clone()
            for part, shape in zip(pulled, self.shapes, strict=True)
        ]

    def fail(self, law: str, what: str, look: str) -> NoReturn:
        bias = "an input" if self.setting.late_leaf == "bias" else "none or dropped"
        raise AssertionError(f"{self.name} (bias: {bias}) breaks the law {law!r}: {what}. {look}")

    def compare(
        self, law: str, found: Sequence[Tensor], expected: Sequence[Tensor], look: str
    ) -> None:
        """Whether matrices `[parents, neurons]` of all operands are equal."""
        for name, shape, one, other in zip(
            self.operands, self.shapes, found, expected, strict=True
        ):
            off = (one - other).abs().nan_to_num(torch.inf, torch.inf)
            if one.numel() and float(off.max()) > CLOSE * max(1.0, float(other.abs().max())):
                i, j = divmod(int(off.argmax()), off.shape[1])
                parent, neuron = place_of(i, shape), place_of(j, self.output.shape)
                self.fail(
                    law,
                    f"between {name}{parent} and the output's {neuron} there is "
                    f"{float(one[i, j]):.6g} where {float(other[i, j]):.6g} is expected, off by "
                    f"{float(off[i, j]):.3g}",
                    look,
                )


def prepare(
    row: Operator,
    target: Any,
    args: Sequence[Any],
    rule: Rule,
    bias_is_input: bool,
    name: str,
    *,
    options: dict[str, Any] | None = None,
    carries: Sequence[str] | None = None,
    alphas: tuple[float, float] = (0.7, 0.3),
    real: Sequence[Tensor] = (),
    following: tuple[Call, ...] = (),
) -> Case:
    """A call of an operator, with some of its arguments as operands (see `check_operator`).

    Arguments:
        name: what is checked, for errors.
        real: for each operand 0 at its explicit zeros and 1 elsewhere; none: it has none.
        following: the activation that follows, for rules that read ahead.
    """
    node_call, given = bound(target, args, options or {})
    row = row.specialize(node_call)
    passed = carries if carries is not None else row.passes
    varying = {
        node
        for argument, node in node_call.nodes()
        if given[node].is_floating_point() and (passed is None or argument in passed)
    }
    slots = row.operands(node_call, varying.__contains__, "checked")
    if rule.first_order and row.curves(slots, along_path=False):
        row = ToFirstOrder(row)
        slots = row.operands(node_call, varying.__contains__, "checked")
    if not slots:
        raise UnsupportedOperatorError(
            f"{name}: the row passes relevance to {passed}, and none of the call's arguments "
            f"({', '.join(node_call.arguments)}) is a real tensor of these."
        )
    row.check(node_call, slots, "checked")
    places = iter(node_call.places())
    chosen = {
        next((n, place) for n, place, node in places if (n, node) == slot): Slot(index)
        for index, slot in enumerate(slots)
    }

    def substitute(argument: str, place: int, leaf: Any) -> Any:
        if not isinstance(leaf, Node):
            return leaf
        return chosen.get((argument, place), given[leaf])

    call = node_call.map_places(substitute)
    values = [given[node].clone() for _, node in slots]
    output = fill(call, values)()
    if isinstance(output, tuple | list):  # the first of several results
        node_call, call = replace(node_call, item=0), replace(call, item=0)
        output = output[0]
    setting = Setting(
        "checked",
        rule,
        strict=False,
        output_dim=output.dim(),
        alphas=alphas if row.is_product and len(slots) > 1 else (),
        late_leaf=row.late_leaf(node_call, slots, rule, bias_is_input),
        following=following,
        real=list(real),
    )
    computed, propagation = row.prepare(call, values, setting)
    case = Case(name, row, node_call, call, slots, given, values, setting, computed, propagation)
    if not torch.allclose(computed, output, atol=1e-9):
        case.fail("values", "prepare returns another output than the operator", "Look at prepare.")
    return case


def bound(
    target: Any, args: Sequence[Any], options: dict[str, Any]
) -> tuple[Call, dict[Node, Tensor]]:
    """A call on graph nodes, and their values."""
    graph, given = Graph(), dict[Node, Tensor]()

    def enter(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [enter(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"given_{len(given)}")
        node.meta["val"] = given[node] = value
        return node

    node = graph.call_function(
        target, tuple(map(enter, args)), {name: enter(value) for name, value in options.items()}
    )
    return Call.of(node), given


def runnable(function: Any, inputs: list[Any]) -> tuple[Any, list[Any], list[str]]:
    """An operator that a graph can hold, all its arguments, and of a module the inputs' names."""
    if isinstance(function, OpOverloadPacket):
        (first, *_) = function.overloads()  # type: ignore[no-untyped-call]
        return getattr(function, first), inputs, []
    if not isinstance(function, nn.Module):
        return function, inputs, []
    module = deepcopy(function).double()
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    names = ["input" + (f"_{index}" if index else "") for index in range(len(inputs))]

    def body(*given: Any) -> Any:
        kept = dict(zip(state, given[len(inputs) :], strict=True))
        return torch.func.functional_call(module, kept, given[: len(inputs)])

    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    block = Block.of(kind, body, [*names, *state])
    return block, [*inputs, *(value.detach() for value in state.values())], names


def double(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [double(item) for item in value]
    return (
        value.detach().double()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
    )


def place_of(index: int, shape: torch.Size) -> list[int]:
    return [int(axis) for axis in torch.unravel_index(torch.tensor(index), shape)]
