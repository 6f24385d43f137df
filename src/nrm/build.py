"""From a captured model and a composite to the graph that relevance passes.

First a `Draft` of all that depends on an input, with every operand that may take relevance. Then
`build_graph` chooses rules and alphas, which decide what is a parent; what no walk visits is
forgotten, and leaves that enter late, such as biases, are added.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import sympy
from torch import Tensor
from torch.fx import Node

from nrm.capture import nodes as addresses
from nrm.capture.nodes import (
    Captured,
    ancestors,
    is_float_tensor,
    is_symbolic,
    reads_no_values,
    unfollowed,
)
from nrm.errors import CaptureError, QueryError, UnsupportedOperatorError
from nrm.graph import Graph, Kind, Operation, Variable, WalkSpecification
from nrm.heads import Head, Heads, look_through
from nrm.operators import MANY, Call, Operator, Samples, carries_none, lookup, picks
from nrm.rules import FromUniform, Identity, Rule
from nrm.slopes import follow_weights, places, take_between, take_to_first_order
from nrm.structure import Structure, gate_ranks, is_embedding


class Draft:
    """All that depends on a leaf, with every operand that may take relevance.

    Attributes:
        variables: parents before their children.
        by_node: the variable of a captured node that depends on an input or embedding.
        constants: that of a constant, for the operations where it is some neuron's only parent.
        refusals: why a variable's operation has no row. It is an error only if a walk gets there.
        steps: nodes that depend on an input, but only in steps (comparisons, indices, masks), with
            the node where they began to.
    """

    def __init__(
        self, captured: Captured, fallback: Operator | None, head: Head | None = None
    ) -> None:
        self.captured, self.head = captured, head
        self.explained = captured.output if head is None else head.explained
        self.fallback = fallback
        self.samples = captured.samples
        self.variables: list[Variable] = []
        self.by_node: dict[Node, Variable] = {}
        self.constants: dict[Node, Variable] = {}
        self.refusals: dict[Variable, UnsupportedOperatorError] = {}
        self.steps: dict[Node, Node] = {}
        self._lost: dict[Node, UnsupportedOperatorError] = {}
        self._build()

    @cached_property
    def _batches(self) -> set[sympy.Basic]:
        """The symbols of the batch's size."""
        return self.captured.batch_sizes

    def _build(self) -> None:
        """All variables that depend on a leaf, with every operand that may take relevance."""
        captured = self.captured
        needed = ancestors([self.explained])
        nodes = [node for node in captured.graph.nodes if node in needed]
        self._name_of = self._names()
        for node, name in zip(captured.inputs, captured.names, strict=True):
            if captured.takes_relevance(node, name):
                self._add_input(node, name)
            elif unfollowed(node) == "lost":
                self._lose(node, name)
            else:
                self.steps[node] = node
        for node in nodes:
            if node.op == "call_function" and not reads_no_values(node):
                self._follow(node)
        if self.explained in self.steps:
            begun = self.steps[self.explained]
            where = addresses.operator_name(begun) if begun.op == "call_function" else "it"
            raise CaptureError(
                "no walk leads from the output to an input: the output depends on them in steps "
                f"alone ({where} is constant around these values, as comparisons, indices, whole "
                "numbers and what rounds are), and steps take no relevance."
            )
        if self.explained not in self.by_node:
            raise CaptureError(
                "no walk leads from the output to an input: the output does not depend on any "
                "real-valued input or embedding (inputs called mask or something_mask are none)."
            )

    def _names(self) -> dict[Node, list[str]]:
        """All names of every node; what is looked through is called as what stands for it."""
        returned = ancestors([self.captured.output])
        names = addresses.assign(n for n in self.captured.graph.nodes if n in returned)
        for node, twin in self.head.twins.items() if self.head else ():
            names.setdefault(twin, []).extend(names[node])
        return names

    def _follow(self, node: Node) -> None:
        """Say what depends on an input: a variable, steps, or what nothing is known of."""
        parents = node.all_input_nodes
        if self._depends(node) or any(parent in self._lost for parent in parents):
            kind = unfollowed(node)
            if kind == "steps":
                self.steps[node] = node
            elif kind == "lost":
                self._lose(node, self._name_of[node][0])
            else:
                self._add(node)
            return
        begun = next((self.steps[parent] for parent in parents if parent in self.steps), None)
        if begun is None:
            return
        if is_embedding(node):
            names = self._name_of[node]
            embedding = self._variable(names[0], "embedding", node, names[1:])
            embedding.channel_axis = -1
            self.by_node[node] = embedding
        else:
            self.steps[node] = begun

    def _lose(self, node: Node, name: str) -> None:
        """Add what depends on an input and is not followed: an error if a walk gets there."""
        known = (self._lost[parent] for parent in node.all_input_nodes if parent in self._lost)
        value = node.meta["val"]
        if isinstance(value, Tensor | tuple | list):
            first = value if isinstance(value, Tensor) else value[0]
            what = "complex" if first.is_complex() else "quantised"
            hint = "Compute with real tensors there (a Fourier transform is a linear map)"
        else:
            what = "Python's"
            hint = "Keep them in tensors, without .item() or float(),"
        source = f"the input {name!r} holds"
        if node.op == "call_function":
            source = f"{node.target} (in {name!r}) makes, of what depends on the input,"
        self._lost[node] = next(known, None) or UnsupportedOperatorError(
            f"{source} {what} numbers, through which relevance is not followed: what is computed "
            f"from them would count as a constant. {hint} or make the part one operation with "
            "nrm.operators.operation."
        )
        if isinstance(value, Tensor):
            self._refuse(node, name, self._lost[node])

    def _refuse(self, node: Node, name: str, refusal: UnsupportedOperatorError) -> None:
        """Add a variable that is an error only if a walk gets there: gates may be anything."""
        variable = self._variable(name, "operation", node, self._name_of.get(node, [name])[1:])
        self.refusals[variable] = refusal
        self.by_node[node] = variable

    def _add_input(self, node: Node, name: str) -> None:
        variable = self._variable(name, "input", node)
        if len(self.captured.inputs) == 1:
            variable.aliases = (name,)
            variable.name = "input"
        self.by_node[node] = variable
        if not self.captured.batched and self.samples > 1:
            self._keep_samples(variable)

    def _keep_samples(self, variable: Variable) -> None:
        """An input or the output of a graph for several samples: the batch has an axis of its own.

        That the samples are independent there is found out beside (`nrm.explainer`).
        """
        assert variable.node is not None
        sizes = tuple(map(int, variable.node.meta["val"].shape))
        along = self.captured.batch_axis
        if along is not None and len(sizes) > along and sizes[along] == self.samples:
            variable.batch_axis, variable.shared = along, (1, 1)
            variable.shape = _with_batch(sizes, along)

    def _depends(self, node: Node) -> bool:
        return any(parent in self.by_node for parent in _parents(node))

    def _add(self, node: Node) -> None:
        """Add the operation of a node that reads a variable, unless its result carries none."""
        if not is_float_tensor(node):
            return  # tuples are read by getitem
        address = self._name_of[node][0]
        for parent in node.all_input_nodes:
            if parent in self._lost and parent not in self.by_node:  # a number, or a tuple
                self._refuse(node, address, self._lost[parent])
                return
        try:
            operation = self._operation(node, address)
        except UnsupportedOperatorError as refusal:
            lost = (self._lost[parent] for parent in node.all_input_nodes if parent in self._lost)
            self._refuse(node, address, next(lost, None) or refusal)
            return
        if operation is None:
            return
        output = self._variable(address, "operation", node, self._name_of[node][1:])
        output.producer = operation
        output.channel_axis = operation.operator.channel_axis(
            operation.call, operation.operands[0].channel_axis
        )
        operation.output = output
        if output.batch_axis is None:
            self._find_samples(operation)
        if node is self.explained and not self.captured.batched and self.samples > 1:
            self._keep_samples(output)
        self.by_node[node] = output

    def _find_samples(self, operation: Operation) -> None:
        """Say where the samples lie in a result that has no axis of the batch's size.

        A merged axis does not tell by its size which sample each neuron is of: where the samples
        lie in the operands does.
        """
        output = operation.output
        sizes = self._sizes(output)
        if sizes is None or sum(size % MANY == 0 for size in sizes) > 1:
            return
        found = set()
        for (name, _), operand in zip(operation.arguments, operation.operands, strict=True):
            read = self._sizes(operand)
            if operand.batch_axis is not None and read is not None:
                at = Samples(operand.batch_axis, *operand.shared)
                found.add(operation.operator.samples(operation.call, name, at, read, sizes))
            elif read is None or self._may_hold_samples(operand):
                return  # samples lie in it, nobody knows where
        agreed = found.pop() if len(found) == 1 else None
        if agreed is not None:
            output.batch_axis, output.shared = agreed.axis, (agreed.before, agreed.after)
            if not self.captured.batched:
                output.shape = _with_batch(sizes, agreed.axis)

    def _sizes(self, variable: Variable) -> tuple[int, ...] | None:
        """The shape of a variable, for `MANY` samples where the graph is for any batch."""
        if variable.node is None or (not self.captured.batched and self.samples == 1):
            return None
        sizes = []
        for size in variable.node.meta["val"].shape:
            if is_symbolic(size):
                size = size.node.expr.xreplace(dict.fromkeys(self._batches, sympy.Integer(MANY)))
                if not size.is_Integer:
                    return None
            sizes.append(int(size))
        return tuple(sizes)

    def _may_hold_samples(self, variable: Variable) -> bool:
        """Whether a variable that tells no samples apart may be of several."""
        return not self.captured.batched or any(size is None for size in variable.shape)

    def _operation(self, node: Node, address: str) -> Operation | None:
        call = _call(node, address)
        if carries_none(call.target):
            return None
        try:
            operator = self._row(node, call, address)
            slots = operator.operands(call, self.by_node.__contains__, address)
        except UnsupportedOperatorError:
            if self.fallback is None:
                raise
            operator = self.fallback.specialize(call)
            slots = operator.operands(call, self.by_node.__contains__, address)
        if not any(slot in self.by_node for _, slot in slots):
            return None  # a constant made to look like a variable
        if operator.is_product and len(slots) == 1 and "recurrent" in node.meta:
            slots = _with_state(call)
        operator.check(call, slots, address)
        return Operation(
            address,
            operator,
            call,
            addresses.module_type(node),
            operator.kind_of(slots),
            tuple(slot for _, slot in slots),
            places(call, slots),
            tuple(self._parent(slot) for _, slot in slots),
        )

    def _row(self, node: Node, call: Call, address: str) -> Operator:
        """The row that covers a call.

        Raises:
            UnsupportedOperatorError: there is none.
        """
        operator = lookup(call.target)
        if operator is not None:
            return operator.specialize(call)
        raise UnsupportedOperatorError(
            f"no rule says how relevance passes {call.target} (in {address!r}, module type "
            f"{addresses.module_type(node) or 'unknown'}). Replace it in the model, give the "
            "operator a row with nrm.operators.register, or ask for a first-order "
            "approximation of such operators with Explainer(fallback=LocalLinear())."
        )

    def _parent(self, node: Node) -> Variable:
        """The variable of an operand; a constant that is some neuron's only parent is a leaf."""
        known = self.by_node.get(node) or self.constants.get(node)
        if known is None:
            name = node.meta.get("parameter") or self._name_of[node][0]
            known = self.constants[node] = self._variable(name, "constant", node)
        return known

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
        if not self.captured.batched and self.samples > 1:
            return (None,) * value.dim(), None  # any of them may hold samples
        if not self.captured.batched:
            shape = tuple(None if is_symbolic(size) else int(size) for size in value.shape)
            # A capture for one sample: a first axis of one is the batch.
            if along != 0 or not shape or shape[0] != 1:
                return shape, None
            return (None, *shape[1:]), 0
        axis = None
        sizes: list[int | None] = []
        for position, size in enumerate(value.shape):
            if is_symbolic(size):
                if size.node.expr in self._batches and axis is None:
                    axis = position
                sizes.append(None)
            else:
                sizes.append(int(size))
        return tuple(sizes), axis


def _with_batch(sizes: Sequence[int], axis: int) -> tuple[int | None, ...]:
    return tuple(None if place == axis else size for place, size in enumerate(sizes))


def _with_state(call: Call) -> list[tuple[str, Node]]:
    """Both factors of a product in a recurrent cell: a gate, and a state no input reaches yet.

    The state is a value like any other. Elsewhere, what is multiplied with a constant is scaled.
    """
    return [(name, node) for name, node in call.nodes() if is_float_tensor(node)]


def _call(node: Node, address: str) -> Call:
    try:
        return Call.of(node)
    except AssertionError:
        raise UnsupportedOperatorError(
            f"{node.target} (in {address!r}) is no operator that nrm can look up."
        ) from None


def _parents(node: Node) -> Sequence[Node]:
    """The nodes that a node reads; through a getitem, those that the producer reads."""
    if picks(node) and isinstance(node.args[0], Node):
        return _parents(node.args[0])
    return node.all_input_nodes


# -- the graph -----------------------------------------------------------------------------------


def build_graph(
    captured: Captured,
    specification: WalkSpecification,
    bias_is_input: bool,
    fallback: Operator | None = None,
    heads: Heads = "keep",
    differences: bool = False,
) -> Graph:
    """The variables and operations between the leaves and the explained output.

    Arguments:
        captured: the model.
        specification: which rules and alphas apply where; a factor that takes nothing of a
            product is no parent, and what only leads there is no part of the graph.
        bias_is_input: biases are leaves.
        fallback: the row of operators that have none.
        heads: whether a last softmax or sigmoid is looked through (`nrm.heads`).
        differences: walks are those of the differences from a reference; biases contribute none.

    Raises:
        CaptureError: no walk leads to an input.
        UnsupportedOperatorError: a walk would pass an operator that has no row.
        QueryError: the composite's choices do not fit the operations.
    """
    head = (
        look_through(captured.graph, captured.inputs, captured.output)
        if heads == "logits"
        else None
    )
    draft = Draft(captured, fallback, head)
    by_node = draft.by_node | draft.constants
    bias_is_input = bias_is_input and not differences
    graph = Graph(captured, specification, bias_is_input, head, draft.variables, by_node)
    graph.differences = differences
    rules = {} if differences else take_to_first_order(graph)
    if differences:
        take_between(graph)
    else:
        follow_weights(graph)
    _share_products(graph)
    _drop_unvisited(graph, draft)
    _choose_rules(graph, rules)
    _add_late_leaves(graph, draft.steps)
    return graph


def _share_products(graph: Graph) -> None:
    """Give the factors of products their alphas; those that take nothing are no parents."""
    structure = Structure(graph.captured)
    for product in graph.operations:
        if len(product.slots) < 2 or not product.operator.is_product:
            continue
        product.gates = gate_ranks(product.slots, graph.carries, structure)
        alpha = graph.specification.alpha(product, graph)
        alphas = alpha.coefficients(product.gates)
        if len(alphas) != len(product.gates) or not abs(sum(alphas) - 1) <= 1e-6:
            raise QueryError(
                f"{alpha} gives the {len(product.gates)} factors of {product.address!r} the "
                f"coefficients {list(alphas)}, which are to be one for each and sum to one."
            )
        taking = [i for i, alpha in enumerate(alphas) if alpha != 0]
        product.alphas = tuple(alphas[i] for i in taking)
        product.slots = tuple(product.slots[i] for i in taking)
        product.arguments = tuple(product.arguments[i] for i in taking)
        product.operands = tuple(product.operands[i] for i in taking)


def _drop_unvisited(graph: Graph, draft: Draft) -> None:
    """Forget the variables that no walk from the output visits."""
    graph.set_variables(graph.variables)
    visited = graph.upstream(graph.output) | {graph.output}
    refused = [v for v in graph.variables if v in visited and v in draft.refusals]
    if refused:
        raise draft.refusals[refused[-1]]
    if not any(variable.kind in ("input", "embedding") for variable in visited):
        raise CaptureError(
            "no walk leads from the output to an input: every path ends at constants."
        )
    # An input that the output ignores is there, without relevance.
    kept = [v for v in graph.variables if v in visited or v.kind == "input"]
    graph.silent = _names(graph.variables) - _names(kept)
    graph.by_node = {node: v for node, v in graph.by_node.items() if v in set(kept)}
    graph.set_variables(kept)


def _names(variables: Collection[Variable]) -> set[str]:
    return {name for variable in variables for name in (variable.name, *variable.aliases)}


def _choose_rules(graph: Graph, rules: dict[Operation, Rule]) -> None:
    """Choose the rule of every operation that has none yet."""
    for operation in graph.operations:
        rule = rules.get(operation) or graph.specification.rule(operation, graph)
        summed = operation.operator.adds_up or not graph.differences
        if isinstance(rule, FromUniform) and operation.weights != "made" and summed:
            raise QueryError(
                f"the composite gives {operation.address!r} ({operation.kind}) the FromUniform "
                "rule, which is for a softmax alone. Choose another."
            )
        if isinstance(rule, Identity) and not operation.operator.accepts_identity:
            raise QueryError(
                f"the composite gives {operation.address!r} the Identity rule, but "
                f"{operation.kind} neurons have many parents. Choose a contribution rule."
            )
        operation.rule = rule
        operand = operation.operands[0]
        if operand.channel_axis is None and operation.operator.acts_on_last_axis(operation.call):
            operand.channel_axis = -1


def _add_late_leaves(graph: Graph, steps: dict[Node, Node]) -> None:
    """Add the leaves that enter late: biases, and what neurons without parents are."""
    graph.output.aliases += ("output",)
    variables: list[Variable] = []
    for variable in graph.variables:
        if variable.producer is not None:
            leaf = _late_leaf(graph, variable.producer, steps)
            if leaf is not None:
                variables.append(leaf)
        variables.append(variable)
    graph.set_variables(variables)


def _late_leaf(graph: Graph, operation: Operation, steps: dict[Node, Node]) -> Variable | None:
    operator, operands = operation.operator, operation.named_slots
    name = operator.late_leaf(operation.call, operands, operation.rule, graph.bias_is_input)
    if name is None:
        return None
    operation.late_leaf = name
    kind: Kind = "bias" if name == "bias" else "constant"
    begun = _enters_in_steps(graph, operation, steps) if name == "bias" else None
    if begun is not None:  # no bias of the model
        name, kind = begun, "constant"
    entered = operation.output
    leaf = Variable(
        0,
        f"{operation.address}.{name}",
        kind,
        entered.shape,
        entered.batch_axis,
        entered.channel_axis,
        shared=entered.shared,
    )
    operation.operands += (leaf,)
    return leaf


def _enters_in_steps(graph: Graph, operation: Operation, steps: dict[Node, Node]) -> str | None:
    """The operator or input, constant but for steps, from which what is added was computed."""
    for name, node in operation.call.nodes():
        begun = steps.get(node)
        if begun is None or node in operation.slots or not is_float_tensor(node):
            continue
        if operation.operator.adds(operation.call, name):
            inputs = graph.captured.inputs
            if begun in inputs:
                return graph.captured.names[inputs.index(begun)]
            return addresses.operator_name(begun)
    return None
