"""How many messages travel at once: as many as a memory budget holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from nrm.errors import QueryError
from nrm.graph import Variable
from nrm.program import Pass

T = TypeVar("T")

_HELD = 3
"""How often a message is there while it is shared out: as it came, by sign, divided."""


def message_size(forward: Pass, upper: Variable, lower: Variable | None = None) -> int:
    """The most bytes that one message takes on its way from one variable down to another.

    Its parts that wait at other variables are counted, and what an operation needs to share it
    out; what operations prepare once for all messages is not.

    Arguments:
        lower: where it stops; `None`: at the leaves.
    """
    graph = forward.graph
    leading = None if lower is None else graph.leading_to([lower])
    waiting = {upper: forward.shape(upper).numel()}
    most = 0
    for variable in graph.variables[upper.index :: -1]:
        if variable not in waiting:
            continue
        here = waiting.pop(variable)
        operation = None if variable is lower else variable.producer
        pulled = {}
        for operand in () if operation is None else operation.operands:
            if leading is None or operand in leading:
                pulled[operand] = forward.shape(operand).numel()
        most = max(most, sum(waiting.values()) + _HELD * here + 2 * sum(pulled.values()))
        waiting.update(pulled)
    return most * forward.output.element_size()


def checked(memory: float) -> int:
    """A memory budget in bytes.

    Raises:
        QueryError: it is no positive number.
    """
    known = isinstance(memory, int | float) and not isinstance(memory, bool)
    if not known or not 0 < memory < math.inf:
        raise QueryError(f"memory is a positive number of bytes, not {memory!r}")
    return int(memory)


def in_chunks(
    items: Sequence[T], memory: int, each: int, work: Callable[[Sequence[T]], None]
) -> None:
    """Work on as many items at a time as fit into the memory, at least one.

    Where a GPU's memory runs out nevertheless, chunks are half as large from there on.

    Arguments:
        each: bytes that one item takes.
        work: done to each chunk; it keeps nothing where it raises.
    """
    size = max(1, checked(memory) // max(1, each))
    begin = 0
    while begin < len(items):
        chosen = items[begin : begin + size]
        try:
            work(chosen)
        except torch.OutOfMemoryError:
            if len(chosen) == 1:
                raise
            size = len(chosen) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        begin += len(chosen)
