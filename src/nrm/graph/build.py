"""From a captured model and a composite to the graph that relevance passes.

First a draft of all that depends on an input; then rules and alphas are chosen, which decide what
is a parent, and what no walk visits is forgotten.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from nrm.errors import CaptureError, QueryError
from nrm.graph import addresses
from nrm.graph.capture import Captured
from nrm.graph.draft import Draft, places
from nrm.graph.gates import gate_ranks
from nrm.graph.graph import Graph, WalkSpecification
from nrm.graph.heads import Heads, look_through
from nrm.graph.structure import Structure
from nrm.graph.variables import Kind, Operation, Variable, is_float_tensor
from nrm.operators import Identity, Operator, ToFirstOrder
from nrm.rules import Identity as IdentityRule
from nrm.rules import PathIntegrated, Rule


def build_graph(
    captured: Captured,
    specification: WalkSpecification,
    bias_is_input: bool,
    fallback: Operator | None = None,
    heads: Heads = "keep",
) -> Graph:
    """The variables and operations between the leaves and the explained output.

    Arguments:
        captured: the model.
        specification: which rules and alphas apply where; a factor that takes nothing of a
            product is no parent, and what only leads there is no part of the graph.
        bias_is_input: biases are leaves.
        fallback: the row of operators that have none.
        heads: whether a last softmax or sigmoid is looked through (`nrm.graph.heads`).

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
    graph = Graph(captured, specification, bias_is_input, head, draft.variables, by_node)
    rules = _take_to_first_order(graph)
    _share_products(graph)
    _drop_unvisited(graph, draft)
    _choose_rules(graph, rules)
    _add_late_leaves(graph, draft.steps)
    return graph


def _take_to_first_order(graph: Graph) -> dict[Operation, Rule]:
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
            operation.slots = tuple(slot for _, slot in slots)
            operation.arguments = places(operation.call, slots)
            operation.operands = tuple(graph.by_node[slot] for slot in operation.slots)
    return rules


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
        if isinstance(rule, IdentityRule) and not (
            operation.operator.accepts_identity or isinstance(operation.operator, Identity)
        ):
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
