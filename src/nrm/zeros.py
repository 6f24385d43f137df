"""Explicit zeros: neurons that the model's code sets to zero, whatever the input.

Padding before a convolution, zeros that `cat` puts beside a branch, frames that a mask blanks.
Beside real parents they are none, as the padding inside a convolution is none: two spellings of one
network have one heatmap, under every rule. Where a neuron has no other parents they are its
parents, so that no relevance is lost.

Known from the graph, never from values that happen to be zero: an operator writes the constant, or
multiplies by it, at places that no neuron's value decides, and what moves neurons about moves the
zeros with them. A parameter that is zero may be trained: it makes no explicit zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import UnsupportedOperatorError
from nrm.graph import Graph, Operation
from nrm.operators import (
    Call,
    Identity,
    Operator,
    Product,
    Quotient,
    Routing,
    Sum,
    carries_none,
    lookup,
)
from nrm.operators.routing import Copy, Filling
from nrm.operators.sums import ScatterSum

_ATEN = torch.ops.aten

_MADE: dict[Any, float | str] = {
    _ATEN.zeros: 0.0,
    _ATEN.zeros_like: 0.0,
    _ATEN.new_zeros: 0.0,
    _ATEN.zero: 0.0,
    _ATEN.full: "fill_value",
    _ATEN.full_like: "fill_value",
    _ATEN.new_full: "fill_value",
    _ATEN.fill: "value",
}
"""What makes a constant tensor: of which value, or of that in which argument."""

_LEAST = frozenset([_ATEN.min, _ATEN.amin, _ATEN.minimum, _ATEN.fmin])
_REORDERING = frozenset([_ATEN.topk, _ATEN.sort, _ATEN.cummax])


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
                real = _Telling(*found, value, values, known, self).real().to(value.dtype)
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
        try:
            call = Call.of(node)
            row = lookup(call.target)
            row = None if row is None else row.specialize(call)
        except (AssertionError, UnsupportedOperatorError):
            return  # refused by name where the graph is built
        if isinstance(row, Product) and "recurrent" in node.meta:
            return  # the state that a cell starts from is a value, whatever it is
        if row is not None and self._passes_zeros(call, row):
            self._calls[node] = call, row
            self._may.add(node)

    def factor(self, call: Call) -> Any:
        """What multiplies the one variable of a product; `None` where both are. A gate on zero is
        a gate still."""
        others = [call[name] for name in ("self", "other") if call[name] not in self._carries]
        return others[0] if len(others) == 1 else None

    def trained(self, factor: Any) -> bool:
        """Whether something is a parameter, or computed from one."""
        return factor in self._trained

    def _multiplies(self, call: Call, reads: Sequence[str]) -> bool:
        """Whether a product of a variable and a constant may be zero by either."""
        factor = self.factor(call)
        if factor is None:
            return False
        if reads:
            return True
        if not isinstance(factor, Node):
            return bool(factor == 0)
        known = self._constants.get(factor)  # what a mask decides is looked at in time
        zero = not isinstance(known, Tensor) or bool((known == 0).any())
        return zero and not self.trained(factor)

    def _passes_zeros(self, call: Call, row: Operator) -> bool:
        reads = [name for name, node in call.nodes() if node in self._may]
        if isinstance(row, Filling):
            return bool(reads) or (writes_zero(call, row) and self.placed(call, row))
        if isinstance(row, Product) and not isinstance(row, Quotient):
            return self._multiplies(call, reads)
        if not reads or call.target.overloadpacket in _REORDERING:
            return False
        if isinstance(row, Copy):
            return "src" in reads
        if isinstance(row, Quotient):
            return reads == ["self"] and call["other"] not in self._carries
        if isinstance(row, Identity):
            return len(reads) == 1 and (row.elementwise or row.at_zero == "zero")
        if isinstance(row, ScatterSum):
            return "self" in reads and self.placed(call, row)
        if isinstance(row, Routing):
            return self.placed(call, row) and set(reads) <= set(row.passes or ())
        return isinstance(row, Sum)


class _Telling:
    """One call on what tells explicit zeros from others."""

    def __init__(
        self,
        call: Call,
        row: Operator,
        value: Tensor,
        values: Mapping[Node, Any],
        known: Mapping[Node, Tensor],
        zeros: ExplicitZeros,
    ) -> None:
        self.call, self.row, self.value, self.values = call, row, value, values
        self.known, self.zeros = known, zeros

    def real(self) -> Tensor:
        """`[*value]`: 0 at its explicit zeros, 1 elsewhere."""
        call, row = self.call, self.row
        if isinstance(row, Copy):
            return self._real(call["src"]).expand(self.value.shape)
        if isinstance(row, Sum):
            sides = [self._real(call[name]) for name in ("self", "other")]
            return torch.maximum(*sides).expand(self.value.shape)
        if isinstance(row, Product) and not isinstance(row, Quotient):
            return self._multiplied()
        if isinstance(row, Identity | Quotient):
            return self._of_one()
        if isinstance(row, ScatterSum):  # where nothing arrives
            told = {name: self._real(call[name]) for name in row.passes or ()}
            return self._run(told | ({"alpha": 1} if "alpha" in call.arguments else {})) != 0
        return self._routed(row)

    def _multiplied(self) -> Tensor:
        """Of a variable times a constant: zero where either is."""
        factor = self.zeros.factor(self.call)
        (variable,) = (self.call[n] for n in ("self", "other") if self.call[n] is not factor)
        real, there = self._real(variable).expand(self.value.shape), self._plain(factor)
        if self.zeros.trained(factor):
            return real
        return real * (there != 0 if isinstance(there, Tensor) else float(there != 0))

    def _of_one(self) -> Tensor:
        """Of a function of one neuron each: where it makes zero of zero."""
        told = list(dict.fromkeys(node for _, node in self.call.nodes() if self._told(node)))
        if len(told) != 1:  # there may have been some, and are none for this input
            return torch.ones_like(self.value)
        (operand,) = told
        made = self.call.map(
            lambda leaf: (
                torch.zeros_like(self.values[leaf]) if leaf is operand else self._plain(leaf)
            )
        )()
        real = self._real(operand).expand(self.value.shape)
        return torch.where(made == 0, real, 1.0)

    def _routed(self, row: Operator) -> Tensor:
        """Of what moves neurons about: the same operator in the place of values."""
        call = self.call
        changed: dict[str, Any] = {}
        for name in row.passes or ():
            given = call.get(name)
            several = isinstance(given, list | tuple)
            changed[name] = [self._real(g) for g in given] if several else self._real(given)
        if isinstance(row, Filling) and row.filler is not None:
            zero = writes_zero(call, row) and self.zeros.placed(call, row)
            changed[row.filler] = 0.0 if zero else 1.0
        changed = {name: given for name, given in changed.items() if name in call.arguments}
        least = getattr(call.target, "overloadpacket", None) in _LEAST
        if least or call.get("reduce") == "amin":  # zero only where all are
            changed = {name: _flipped(given) for name, given in changed.items()}
            return 1 - self._run(changed)
        return self._run(changed)

    def _run(self, changed: dict[str, Any]) -> Tensor:
        found: Tensor = self.call.map(self._plain)(**changed)
        return found

    def _told(self, node: Node) -> bool:
        return node in self.known or self.zeros.blank(node)

    def _plain(self, leaf: Any) -> Any:
        return self.values[leaf] if isinstance(leaf, Node) else leaf

    def _real(self, argument: Any) -> Tensor:
        """What tells the explicit zeros of an argument."""
        if not isinstance(argument, Node):
            return self.value.new_full((), float(argument != 0))
        if argument in self.known:
            return self.known[argument].to(self.value.dtype)
        return torch.full_like(
            self.values[argument], float(not self.zeros.blank(argument)), dtype=self.value.dtype
        )


def writes_zero(call: Call, row: Filling) -> bool:
    """Whether what takes the place of neurons is zero."""
    written = 0.0 if row.filler is None else call[row.filler]
    return written is None or (isinstance(written, int | float) and written == 0)


def _made_zero(node: Node) -> bool:
    made = _MADE.get(getattr(node.target, "overloadpacket", None))
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


def _flipped(real: Any) -> Any:
    return [1 - each for each in real] if isinstance(real, list) else 1 - real
