"""Explicit zeros: neurons that the model's code sets to zero, whatever the input.

Padding before a convolution, zeros that `cat` puts beside a branch, frames that a mask blanks.
Beside real parents they are none, as the padding inside a convolution is none: two spellings of one
network have one heatmap, under every rule. Where a neuron has no other parents they are its
parents, so that no relevance is lost.

Known from the graph, never from values that happen to be zero: an operator writes the constant, or
multiplies by it, at places that no neuron's value decides, and what moves neurons about moves the
zeros with them. What an operator does to explicit zeros is said by its row (`may_hold_zeros`,
`real`). A parameter that is zero may be trained: it makes no explicit zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.graph import Graph, Operation
from nrm.operators import Call, Operator, carries_none, function_of, row_of


class ExplicitZeros:
    """Where the explicit zeros of a graph are.

    What tells them is shaped like a value: 0 at its explicit zeros, 1 elsewhere.

    Arguments:
        constants: the values of the nodes that no input changes.
    """

    def __init__(self, graph: Graph, constants: Mapping[Node, Any]) -> None:
        nodes = list(graph.captured.graph.nodes)
        leaves = {v.node for v in graph.variables if v.kind in ("input", "embedding")}
        self._carries = _depending(nodes, leaves)
        self._constants = constants
        self._trained = _depending(nodes, {node for node in nodes if "trained" in node.meta})
        self._blank = {
            node
            for node, value in constants.items()
            if node not in self._trained and _all_zero(value)
        }
        self._may = set(self._blank)
        self._calls: dict[Node, tuple[Call, Operator] | None] = {}
        for node in nodes:
            if node not in constants and node.op == "call_function":
                self._add(node)
        del self._constants  # most are not needed to run

    def of(self, node: Node, values: Mapping[Node, Any], known: dict[Node, Tensor]) -> None:
        """Find those of a node, given those of what it reads.

        Arguments:
            values: of the node, and of what it reads.
            known: what tells explicit zeros of each node that has any; is added to.
        """
        if node not in self._calls:
            return
        value = values.get(node)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        found = self._calls[node]
        with torch.no_grad():
            real = torch.zeros_like(value)
            if found is not None:
                call, row = found
                real = row.real(call, _Told(call, value, values, known, self)).to(value.dtype)
        if not bool(real.all()):
            known[node] = real

    def addend(
        self, operation: Operation, values: Mapping[Node, Any], known: Mapping[Node, Tensor]
    ) -> dict[str, Tensor]:
        """What tells the explicit zeros of the constant that is added to operands, by argument."""
        found: dict[str, Tensor] = {}
        if operation.late_leaf != "bias":
            return found
        call, like = operation.call, values[operation.slots[0]]
        for name, added in call.arguments.items():
            if not operation.operator.adds(call, name) or added in operation.slots:
                continue
            if not isinstance(added, Node):
                if added is not None and added == 0:
                    found[name] = like.new_zeros(())
            elif added in known:
                found[name] = known[added]
            elif self.blank(added) and (name != "bias" or _made_zero(added)):
                # A layer's own bias may be trained, whatever holds it.
                found[name] = torch.zeros_like(values[added])
        return found

    def blank(self, node: Node) -> bool:
        """Whether a constant is zeros."""
        return node in self._blank

    def placed(self, call: Call, row: Operator) -> bool:
        """Whether no neuron's value decides where an operator gets values from."""
        passes = row.passes or ()
        return not any(n not in passes and node in self._carries for n, node in call.nodes())

    def _add(self, node: Node) -> None:
        """Keep a node that may have explicit zeros."""
        if _made_zero(node):
            self._calls[node] = None
            self._may.add(node)
            return
        found = row_of(node)
        if found is None:
            return
        call, row = found
        if row.is_product and "recurrent" in node.meta:
            return  # the state that a cell starts from is a value, whatever it is
        reads = [name for name, parent in call.nodes() if parent in self._may]
        if row.may_hold_zeros(call, reads, self):
            self._calls[node] = found
            self._may.add(node)

    def depends(self, node: Any) -> bool:
        """Whether something depends on an input."""
        return node in self._carries

    def trained(self, factor: Any) -> bool:
        """Whether something is a parameter, or computed from one."""
        return factor in self._trained

    def may_be_zero(self, constant: Any) -> bool:
        """Whether a constant may hold a zero that is none of a parameter's."""
        if not isinstance(constant, Node):
            return bool(constant == 0)
        known = self._constants.get(constant)  # what a mask decides is looked at in time
        zero = not isinstance(known, Tensor) or bool((known == 0).any())
        return zero and not self.trained(constant)


class _Told:
    """What one call reads, for this input: values, and which of them are explicit zeros."""

    def __init__(
        self,
        call: Call,
        value: Tensor,
        values: Mapping[Node, Any],
        known: Mapping[Node, Tensor],
        graph: ExplicitZeros,
    ) -> None:
        self.value: Tensor = value
        self.graph = graph
        self._call, self._values, self._known = call, values, known

    def real(self, argument: Any) -> Tensor:
        """0 at the explicit zeros of an argument, 1 elsewhere; of the result's type."""
        if not isinstance(argument, Node):
            return self.value.new_full((), float(argument != 0))
        if argument in self._known:
            return self._known[argument].to(self.value.dtype)
        return torch.full_like(
            self._values[argument], float(not self.graph.blank(argument)), dtype=self.value.dtype
        )

    def some(self, argument: Any) -> bool:
        """Whether an argument has explicit zeros."""
        return argument in self._known or self.graph.blank(argument)

    def plain(self, argument: Any) -> Any:
        """An argument's value."""
        return self._values[argument] if isinstance(argument, Node) else argument

    def run(self, /, **changed: Any) -> Tensor:
        """The call on values, with some arguments replaced."""
        found: Tensor = self._call.map(self.plain)(**changed)
        return found


def _made_zero(node: Node) -> bool:
    made = function_of(node).fills
    if isinstance(made, str):
        made = Call.of(node).get(made)
    return isinstance(made, int | float) and made == 0


def _all_zero(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return False
    return not bool(value.any())


def _depending(nodes: Sequence[Node], sources: set[Node | None] | set[Node]) -> set[Node]:
    """The nodes whose values depend on those of others, themselves included."""
    found = set(sources)
    for node in nodes:
        if node.op != "call_function" or carries_none(node.target):  # type: ignore[arg-type]
            continue
        if isinstance(node.meta.get("val"), torch.SymInt | int):
            continue  # sizes
        if any(parent in found for parent in node.all_input_nodes):
            found.add(node)
    return {node for node in found if node is not None}
