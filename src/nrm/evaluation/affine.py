"""Where the output is an affine function of some layers, so that no run is needed for a set."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nrm.evaluation.downstream import Replay
from nrm.graph import Graph, Operation
from nrm.operators import Identity, MatrixProduct, Product, Quotient, Routing, Sum, picks
from nrm.operators.averages import Averaging
from nrm.operators.batch_norm import BatchNorm
from nrm.operators.layers import Layer
from nrm.operators.transposed import TransposedConvolution

_TOLERANCE = {torch.float64: 1e-9}
"""How far a run may be from what gradients say; 1e-4 in single precision."""


def gradients(
    replay: Replay,
    nodes: Sequence[Node],
    others: Collection[Node],
    target: int,
    removed: Mapping[Node, Tensor],
) -> dict[Node, Tensor] | None:
    """The target's derivatives `[neurons]` by some nodes, where they say what any change does.

    Arguments:
        others: nodes of layers below that change too.
        removed: `[neurons]`, values of the nodes to try it with.

    Returns:
        `None` where the output is not affine in the nodes, whatever the others are.
    """
    after = replay.changed_by(nodes)
    for node in nodes:
        if not replay.changed_by([node]).isdisjoint(set(nodes) - {node}):
            return None  # what is removed above depends on what is removed below
    if not after.isdisjoint(set(others) - set(nodes)):
        return None
    changed = replay.changed_by([*nodes, *others])
    if not all(_is_affine(replay.graph, node, changed) for node in after - set(nodes)):
        return None
    found, output = _derivatives(replay, nodes, after, target)
    return found if _holds(replay, nodes, after, target, removed, found, output) else None


def _is_affine(graph: Graph, node: Node, changed: Collection[Node]) -> bool:
    """Whether a node is an affine function of the changed ones that it reads, jointly."""
    variable = graph.by_node.get(node)
    operation = None if variable is None else variable.producer
    if operation is None:
        # One that gives several results is judged where they are picked.
        return bool(node.users) and all(picks(user) for user in node.users)
    if not str(operation.call.target).startswith("aten."):
        return False  # what a row of the user's own says of relevance says nothing here
    read = [name for name, operand in operation.call.nodes() if operand in changed]
    row = operation.operator
    if isinstance(row, Quotient):
        return read == ["self"] and operation.call.get("rounding_mode") is None
    if isinstance(row, Product | MatrixProduct):
        return len(read) == 1
    return _is_affine_row(operation) and set(read) <= {name for name, _ in operation.named_slots}


def _is_affine_row(operation: Operation) -> bool:
    row = operation.operator
    if isinstance(row, Identity):
        return row.at_zero == "linear"
    if isinstance(row, Routing):
        return row.kind in ("view", "where", "pad", "interpolation")
    return isinstance(row, Layer | TransposedConvolution | Averaging | BatchNorm | Sum)


def _derivatives(
    replay: Replay, nodes: Sequence[Node], after: set[Node], target: int
) -> tuple[dict[Node, Tensor], Tensor]:
    """The derivatives of the target's output by some nodes, and the output."""
    leaves = {node: replay.values[node].detach().clone().requires_grad_() for node in nodes}
    with torch.enable_grad():
        output = _output(replay, leaves, after)[target]
        if not output.requires_grad:  # none of them leads to the output
            return {node: torch.zeros_like(leaves[node]).flatten() for node in nodes}, output
        found = torch.autograd.grad(output, list(leaves.values()), materialize_grads=True)
    return {n: g.reshape(-1) for n, g in zip(leaves, found, strict=True)}, output.detach()


def _holds(
    replay: Replay,
    nodes: Sequence[Node],
    after: set[Node],
    target: int,
    removed: Mapping[Node, Tensor],
    found: dict[Node, Tensor],
    output: Tensor,
) -> bool:
    """Whether runs with other values at the nodes give what the derivatives say.

    Without all of their neurons, and far away on both sides: a row of one's own may call a
    function linear that is not.
    """
    drawn = torch.Generator().manual_seed(0)
    changes = [{node: removed[node] - replay.values[node].reshape(-1) for node in nodes}]
    away = {}
    for node in nodes:
        value = replay.values[node].reshape(-1)
        noise = torch.randn(value.shape, generator=drawn).to(value)
        away[node] = 3 * (1 + value.abs().max()) * noise
    changes += [away, {node: -change for node, change in away.items()}]
    tolerance = _TOLERANCE.get(output.dtype, 1e-4)
    for change in changes:
        products = [found[node] * change[node] for node in nodes]
        lost = sum(product.sum() for product in products)
        size = sum(product.abs().sum() for product in products)
        there = {node: replay.values[node] for node in nodes}
        values = {n: (v.reshape(-1) + change[n]).view_as(v) for n, v in there.items()}
        with torch.no_grad():
            expected = _output(replay, values, after)[target]
        if not bool((expected - output - lost).abs() <= tolerance * (output.abs() + size)):
            return False
    return True


def _output(replay: Replay, values: dict[Node, Any], after: set[Node]) -> Tensor:
    """`[outputs]`, with other values at some nodes."""
    begin = min(replay.place[node] for node in values)
    stage = replay.stage([replay.graph.explained], after, begin, batched=False)
    entering = {node: value for node, value in values.items() if node in stage.enters}
    found = replay.compute(stage, entering, None, lambda node, value: values.get(node, value))
    output: Tensor = found[replay.graph.explained]
    return output.reshape(-1)
