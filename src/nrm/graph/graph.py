"""The computation graph that the measure lives on: variables, operations, cuts (appendix A)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from nrm.errors import CaptureError, QueryError, UnknownLayerError, UnsupportedOperatorError
from nrm.graph import addresses
from nrm.graph.capture import Captured
from nrm.graph.gates import SIGMOID, gate_rank, is_state
from nrm.operators import Call, Identity, Operator, Routing, carries_none, lookup
from nrm.rules import Alpha, Rule
from nrm.rules import Identity as IdentityRule

Kind = Literal["input", "embedding", "operation", "bias", "constant"]


class WalkSpecification(Protocol):
    """What decides how walks go (section 3.3): a composite."""

    def rule(self, operation: Operation, graph: Graph) -> Rule:
        """How a weighted sum is shared out."""

    def alpha(self, operation: Operation, graph: Graph) -> Alpha:
        """How the factors of a product share."""


@dataclass(eq=False)
class Variable:
    """A tensor that carries relevance; its elements are the neurons.

    Attributes:
        index: position in the graph; parents come before their children.
        name: the address to show; `aliases` are further names of the same tensor.
        kind: `"operation"` for a computed one. The others are leaves, where walks end: inputs,
            embeddings of integer inputs, biases (with `bias="input"`), and constants that are
            some neuron's only parent.
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
        kind: what it is, to show and to choose rules by.
        operands: where relevance goes; the late leaf last, if there is one.
        slots: the operands among the call's arguments, in order (without the late leaf).
        arguments: the name of each slot's argument.
        gates: how much each factor of a product is a gate.
        alphas: what each factor of a product takes.
        rule: how a weighted sum is shared out.
    """

    address: str
    operator: Operator
    call: Call
    module_type: str
    kind: str
    slots: tuple[Node, ...]
    arguments: tuple[str, ...]
    operands: tuple[Variable, ...] = ()
    gates: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    rule: Rule = field(init=False)
    late_leaf: str | None = None
    output: Variable = field(init=False)

    @property
    def late(self) -> Variable | None:
        """The leaf that enters here: a bias, or what neurons without parents are."""
        return self.operands[-1] if self.late_leaf is not None else None

    def __repr__(self) -> str:
        return f"Operation({self.address!r}, {self.kind})"


class Graph:
    """The variables and operations between the leaves and the explained output.

    A walk is a path from an output neuron to a neuron of a leaf.

    Arguments:
        captured: the model.
        specification: which rules and alphas apply where; a factor that takes nothing of a
            product is no parent, and what only leads there is no part of the graph.
        bias_is_input: biases are leaves.
        fallback: the row of operators that have none.
    """

    def __init__(
        self,
        captured: Captured,
        specification: WalkSpecification,
        bias_is_input: bool,
        fallback: Operator | None = None,
    ) -> None:
        self.captured = captured
        self.specification = specification
        self.bias_is_input = bias_is_input
        self.fallback = fallback
        self.variables: list[Variable] = []
        self.by_node: dict[Node, Variable] = {}
        self.silent: set[str] = set()
        self._refusals: dict[Variable, UnsupportedOperatorError] = {}
        self._varying: set[Node] = set(captured.inputs)
        self._build()
        self._specify(specification)
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
        """The model's real-valued inputs, and the embeddings of its integer inputs."""
        return [v for v in self.variables if v.kind in ("input", "embedding")]

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
            if name in self.silent:
                raise QueryError(
                    f"no walk visits {name!r}: wherever it enters a product, the composite gives "
                    "the other factor all (a gate takes none), so its relevance is zero. "
                    "composites.AttnLRP shares products evenly."
                ) from None
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
        """All variables that depend on a leaf, with every operand that may take relevance."""
        captured = self.captured
        needed = _ancestors(captured.output)
        nodes = [node for node in captured.graph.nodes if node in needed]
        self._name_of = addresses.assign(nodes)
        for node, name in zip(captured.inputs, captured.names, strict=True):
            if _is_float_tensor(node) and "mask" not in name:
                self._add_input(node, name)
        for node in nodes:
            if node.op == "call_function":
                if any(parent in self._varying for parent in node.all_input_nodes):
                    self._varying.add(node)
                if self._depends(node):
                    self._add(node)
                elif node in self._varying and _is_embedding(node):
                    names = self._name_of[node]
                    embedding = self._variable(names[0], "embedding", node, names[1:])
                    embedding.channel_axis = -1
                    self.by_node[node] = embedding
        self._require_walks()

    def _require_walks(self) -> None:
        if self.captured.output not in self.by_node:
            raise CaptureError(
                "no walk leads from the output to an input: the output does not depend on any "
                "real-valued input or embedding."
            )

    def _specify(self, specification: WalkSpecification) -> None:
        """Keep what walks can visit, choose rules, and add the leaves that enter late."""
        for variable in self.variables:
            product = variable.producer
            if product is None or len(product.slots) < 2 or not product.operator.is_product:
                continue
            product.gates = tuple(gate_rank(s, self.by_node.__contains__) for s in product.slots)
            alphas = specification.alpha(product, self).coefficients(product.gates)
            taking = [i for i, alpha in enumerate(alphas) if alpha != 0]
            product.alphas = tuple(alphas[i] for i in taking)
            product.slots = tuple(product.slots[i] for i in taking)
            product.arguments = tuple(product.arguments[i] for i in taking)
            product.operands = tuple(product.operands[i] for i in taking)
        self._drop_unvisited()
        for operation in self.operations:
            rule = specification.rule(operation, self)
            if isinstance(rule, IdentityRule) and not (
                operation.operator.accepts_identity or isinstance(operation.operator, Identity)
            ):
                raise QueryError(
                    f"the composite gives {operation.address!r} the Identity rule, but "
                    f"{operation.kind} neurons have many parents. Choose a contribution rule."
                )
            operation.rule = rule
            if operation.operator.acts_on_last_axis(operation.call):
                operation.operands[0].channel_axis = -1
        with_late: list[Variable] = []
        for variable in self.variables:
            if variable.producer is not None:
                leaf = self._late_leaf(variable.producer)
                if leaf is not None:
                    with_late.append(leaf)
            with_late.append(variable)
        self.variables = with_late
        self._number()

    def _drop_unvisited(self) -> None:
        """Forget the variables that no walk from the output visits."""
        output = self.by_node[self.captured.output]
        visited = self.upstream(output) | {output}
        refused = [v for v in self.variables if v in visited and v in self._refusals]
        if refused:
            raise self._refusals[refused[-1]]
        if not any(variable.kind in ("input", "embedding") for variable in visited):
            raise CaptureError(
                "no walk leads from the output to an input: every path ends at constants."
            )
        # An input that the output ignores is there, without relevance.
        kept = [v for v in self.variables if v in visited or v.kind == "input"]
        names = {name for v in kept for name in (v.name, *v.aliases)}
        self.silent = {
            name for v in self.variables for name in (v.name, *v.aliases) if name not in names
        }
        self.variables = kept
        self.by_node = {node: v for node, v in self.by_node.items() if v in kept}
        self._number()

    def _number(self) -> None:
        for index, variable in enumerate(self.variables):
            variable.index = index

    def _late_leaf(self, operation: Operation) -> Variable | None:
        operator, operands = (
            operation.operator,
            list(zip(operation.arguments, operation.slots, strict=True)),
        )
        name = operator.late_leaf(operation.call, operands, operation.rule, self.bias_is_input)
        if name is None:
            return None
        operation.late_leaf = name
        kind: Kind = "bias" if name == "bias" else "constant"
        entered = operation.output
        leaf = Variable(
            0,
            f"{operation.address}.{name}",
            kind,
            entered.shape,
            entered.batch_axis,
            entered.channel_axis,
        )
        operation.operands += (leaf,)
        return leaf

    def _add_input(self, node: Node, name: str) -> None:
        variable = self._variable(name, "input", node)
        if len(self.captured.inputs) == 1:
            variable.aliases = (name,)
            variable.name = "input"
        self.by_node[node] = variable

    def _depends(self, node: Node) -> bool:
        return any(parent in self.by_node for parent in _parents(node))

    def _add(self, node: Node) -> None:
        """Add the operation of a node that reads a variable, unless its result carries none."""
        if not _is_float_tensor(node):
            return  # masks, indices and shapes carry no relevance; tuples are read by getitem
        address = self._name_of[node][0]
        try:
            operation = self._operation(node, address)
        except UnsupportedOperatorError as refusal:
            # Refused only if a walk gets here: gates and scales may be computed in any way.
            variable = self._variable(address, "operation", node, self._name_of[node][1:])
            self._refusals[variable] = refusal
            self.by_node[node] = variable
            return
        if operation is None:
            return
        output = self._variable(address, "operation", node, self._name_of[node][1:])
        output.producer = operation
        output.channel_axis = operation.operator.channel_axis(
            operation.call, operation.operands[0].channel_axis
        )
        operation.output = output
        self.by_node[node] = output

    def _operation(self, node: Node, address: str) -> Operation | None:
        call = _call(node, address)
        if carries_none(call.target):
            return None
        operator = lookup(call.target) or self.fallback
        if operator is None:
            raise UnsupportedOperatorError(
                f"no rule says how relevance passes {call.target} (in {address!r}, module type "
                f"{addresses.module_type(node) or 'unknown'}). Replace it in the model, give the "
                "operator a row with nrm.operators.register, or ask for a first-order "
                "approximation of such operators with Explainer(fallback=LocalLinear())."
            )
        operator = operator.specialize(call)
        slots = operator.operands(call, self.by_node.__contains__, address)
        if not any(slot in self.by_node for _, slot in slots):
            return None  # a constant made to look like a variable
        if operator.is_product and len(slots) == 1:
            slots = self._with_state(call, slots)
        operator.check(call, slots, address)
        return Operation(
            address,
            operator,
            call,
            addresses.module_type(node),
            operator.kind_of(slots),
            tuple(slot for _, slot in slots),
            tuple(name for name, _ in slots),
            tuple(self.by_node.get(slot) or self._add_constant(slot) for _, slot in slots),
        )

    def _with_state(self, call: Call, slots: list[tuple[str, Node]]) -> list[tuple[str, Node]]:
        """The factors of a gate times a constant state, which is a value like any other.

        The first step of a recurrent network multiplies gates with states that no input reaches.
        Parameters are no states: what is multiplied with them is scaled.
        """
        ((_, carrier),) = slots
        others = [(n, node) for n, node in call.nodes() if node is not carrier]
        if len(others) != 1 or gate_rank(carrier, self.by_node.__contains__) < SIGMOID:
            return slots
        ((_, other),) = others
        if not _is_float_tensor(other) or not other.meta["val"].dim() or not is_state(other):
            return slots
        return [pair for pair in call.nodes() if pair[1] in (carrier, other)]

    def _add_constant(self, node: Node) -> Variable:
        """A constant that is the only parent of some neurons: walks end there."""
        name = node.meta.get("parameter") or self._name_of[node][0]
        self.by_node[node] = self._variable(name, "constant", node)
        return self.by_node[node]

    def _variable(self, name: str, kind: Kind, node: Node, aliases: Sequence[str] = ()) -> Variable:
        shape, batch_axis = self._shape(node.meta["val"])
        variable = Variable(
            len(self.variables), name, kind, shape, batch_axis, None, tuple(aliases), node=node
        )
        self.variables.append(variable)
        return variable

    def _shape(self, value: Tensor) -> tuple[tuple[int | None, ...], int | None]:
        """The shape with `None` for the batch, and where the batch lies."""
        along = self.captured.batch_axis
        if not self.captured.batched:
            shape = tuple(int(size) for size in value.shape)
            # A capture for one sample: a first axis of one is the batch.
            if along != 0 or not shape or shape[0] != 1:
                return shape, None
            return (None, *shape[1:]), 0
        batches = {node.meta["val"].shape[along].node.expr for node in self.captured.inputs}
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


def first_tokens(graph: Graph) -> str:
    """The embeddings that the first integer input is looked up in.

    Raises:
        QueryError: there are none.
    """
    embeddings = {v.node: v.name for v in graph.variables if v.kind == "embedding"}
    for given in graph.captured.inputs:
        reached = {given}
        for node in graph.captured.graph.nodes:
            if node in embeddings and reached.intersection(node.all_input_nodes):
                return embeddings[node]
            integer = node.op == "call_function" and not _is_float_tensor(node)
            if integer and reached.intersection(node.all_input_nodes) and _same_tokens(node):
                reached.add(node)
    raise QueryError("the model embeds no integer input; name a layer with at=.")


def _same_tokens(node: Node) -> bool:
    """Whether an integer tensor still holds the tokens it was computed from."""
    return isinstance(lookup(node.target), Routing | Identity)  # type: ignore[arg-type]


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


def _is_embedding(node: Node) -> bool:
    return str(node.target) == "aten.embedding.default" and _is_float_tensor(node)


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
