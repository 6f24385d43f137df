"""The computation graph that the measure lives on: variables, operations, cuts (appendix A)."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Protocol

from torch.fx import Node

from nrm.errors import CaptureError, QueryError, UnknownLayerError
from nrm.graph import addresses
from nrm.graph.capture import Captured
from nrm.graph.draft import Draft, places
from nrm.graph.gates import gate_ranks
from nrm.graph.heads import Heads, look_through
from nrm.graph.structure import Structure
from nrm.graph.variables import Kind, Operation, Variable, is_float_tensor
from nrm.operators import Identity, Operator, Routing, ToFirstOrder, lookup
from nrm.rules import Alpha, PathIntegrated, Rule
from nrm.rules import Identity as IdentityRule

_ELEMENTWISE = ("activation", "scaling")
"""The kinds of rows for functions of one neuron each."""


class WalkSpecification(Protocol):
    """What decides how walks go (section 3.3): a composite."""

    def rule(self, operation: Operation, graph: Graph) -> Rule:
        """How a weighted sum is shared out."""

    def alpha(self, operation: Operation, graph: Graph) -> Alpha:
        """How the factors of a product share."""


class Graph:
    """The variables and operations between the leaves and the explained output.

    A walk is a path from an output neuron to a neuron of a leaf.

    Arguments:
        captured: the model.
        specification: which rules and alphas apply where; a factor that takes nothing of a
            product is no parent, and what only leads there is no part of the graph.
        bias_is_input: biases are leaves.
        fallback: the row of operators that have none.
        heads: whether a last softmax or sigmoid is looked through (`nrm.graph.heads`).

    Attributes:
        head: what was looked through.
        explained: the node that walks begin at: the model's output, or the logits behind it.
    """

    def __init__(
        self,
        captured: Captured,
        specification: WalkSpecification,
        bias_is_input: bool,
        fallback: Operator | None = None,
        heads: Heads = "keep",
    ) -> None:
        self.captured = captured
        self.specification = specification
        self.bias_is_input = bias_is_input
        self.head = (
            look_through(captured.graph, captured.inputs, captured.output)
            if heads == "logits"
            else None
        )
        self.explained = captured.output if self.head is None else self.head.explained
        draft = Draft(captured, fallback, self.head)
        self.variables: list[Variable] = draft.variables
        self.by_node: dict[Node, Variable] = draft.by_node | draft.constants
        self.output = self.by_node[self.explained]
        self._forget_ways()
        self.silent: set[str] = set()
        self._steps = draft.steps
        self._rules: dict[Operation, Rule] = {}
        self._take_to_first_order()
        self._share_products()
        self._drop_unvisited(draft)
        self._choose_rules()
        self._forget_ways()
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
        return self.crossings()

    def crossings(self, leaving_out: Collection[Kind] = ()) -> list[Variable]:
        """The variables that every walk crosses exactly once, from the output down.

        Arguments:
            leaving_out: kinds of leaves; walks that end there do not count.
        """
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
                operands = variable.producer.operands
                pending.update(v for v in operands if v.kind not in leaving_out)
        return found

    def upstream(self, variable: Variable) -> frozenset[Variable]:
        """The variables that a walk can reach from `variable`, itself not included."""
        if variable not in self._upstream:
            found: set[Variable] = set()
            waiting = [variable]
            while waiting:
                producer = waiting.pop().producer
                for operand in producer.operands if producer else ():
                    if operand not in found:
                        found.add(operand)
                        waiting.append(operand)
            self._upstream[variable] = frozenset(found)
        return self._upstream[variable]

    def leading_to(self, targets: Collection[Variable]) -> frozenset[Variable]:
        """The variables from which a walk can reach one of `targets`, themselves included."""
        chosen = frozenset(targets)
        if chosen not in self._leading:
            leading = set(chosen)
            for variable in self.variables:  # parents first
                if variable.producer and not leading.isdisjoint(variable.producer.operands):
                    leading.add(variable)
            self._leading[chosen] = frozenset(leading)
        return self._leading[chosen]

    def activation_after(self, operation: Operation) -> tuple[Operation, ...]:
        """The activation that alone reads what an operation computes, and copies on the way."""
        found: list[Operation] = []
        while True:
            output = found[-1].output if found else operation.output
            readers = self._readers.get(output, [])
            if len(readers) != 1 or output is self.output:
                return ()
            (reader,) = readers
            row = reader.operator
            if not isinstance(row, Identity) or not row.elementwise:
                return ()
            if reader.output.shape != output.shape or reader.kind not in _ELEMENTWISE:
                return ()
            found.append(reader)
            if reader.kind == "activation":
                return tuple(found)

    @cached_property
    def _readers(self) -> dict[Variable, list[Operation]]:
        readers: dict[Variable, list[Operation]] = {}
        for operation in self.operations:
            for operand in dict.fromkeys(operation.operands):
                readers.setdefault(operand, []).append(operation)
        return readers

    # -- building it -----------------------------------------------------------------------------

    def _forget_ways(self) -> None:
        """Who is upstream of whom, remembered as long as operations keep their operands."""
        self._upstream: dict[Variable, frozenset[Variable]] = {}
        self._leading: dict[frozenset[Variable], frozenset[Variable]] = {}

    def _take_to_first_order(self) -> None:
        """Give operations that are neither linear nor elementwise their derivatives for a row.

        Only under rules that ask for it; all that the derivatives reach are operands then.
        """
        for variable in self.variables:
            operation = variable.producer
            if operation is None:
                continue
            rule = self.specification.rule(operation, self)
            if not rule.first_order:
                continue
            self._rules[operation] = rule
            row = ToFirstOrder(operation.operator)
            slots = row.operands(operation.call, self._carries, operation.address)
            if len(slots) < len(operation.slots):  # constants among them
                slots = operation.named_slots
            if operation.operator.curves(slots, isinstance(rule, PathIntegrated)):
                operation.operator = row
                operation.slots = tuple(slot for _, slot in slots)
                operation.arguments = places(operation.call, slots)
                operation.operands = tuple(self.by_node[slot] for slot in operation.slots)

    def _share_products(self) -> None:
        """Give the factors of products their alphas; those that take nothing are no parents."""
        structure = Structure(self.captured)
        for variable in self.variables:
            product = variable.producer
            if product is None or len(product.slots) < 2 or not product.operator.is_product:
                continue
            product.gates = gate_ranks(product.slots, self._carries, structure)
            alpha = self.specification.alpha(product, self)
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

    def _carries(self, node: Node) -> bool:
        variable = self.by_node.get(node)
        return variable is not None and variable.kind != "constant"

    def _choose_rules(self) -> None:
        """Choose the rule of every operation, and add the leaves that enter late."""
        for operation in self.operations:
            rule = self._rules.get(operation) or self.specification.rule(operation, self)
            if isinstance(rule, IdentityRule) and not (
                operation.operator.accepts_identity or isinstance(operation.operator, Identity)
            ):
                raise QueryError(
                    f"the composite gives {operation.address!r} the Identity rule, but "
                    f"{operation.kind} neurons have many parents. Choose a contribution rule."
                )
            operation.rule = rule
            operand = operation.operands[0]
            if operand.channel_axis is None and operation.operator.acts_on_last_axis(
                operation.call
            ):
                operand.channel_axis = -1
        with_late: list[Variable] = []
        for variable in self.variables:
            if variable.producer is not None:
                leaf = self._late_leaf(variable.producer)
                if leaf is not None:
                    with_late.append(leaf)
            with_late.append(variable)
        self.variables = with_late
        self._number()

    def _drop_unvisited(self, draft: Draft) -> None:
        """Forget the variables that no walk from the output visits."""
        output = self.by_node[self.explained]
        visited = self.upstream(output) | {output}
        refused = [v for v in self.variables if v in visited and v in draft.refusals]
        if refused:
            raise draft.refusals[refused[-1]]
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
        self.by_node = {node: v for node, v in self.by_node.items() if v in set(kept)}
        self._number()

    def _number(self) -> None:
        for index, variable in enumerate(self.variables):
            variable.index = index

    def _late_leaf(self, operation: Operation) -> Variable | None:
        operator, operands = operation.operator, operation.named_slots
        name = operator.late_leaf(operation.call, operands, operation.rule, self.bias_is_input)
        if name is None:
            return None
        operation.late_leaf = name
        kind: Kind = "bias" if name == "bias" else "constant"
        steps = self._enters_in_steps(operation) if name == "bias" else None
        if steps is not None:  # no bias of the model
            name, kind = steps, "constant"
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

    def _enters_in_steps(self, operation: Operation) -> str | None:
        """The operator or input, constant but for steps, from which what is added was computed."""
        for name, node in operation.call.nodes():
            begun = self._steps.get(node)
            if begun is None or node in operation.slots or not is_float_tensor(node):
                continue
            if operation.operator.adds(operation.call, name):
                inputs = self.captured.inputs
                if begun in inputs:
                    return self.captured.names[inputs.index(begun)]
                return addresses.operator_name(begun)
        return None


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
            integer = node.op == "call_function" and not is_float_tensor(node)
            if integer and reached.intersection(node.all_input_nodes) and _same_tokens(node):
                reached.add(node)
    raise QueryError("the model embeds no integer input; name a layer with at=.")


def _same_tokens(node: Node) -> bool:
    """Whether an integer tensor still holds the tokens it was computed from."""
    return isinstance(lookup(node.target), Routing | Identity)  # type: ignore[arg-type]
