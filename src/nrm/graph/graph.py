"""The computation graph that the measure lives on: variables, operations, cuts (appendix A)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import CaptureError, UnknownLayerError, UnsupportedOperatorError
from nrm.graph import addresses
from nrm.graph.capture import Captured
from nrm.operators import Call, Operator, carries_none, lookup

Kind = Literal["input", "operation", "bias", "constant"]


@dataclass(eq=False)
class Variable:
    """A tensor that carries relevance; its elements are the neurons.

    Attributes:
        index: position in the graph; parents come before their children.
        name: the address to show; `aliases` are further names of the same tensor.
        kind: `"operation"` for a computed one. The others are leaves, where walks end: inputs,
            biases (with `bias="input"`), and constants that are some neuron's only parent.
        shape: `None` at the batch axis.
        batch_axis: `None` where the batch lies in no axis of its own.
        channel_axis: counted from the end.
    """

    index: int
    name: str
    kind: Kind
    shape: tuple[int | None, ...]
    batch_axis: int | None
    channel_axis: int | None = None
    aliases: tuple[str, ...] = ()
    producer: Operation | None = None
    node: Node | None = None

    @property
    def is_leaf(self) -> bool:
        return self.producer is None

    def __repr__(self) -> str:
        return f"Variable({self.name!r}, {self.kind}, {list(self.shape)})"


@dataclass(eq=False)
class Operation:
    """One operator call that relevance passes.

    Attributes:
        operands: where relevance goes; the bias last, where biases are inputs.
        slots: the operands among the call's arguments, in order (without the bias).
    """

    address: str
    operator: Operator
    call: Call
    module_type: str
    slots: tuple[Node, ...]
    operands: tuple[Variable, ...] = ()
    output: Variable = field(init=False)

    @property
    def kind(self) -> str:
        return self.operator.kind

    @property
    def bias(self) -> Variable | None:
        return self.operands[-1] if len(self.operands) > len(self.slots) else None

    def __repr__(self) -> str:
        return f"Operation({self.address!r}, {self.kind})"


class Graph:
    """The variables and operations between the inputs and the explained output.

    A walk is a path from an output neuron to a neuron of a leaf.
    """

    def __init__(self, captured: Captured, bias_is_input: bool) -> None:
        self.captured = captured
        self.bias_is_input = bias_is_input
        self.variables: list[Variable] = []
        self.by_node: dict[Node, Variable] = {}
        self._build()
        self.output = self.by_node[captured.output]
        self.output.aliases += ("output",)
        self._names = {
            name: variable
            for variable in reversed(self.variables)
            for name in (variable.name, *variable.aliases)
        }

    # -- looking at it ---------------------------------------------------------------------------

    @property
    def inputs(self) -> list[Variable]:
        return [v for v in self.variables if v.kind == "input"]

    @property
    def leaves(self) -> list[Variable]:
        return [v for v in self.variables if v.is_leaf]

    @property
    def operations(self) -> list[Operation]:
        return [v.producer for v in self.variables if v.producer is not None]

    def variable(self, name: str) -> Variable:
        """The variable of this name or alias.

        Raises:
            UnknownLayerError: with the nearest names.
        """
        try:
            return self._names[name]
        except (KeyError, TypeError):
            raise UnknownLayerError(str(name), self._names) from None

    @cached_property
    def cuts(self) -> list[Variable]:
        """The variables that every walk crosses exactly once, from the output down."""
        found: list[Variable] = []
        pending = {self.output}
        ended = False
        for variable in reversed(self.variables):
            if variable not in pending:
                continue
            if len(pending) == 1 and not ended:
                found.append(variable)
            pending.discard(variable)
            if variable.producer is None:
                ended = True
            else:
                pending.update(variable.producer.operands)
        return found

    def upstream(self, variable: Variable) -> set[Variable]:
        """The variables that a walk can reach from `variable`, itself not included."""
        found: set[Variable] = set()
        waiting = [variable]
        while waiting:
            producer = waiting.pop().producer
            for operand in producer.operands if producer else ():
                if operand not in found:
                    found.add(operand)
                    waiting.append(operand)
        return found

    def leading_to(self, targets: Collection[Variable]) -> set[Variable]:
        """The variables from which a walk can reach one of `targets`, themselves included."""
        leading = set(targets)
        for variable in self.variables:  # parents first
            if variable.producer and any(v in leading for v in variable.producer.operands):
                leading.add(variable)
        return leading

    # -- building it -----------------------------------------------------------------------------

    def _build(self) -> None:
        captured = self.captured
        needed = _ancestors(captured.output)
        nodes = [node for node in captured.graph.nodes if node in needed]
        self._name_of = addresses.assign(nodes)
        for node in captured.inputs:
            if _is_float_tensor(node):
                self._add_input(node)
        for node in nodes:
            if node.op == "call_function" and self._depends(node):
                self._add(node)
        if captured.output not in self.by_node:
            raise CaptureError(
                "no walk leads from the output to an input: the output does not depend on any "
                "real-valued input."
            )

    def _add_input(self, node: Node) -> None:
        variable = self._variable(node.name, "input", node)
        if len(self.captured.inputs) == 1:
            variable.aliases = (variable.name,)
            variable.name = "input"
        self.by_node[node] = variable

    def _depends(self, node: Node) -> bool:
        return any(parent in self.by_node for parent in _parents(node))

    def _add(self, node: Node) -> None:
        """Add the operation of a node that reads a variable, unless its result carries none."""
        if not _is_float_tensor(node):
            return  # masks, indices and shapes carry no relevance; tuples are read by getitem
        address = self._name_of[node][0]
        call = _call(node, address)
        if carries_none(call.target):
            return
        operator = lookup(call.target)
        if operator is None:
            raise UnsupportedOperatorError(
                f"no rule says how relevance passes {call.target} (in {address!r}, module type "
                f"{addresses.module_type(node) or 'unknown'}). Replace it in the model, or give "
                "the operator a row with nrm.operators.register."
            )
        slots = operator.operands(call, self.by_node.__contains__, address)
        operator.check(call, slots, address)
        operation = Operation(
            address,
            operator,
            call,
            addresses.module_type(node),
            tuple(slot for _, slot in slots),
        )
        operands = [self.by_node.get(slot) or self._add_constant(slot) for _, slot in slots]
        if self.bias_is_input and operator.has_bias(call, slots):
            _, batch_axis = self._shape(node.meta["val"])
            bias = Variable(len(self.variables), f"{address}.bias", "bias", (), batch_axis)
            self.variables.append(bias)
            operands.append(bias)
        operation.operands = tuple(operands)
        output = self._variable(address, "operation", node)
        output.aliases = tuple(self._name_of[node][1:])
        output.producer = operation
        output.channel_axis = operator.channel_axis(call, operands[0].channel_axis)
        operation.output = output
        self.by_node[node] = output

    def _add_constant(self, node: Node) -> Variable:
        """A constant that is the only parent of some neurons: walks end there."""
        name = node.meta.get("parameter", f"constant:{node.name}")
        self.by_node[node] = self._variable(name, "constant", node)
        return self.by_node[node]

    def _variable(self, name: str, kind: Kind, node: Node) -> Variable:
        shape, batch_axis = self._shape(node.meta["val"])
        variable = Variable(len(self.variables), name, kind, shape, batch_axis, node=node)
        self.variables.append(variable)
        return variable

    def _shape(self, value: Tensor) -> tuple[tuple[int | None, ...], int | None]:
        """The shape with `None` for the batch, and where the batch lies."""
        if not self.captured.batched:
            batch = self.captured.inputs[0].meta["val"].shape[0]
            shape = tuple(int(size) for size in value.shape)
            if not shape or shape[0] != batch:
                return shape, None
            return (None, *shape[1:]), 0
        batches = {
            node.meta["val"].shape[0].node.expr
            for node in self.captured.inputs
            if node.meta["val"].dim()
        }
        axis = None
        sizes: list[int | None] = []
        for position, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                if size.node.expr in batches and axis is None:
                    axis = position
                sizes.append(None)
            else:
                sizes.append(int(size))
        return tuple(sizes), axis


def _call(node: Node, address: str) -> Call:
    try:
        return Call.of(node)
    except AssertionError:
        raise UnsupportedOperatorError(
            f"{node.target} (in {address!r}) is no operator that nrm can look up."
        ) from None


def _parents(node: Node) -> Sequence[Node]:
    """The nodes that a node reads; through a getitem, those that the producer reads."""
    if "getitem" in str(node.target) and isinstance(node.args[0], Node):
        return _parents(node.args[0])
    return node.all_input_nodes


def _ancestors(output: Node) -> set[Node]:
    found: set[Node] = set()
    waiting: list[Node] = [output]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _is_float_tensor(node: Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
