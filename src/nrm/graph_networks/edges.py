"""Message passing in a model: where nodes meet, where walks of nodes are read, and its edges.

A *step* of message passing is an operation by which a node's neurons have those of other nodes for
parents. It adds up (or takes the largest of) messages, one row for each edge, which other
operations picked from the nodes; or it multiplies by a matrix from nodes to nodes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nrm.errors import QueryError
from nrm.formulas import Formula
from nrm.graph import Graph, Operation, Variable
from nrm.measure import Measure

# -- Where nodes meet.


def is_step(operation: Operation) -> bool:
    """Whether a node's neurons have those of other nodes for parents.

    So it is for scatters, and for products with a matrix from nodes to nodes (an adjacency,
    attention) on the left.
    """
    return operation.operator.mixes_rows([name for name, _ in operation.arguments])


def messages(operation: Operation) -> Variable | None:
    """What a scatter adds up."""
    for (name, _), operand in zip(operation.arguments, operation.operands, strict=False):
        if name in ("src", "source"):
            return operand
    return None


def pickings(operation: Operation) -> Iterator[Operation]:
    """The operations upstream of a scatter that pick a node's row for every edge, nearest first."""
    message = messages(operation)
    waiting = deque([] if message is None else [message])
    while waiting:
        producer = waiting.popleft().producer
        if producer is None:
            continue
        if producer.operator.gathers:
            yield producer
        elif not producer.operator.scatters:  # below it lies the step before
            waiting.extend(producer.operands)


def scope(operation: Operation) -> str:
    """The module that a step of message passing is computed in."""
    start = next(pickings(operation), operation)
    return start.address.partition(":")[0]


# -- Where walks of nodes are read.

_OVERRIDE = "Name the layers to read walks at instead (`Explainer.layers` lists them)."


def node_layers(R: Measure) -> list[str]:
    """The layers `[nodes, features]` at which walks of nodes are read, from the input up.

    The node features, then for every step of message passing the last variable that all walks
    cross before the next step: one more than there are steps. Biases, at which walks may end, do
    not count as a way around.

    Raises:
        QueryError: the model passes no messages, or skips over a step. Layers can be named instead
            wherever layers are asked for.
    """
    graph = R.graph
    node_input = graph.inputs[0]
    size = _rows(node_input)
    crossed = [
        v for v in graph.crossings(leaving_out=("bias", "constant"))[::-1] if _rows(v) == size
    ]
    steps = [v for v in graph.variables if v.producer and is_step(v.producer) and _rows(v) == size]
    if not steps:
        raise QueryError(
            f"no step of message passing among the {size} rows of {node_input.name!r} was found. "
            + _OVERRIDE
        )
    if node_input not in crossed:
        raise QueryError(f"walks do not all end at {node_input.name!r}. {_OVERRIDE}")
    groups = [[node_input]]
    between: list[list[Variable]] = []
    for lower, upper in pairwise(crossed):
        inside = [v for v in steps if lower.index < v.index <= upper.index]
        _refuse_chain(graph, inside)
        if inside:
            between.append(inside)
            groups.append([])
        groups[-1].append(upper)
    if len(steps) > sum(map(len, between)):
        raise QueryError(f"a step lies beside all layers that every walk crosses. {_OVERRIDE}")
    chosen = [node_input]
    for group, above in zip(groups[1:-1], between[1:], strict=True):
        scopes = {scope(v.producer) for v in above if v.producer} - {""}
        outside = [v for v in group if not any(_within(v, name) for name in scopes)]
        chosen.append((outside or group)[-1])
    chosen.append(groups[-1][-1])
    return [variable.name for variable in chosen]


def _rows(variable: Variable) -> int | None:
    """The size of a variable's first axis that is not the batch."""
    return variable.neuron_sizes[0] if variable.neuron_sizes else None


def _refuse_chain(graph: Graph, steps: list[Variable]) -> None:
    """Refuse steps of which one leads to another, with no layer in between that all walks cross."""
    for upper in steps:
        below = graph.upstream(upper)
        for lower in steps:
            if lower in below:
                raise QueryError(
                    f"between {lower.name!r} and {upper.name!r} no layer is crossed by every "
                    f"walk: something skips it. {_OVERRIDE}"
                )


def _within(variable: Variable, module: str) -> bool:
    return variable.name.startswith((f"{module}.", f"{module}:"))


# -- Edges: the messages along them as neurons, where the model has one row for each edge.


@dataclass(frozen=True, eq=False)
class EdgeLayer:
    """The messages of one step of message passing.

    Attributes:
        name: the variable that holds them, one row for each edge.
        senders, receivers: `[rows]`, the nodes at their ends. Loops that the model adds to its
            edges have rows too.
    """

    name: str
    senders: Tensor
    receivers: Tensor

    def rows(self, sender: int, receiver: int) -> list[int]:
        """The rows of the edges from one node to another; mostly one."""
        both = (self.senders == sender) & (self.receivers == receiver)
        found: list[int] = both.nonzero()[:, 0].tolist()
        return found

    def __repr__(self) -> str:
        return f"EdgeLayer({self.name!r}, {len(self.senders)} edges)"


def edge_layers(R: Measure) -> list[EdgeLayer]:
    """The messages of every step of message passing, from the input up.

    Raises:
        QueryError: the model has no variable with a row for each edge: it multiplies by an
            adjacency matrix, or by a sparse one.
    """
    forward = R.forward_pass
    found = []
    for operation in R.graph.operations:
        if not operation.operator.scatters:
            continue
        row = messages(operation)
        if row is None:
            continue
        size = forward.shape(row)[0]
        picked = [p for p in pickings(operation) if forward.shape(p.output)[0] == size]
        if not picked:  # a sum over the nodes of each graph
            continue
        # What is read for each edge of something else, a graph's features say, tells no node.
        count = forward.shape(operation.output)[0]
        picked.sort(key=lambda p: forward.shape(p.operands[0])[0] != count)
        receivers = _per_row(forward.value_at(_index(operation.call.arguments)), size)
        ends = [_per_row(forward.value_at(_index(p.call.arguments)), size) for p in picked]
        # A message may also read the node that it goes to.
        senders = next((end for end in ends if not torch.equal(end, receivers)), receivers)
        found.append(EdgeLayer(row.name, senders, receivers))
    if not found:
        raise QueryError(
            "no variable has a row for each edge: the model passes messages by products with an "
            "adjacency matrix. The relevance of a step from node to node is R(*step(...))."
        )
    return found


def edge_relevance(R: Measure, edge_index: Tensor, *sets: Formula | str) -> Tensor:
    """The relevance that flows along every edge, summed over the steps of message passing.

    A walk that takes an edge in two steps counts twice. What stays at its node, also over a loop
    that the model adds by itself, flows along no edge. Walks that end within a message, at a bias,
    count, though they come to no node below; of loops given twice that the model makes one, the
    first has all.

    Arguments:
        edge_index: `[2, edges]`, as the model was given.
        sets: jointly with these, which lie above all steps.

    Returns:
        `[edges]`.

    Raises:
        QueryError: the model has no variable with a row for each edge, or edges of its own.
    """
    total = R.output.new_zeros(edge_index.shape[1])
    for layer in edge_layers(R):
        rows, columns = _matched(layer, edge_index.detach())
        relevance = R.marginal(layer.name, *sets).flatten(1).sum(1)
        total.index_add_(0, columns, relevance[rows])
    return total


def _matched(layer: EdgeLayer, edge_index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a layer, and the columns of `edge_index` that they stand for.

    Models put loops elsewhere, or take them out and in again; the other edges keep their order.
    """
    loops = layer.senders == layer.receivers
    own = edge_index[0] == edge_index[1]
    rows, columns = (~loops).nonzero()[:, 0], (~own).nonzero()[:, 0]
    ends = torch.stack([layer.senders[rows], layer.receivers[rows]])
    if not any(torch.equal(ends, given[:, columns]) for given in (edge_index, edge_index.flip(0))):
        raise QueryError(
            f"the edges of {layer.name!r} are not those of edge_index: the model makes edges of "
            f"its own. R({layer.name!r}) and R.marginal({layer.name!r}) tell their relevance."
        )
    at_node: dict[int, list[int]] = defaultdict(list)
    for column in own.nonzero()[:, 0].tolist():
        at_node[int(edge_index[0, column])].append(column)
    pairs = []
    for row in loops.nonzero()[:, 0].tolist():
        there = at_node[int(layer.senders[row])]
        if there:
            pairs.append((row, there.pop(0)))
    more = torch.tensor(pairs, dtype=torch.long, device=rows.device).view(-1, 2)
    return torch.cat([rows, more[:, 0]]), torch.cat([columns, more[:, 1]])


def _index(arguments: Mapping[str, Any]) -> Any:
    """The argument that says which rows are meant."""
    if "index" in arguments:
        return arguments["index"]
    return next(i for i in arguments["indices"] if i is not None)


def _per_row(index: Tensor, size: int) -> Tensor:
    """One number for each row, of an index that may repeat it for every feature."""
    return index.reshape(size, -1)[:, 0]
