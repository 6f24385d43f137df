"""Where nodes meet: the operations that add up, for every node, what others send."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from nrm.graph import Operation, Variable
from nrm.operators import MatrixProduct, Routing
from nrm.operators.scattering import ScatterMaximum, ScatterSum

_RIGHT = ("other", "mat2", "batch2")
"""What a matrix from nodes to nodes is multiplied by."""
_PICKS = ("index_select", "index", "gather")


def mixes(operation: Operation) -> bool:
    """Whether a node's neurons have those of other nodes for parents.

    So it is for scatters, and for products with a matrix from nodes to nodes (an adjacency,
    attention) on the left.
    """
    if scatters(operation):
        return True
    names = [name for name, _ in operation.arguments]
    return isinstance(operation.operator, MatrixProduct) and any(n in _RIGHT for n in names)


def scatters(operation: Operation) -> bool:
    """Whether it adds up (or takes the largest of) messages, one row for each edge."""
    return isinstance(operation.operator, ScatterSum | ScatterMaximum)


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
        name = str(producer.call.target).split(".")[1]
        if isinstance(producer.operator, Routing) and name in _PICKS:
            yield producer
        elif not scatters(producer):  # below it lies the step before
            waiting.extend(producer.operands)


def scope(operation: Operation) -> str:
    """The module that a step of message passing is computed in."""
    start = next(pickings(operation), operation)
    return start.address.partition(":")[0]
