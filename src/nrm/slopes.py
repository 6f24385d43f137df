"""Which operations go by slopes: their own derivatives, or what is exact between two points.

Weighted sums and functions of one neuron each do as they are. All others get another row here,
where a rule or a reference asks for it: to first order (`rules.LocalLinear`, `PathIntegrated`),
between two inputs (`nrm.differences`), or between uniform weights and those there are
(`FromUniform`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from nrm.errors import QueryError, UnsupportedOperatorError
from nrm.graph import Graph, Operation, Variable
from nrm.operators import Call, Operator, Secants, ToFirstOrder
from nrm.rules import FromUniform, Gamma, PathIntegrated, Rule, Zero


def take_to_first_order(graph: Graph) -> dict[Operation, Rule]:
    """Give operations that are neither linear nor elementwise their derivatives for a row.

    Only under rules that ask for it; all that the derivatives reach are operands then.

    Returns:
        those rules.
    """
    rules: dict[Operation, Rule] = {}
    for operation in graph.operations:
        rule = graph.specification.rule(operation, graph)
        if not rule.first_order:
            continue
        rules[operation] = rule
        row = ToFirstOrder(operation.operator)
        slots = row.operands(operation.call, graph.carries, operation.address)
        if len(slots) < len(operation.slots):  # constants among them
            slots = operation.named_slots
        if operation.operator.curves(slots, isinstance(rule, PathIntegrated)):
            operation.operator = row
            _set_slots(operation, slots, graph)
    return rules


def take_between(graph: Graph) -> None:
    """Give operations that are neither linear nor elementwise their slopes between two inputs.

    All that they depend on are operands then.

    Raises:
        QueryError: the composite chooses a rule that says nothing of differences.
    """
    met: set[Variable] = set()  # those that may be given relevance where both are the same
    for operation in reversed(graph.operations):
        rule = graph.specification.rule(operation, graph)
        row = operation.operator
        if rule.first_order or rule.reads_ahead or rule.bounds_inputs:
            raise QueryError(
                f"the composite gives {operation.address!r} {rule}, which reads values and says "
                "nothing of their differences from a reference. Leave the composite out, or "
                "choose rules such as Zero or Gamma; IntegratedGradients has a baseline of its own."
            )
        slots = Operator.operands(row, operation.call, graph.carries, operation.address)
        if row.is_product:  # whatever else is a factor is constant
            _set_slots(operation, slots, graph)
        if row.curves(slots, along_path=True) or row.by_derivatives:
            if not row.has_secant:
                raise UnsupportedOperatorError(
                    f"{operation.call.target} at {operation.address!r} has no exact slope between "
                    "two inputs. Explain it without a reference, or along a path, "
                    "composites.IntegratedGradients(baseline)."
                )
            operation.operator = Secants(row, keeps=operation.output in met)
            _set_slots(operation, slots, graph)
        # Others share by something else, or split evenly what vanishes.
        elif row.adds_up and type(rule) not in (Zero, Gamma):
            met.update(operation.operands)
        if operation.output in met:
            met.update(operation.operands)


def follow_weights(graph: Graph) -> None:
    """Compare the weights that a softmax makes with uniform ones, to where products use them.

    Where `FromUniform` is chosen for it.

    Raises:
        QueryError: the weights are used in another way.
    """
    weights: dict[Variable, Operation] = {}
    shares: dict[Operation, float] = {}
    for operation in graph.operations:
        row, call = operation.operator, operation.call
        rule = graph.specification.rule(operation, graph)
        read = [v for v in operation.operands if v in weights]
        if isinstance(rule, FromUniform) and row.function_of(call).role == "softmax":
            operation.weights, operation.operator = "made", Secants(row)
            weights[operation.output], shares[operation] = operation, rule.share
        elif read and len(operation.operands) == 1 and _moves(operation):
            operation.weights = "moved"
            weights[operation.output] = weights[read[0]]
        elif len(read) == 1 and len(operation.operands) == 2 and row.is_product:
            operation.weights, operation.operator = "used", Secants(row)
            share = shares[weights[read[0]]]
            operation.alphas = tuple(
                share if v in weights else 1 - share for v in operation.operands
            )
        elif read:
            raise QueryError(
                f"the composite compares the weights of {weights[read[0]].address!r} with uniform "
                f"ones (FromUniform), and {operation.address!r} ({operation.kind}) reads them, "
                "which is no product with values. Choose another rule for that softmax."
            )
    if graph.output in weights:
        raise QueryError(
            f"the composite chooses FromUniform for {graph.output.name!r}, the explained output "
            "itself. It is for weights that values are multiplied with."
        )


def _moves(operation: Operation) -> bool:
    """Whether each result is one of the operand's values."""
    row, name = operation.operator, operation.arguments[0][0]
    return (row.moves or row.one_parent) and row.affine_in(operation.call, [name])


def _set_slots(operation: Operation, slots: Sequence[tuple[str, Node]], graph: Graph) -> None:
    operation.slots = tuple(slot for _, slot in slots)
    operation.arguments = places(operation.call, slots)
    operation.operands = tuple(graph.by_node[slot] for slot in operation.slots)


def places(call: Call, slots: Sequence[tuple[str, Node]]) -> tuple[tuple[str, int], ...]:
    """Where in a call its operands are, which may be the same node twice."""
    remaining = iter(call.places())
    found = []
    for slot in slots:
        found.append(next((n, place) for n, place, node in remaining if (n, node) == slot))
    return tuple(found)
