"""The last function of a model, looked through: what is explained is the logit behind it.

A softmax or a sigmoid is positive where its logit is negative, and a logarithm of either is
negative where the logit is positive. Shares are those of the logit, so that shares times the
model's own output turn signs round. The measure therefore begins at the logits, on which the
views, casts and signs that follow the function are repeated. Where only some of the outputs are
such (boxes beside their scores), the others stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import Node

from nrm.capture.nodes import is_float_tensor
from nrm.operators import Call, Function, function_of, picks, row_of
from nrm.operators.call import GATHER, NEGATIVE, SIGN, TIMES, UNKNOWN, WITH_AXIS, WITHOUT_AXIS

Heads = Literal["logits", "keep"]
"""Whether the last function is looked through, or explained with all the rest."""

_LOGITS = ("softmax", "log_softmax", "sigmoid", "log_sigmoid")
"""Functions whose argument is called a logit, by role (`nrm.operators.call`)."""


@dataclass(frozen=True)
class Head:
    """What stands between the explained neurons and the model's output.

    Attributes:
        explained: the node that is explained, shaped like the output.
        functions: what was looked through, the outermost first.
        twins: the nodes that were looked through, and the one that stands for each.
    """

    explained: Node
    functions: tuple[str, ...]
    twins: dict[Node, Node]

    def __str__(self) -> str:
        what = "logits" if all(name in _LOGITS for name in self.functions) else "values"
        return f"{what} behind {' and '.join(self.functions)}"


def look_through(graph: FxGraph, inputs: Sequence[Node], output: Node) -> Head | None:
    """The head of a captured graph, if its output has one; what stands for it is added.

    Arguments:
        inputs: the placeholders of the model's inputs.
        output: the node of the model's output.
    """
    varying = set(inputs)
    for node in graph.nodes:
        if not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    found: Head | None = None
    while True:
        search = _Search(graph, varying, output if found is None else found.explained)
        if search.head is None:
            return found
        known = {} if found is None else found.twins
        twins = {node: search.head.twins.get(twin, twin) for node, twin in known.items()}
        functions = () if found is None else found.functions
        found = Head(
            search.head.explained,
            tuple(dict.fromkeys((*functions, *search.head.functions))),
            search.head.twins | twins,
        )


class _Search:
    """Goes back from the output to the functions that are looked through, and repeats the way."""

    def __init__(self, graph: FxGraph, varying: set[Node], output: Node) -> None:
        self.graph, self.varying = graph, varying
        self.functions: dict[str, None] = {}
        self.region: dict[Node, bool] = {}
        self.twins: dict[Node, Node] = {}
        self.last: dict[Node, Node] = {}
        self.head: Head | None = None
        if self._leads(output):
            self.functions.clear()
            explained = self._twin(output)
            self.head = Head(explained, tuple(self.functions), self.twins)

    def _leads(self, node: Node) -> bool:
        """Whether neurons of a node are those of a head."""
        if node not in self.region:
            self.region[node] = False
            self.region[node] = self._passes(node) or _head(node) is not None
        return self.region[node]

    def _passes(self, node: Node) -> bool:
        if node.op != "call_function" or (picks(node) and not _carries_first(node)):
            return False
        if not picks(node) and self._step(node) is None:
            return False
        if _renormalised(node):
            return self._leads(node.all_input_nodes[0])
        carried = [parent for parent in node.all_input_nodes if self._carries(parent)]
        function = _function(node)
        if _routes(node) or picks(node) or function.same or function.role == "copy":
            return any(map(self._leads, carried))  # what is put beside a head stays what it is
        return bool(carried) and all(map(self._is_whole, carried))

    def _is_whole(self, node: Node) -> bool:
        """Whether all neurons of a node are those of a head."""
        if not self._leads(node) or not self._passes(node):
            return self._leads(node)
        return _renormalised(node) or all(
            self._is_whole(parent) for parent in node.all_input_nodes if self._carries(parent)
        )

    def _carries(self, node: Node) -> bool:
        """Whether a node holds values (or a tuple of them) that depend on the input."""
        if node not in self.varying:
            return False
        value = node.meta.get("val")
        return is_float_tensor(node) or isinstance(value, tuple | list)

    def _twin(self, node: Node) -> Node:
        """What stands for a node: the argument of a head, or the node's own step on twins."""
        if not self._leads(node):
            return node
        if node not in self.twins:
            if not self._passes(node):
                head = _head(node)
                assert head is not None
                name, self.twins[node] = head
                self.functions.setdefault(name)
            elif picks(node):
                producer = node.args[0]
                assert isinstance(producer, Node)
                if _function(producer).chooses:
                    self.twins[node] = self._chosen(node, producer)
                    return self.twins[node]
                self.twins[node] = self._add(node, (self._twin(producer), node.args[1]))
            else:
                step = self._step(node)
                assert step is not None
                self.twins[node] = step()
        return self.twins[node]

    def _step(self, node: Node) -> Callable[[], Node] | None:
        """How a node's twin is made; `None`: the node is no part of a head."""
        if _renormalised(node):
            return lambda: self._twin(node.all_input_nodes[0])
        function = _function(node)
        if function.role == "copy" or _routes(node):
            return lambda: self._copy(node)
        if function.chooses and isinstance(node.meta.get("val"), tuple | list):
            return lambda: self._copy(node)  # read by `_chosen`
        return self._ordered(node)

    def _ordered(self, node: Node) -> Callable[[], Node] | None:
        """A function that keeps the order of values, or turns it round: all that is repeated of it
        is its sign."""
        found = row_of(node)
        if found is None:
            return None
        call, row = found
        carried = [(name, parent) for name, parent in call.nodes() if self._carries(parent)]
        if not carried:
            return None
        name, moving = carried[0]
        order = row.order(call, name)
        others = [parent for parent in node.all_input_nodes if parent is not moving]
        if order is None or (order.among_positive and not _is_positive(moving)):
            return None
        if row.one_parent:
            if moving is not node.args[0]:
                return None
        elif len(carried) > 1 or not self.varying.isdisjoint(others):
            return None
        if _reshapes(node, moving):
            return None  # broadcast to other neurons
        if isinstance(order.by, Node):
            return lambda: self._times_sign(node, moving, order.by, order.falls)
        if not isinstance(order.by, int | float) or order.by == 0:
            return None
        if order.falls == (order.by < 0):
            return lambda: self._twin(moving)
        return lambda: self._add(node, (self._twin(moving),), NEGATIVE)

    def _times_sign(self, node: Node, moving: Node, constant: Node, falls: bool) -> Node:
        """What stands for an operand, times the sign of a constant tensor."""
        twin = self._twin(moving)
        sign = self._constant(node, SIGN, constant)
        if falls:
            sign = self._constant(node, NEGATIVE, sign)
        return self._add(node, (twin, sign), TIMES)

    def _chosen(self, node: Node, producer: Node) -> Node:
        """The logits of what was chosen: of the largest probability, not the largest logit."""
        call = Call.of(producer)
        axis, values = call["dim"], node.meta["val"]
        indices = self._add(node, (producer, 1))
        indices.meta["val"] = producer.meta["val"][1]
        dropped = "keepdim" in call.arguments and not call["keepdim"]
        if dropped:
            indices = self._add(node, (indices, axis), WITH_AXIS)
            indices.meta["val"] = producer.meta["val"][1].unsqueeze(axis)
        chosen = self._add(node, (self._twin(call["self"]), axis, indices), GATHER)
        if dropped:
            chosen.meta["val"] = values.unsqueeze(axis)
            self.twins[producer] = chosen  # its name
            chosen = self._add(node, (chosen, axis), WITHOUT_AXIS)
        return chosen

    def _constant(self, node: Node, target: Any, constant: Node) -> Node:
        """A function of a constant, computed beside a node."""
        result = self._add(node, (constant,), target)
        result.meta = dict(constant.meta)
        self.varying.discard(result)
        return result

    def _copy(self, node: Node) -> Node:
        """The same operator on what stands for its operands."""

        def substitute(leaf: Node) -> Node:
            return self._twin(leaf) if self._carries(leaf) else leaf

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), substitute)
        return self._add(node, args, node.target, kwargs)

    def _add(
        self,
        node: Node,
        args: tuple[Any, ...],
        target: Any = operator.getitem,
        kwargs: dict[str, Any] | None = None,
    ) -> Node:
        with self.graph.inserting_after(self.last.get(node, node)):
            twin = self.graph.call_function(target, args, kwargs or {})
        self.last[node] = twin
        twin.meta = dict(node.meta)
        self.varying.add(twin)
        return twin


def _function(node: object) -> Function:
    """What a node computes; nothing is known of what is no operator of torch's own."""
    if not isinstance(node, Node) or getattr(node.target, "namespace", "") != "aten":
        return UNKNOWN
    return function_of(node)


def _role(node: object) -> str:
    return _function(node).role


def _head(node: Node) -> tuple[str, Node] | None:
    """The function that a node is, and its argument."""
    if not is_float_tensor(node):
        return None
    function = _function(node)
    if function.hides_sign:
        return function.role, node.all_input_nodes[0]
    if function.role in ("over", "minus") and len(node.args) == 2:
        return _written_out(*node.args)
    return None


def _written_out(first: Any, second: Any) -> tuple[str, Node] | None:
    """`exp(x) / exp(x).sum()` and `x - x.logsumexp()`, whatever is subtracted from x before."""
    second = _spread(second)
    if not isinstance(first, Node) or not isinstance(second, Node) or not second.args:
        return None
    if _role(second) == "logsumexp" and _same(second.args[0], first):
        return "log_softmax", _unshifted(first)
    if _role(second) == "log":
        total = _summed(second.args[0])
        if total is not None and _role(total) == "exp" and _same(total.args[0], first):
            return "log_softmax", _unshifted(first)
    if _role(first) == "exp" and isinstance(first.args[0], Node) and _same(_summed(second), first):
        return "softmax", _unshifted(first.args[0])
    return None


def _routes(node: Node) -> bool:
    """Whether a node moves values to other places, or puts constants in the place of some."""
    found = row_of(node)
    return found is not None and found[1].moves and found[1].kind in _ROUTES


_ROUTES = ("view", "where", "pad", "interpolation")
"""Each neuron has one parent, or none (of interpolation: to the nearest)."""


def _carries_first(node: Node) -> bool:
    """Whether what a node picks of several results are values, not where they were."""
    return bool(not _function(node.args[0]).chooses or node.args[1] == 0)


def _renormalised(node: Node) -> bool:
    """Whether a node divides positive numbers by their own sum."""
    if _role(node) != "over" or len(node.args) != 2:
        return False
    first, second = node.args
    if not isinstance(first, Node) or _written_out(first, second) is not None:
        return False
    return _same(_summed(second), first) and _is_positive(first)


def _is_positive(first: Node) -> bool:
    """Whether a node holds probabilities and the like, not their logarithms."""
    while _function(first).keeps_positive and isinstance(first.args[0], Node):
        first = first.args[0]
    return _function(first).positive


def _spread(value: Any) -> Any:
    """What a divisor is before it is expanded, or kept from zero."""
    while isinstance(value, Node) and (_role(value) in ("expand", "clamp") or _is_nudged(value)):
        value = value.args[0]
    return value


def _is_nudged(node: Node) -> bool:
    return _role(node) == "plus" and isinstance(node.args[1], int | float)


def _summed(value: Any) -> Node | None:
    """What a sum (or a norm that is one, of positive numbers) adds up."""
    total = _spread(value)
    if not isinstance(total, Node):
        return None
    is_norm = _role(total) == "norm" and total.args[1:2] == (1.0,)
    if not is_norm and _role(total) != "sum":
        return None
    return total.args[0] if isinstance(total.args[0], Node) else None


def _same(one: Any, other: Any) -> bool:
    """Whether two nodes are one, or the same operator on the same."""
    if one is other or not isinstance(one, Node) or not isinstance(other, Node):
        return bool(one is other or (not isinstance(one, Node) and one == other))
    alike = one.op == other.op == "call_function" and one.target is other.target
    alike = alike and len(one.args) == len(other.args) and one.kwargs == other.kwargs
    return alike and all(map(_same, one.args, other.args))


def _unshifted(node: Node) -> Node:
    """The logits from which their own largest was subtracted."""
    if _role(node) == "minus" and len(node.args) == 2:
        logits, largest = node.args
        while isinstance(largest, Node) and (picks(largest) or _role(largest) == "detach"):
            largest = largest.args[0]
        if not isinstance(largest, Node) or _role(largest) != "largest":
            return node
        if largest.args[0] is logits:
            assert isinstance(logits, Node)
            return logits
    return node


def _reshapes(node: Node, other: Node) -> bool:
    """Whether two nodes differ in shape."""
    shapes = []
    for one in (node, other):
        value = one.meta["val"]
        shapes.append([str(size) for size in value.shape] if isinstance(value, Tensor) else [])
    return shapes[0] != shapes[1]
