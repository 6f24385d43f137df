"""Search, from layers and options to flows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from nrm.channels import only_sample
from nrm.errors import QueryError
from nrm.graph import Graph, Variable
from nrm.joint.partitions import Partition
from nrm.passing import send
from nrm.program import Pass
from nrm.search.branch_and_bound import BranchAndBound, Budget
from nrm.search.flows import Flow, Flows, Order
from nrm.search.greedy import greedy

Way = Literal["exact", "greedy"]
"""How flows are searched for."""


def find_flows(
    forward: Pass,
    message: Callable[[Variable], Tensor],
    parts: Sequence[Partition],
    k: int,
    order: Order = "largest",
    sample: int = 0,
    method: Way = "exact",
    budget: Budget | None = None,
    memory: int = 2**28,
    advance: Callable[[float], None] = lambda gap: None,
) -> Flows:
    """The `k` most relevant combinations of parts of one sample, one part of each layer.

    Arguments:
        message: gives the message `[1, *shape]` at a layer.
        parts: of layers in any order, each on a walk with the others.

    Raises:
        QueryError: an option is none of those there are, or no walk passes all layers.
    """
    if not parts:
        raise QueryError("name at least one layer")
    budget = budget or Budget()
    _check(forward, k, order, sample, method, budget)
    layers = in_depth([part.variable for part in parts], forward.graph)
    by_layer = {part.variable: part for part in parts}
    ordered = [by_layer[layer] for layer in layers]
    start = only_sample(message(layers[0]), layers[0], sample)
    gap = math.inf
    if method == "greedy":
        best, evaluated = greedy(forward, start, ordered, order, k)
        followed = len(best) * (len(ordered) - 1)
    else:
        search = BranchAndBound(forward, start, ordered, order, memory, advance)
        best, gap, evaluated, followed = search.search(k, budget)
    whole = _whole(forward, start, ordered)
    flows = []
    for chosen, relevance in best:
        at = dict(zip(layers, chosen, strict=True))
        flows.append(
            Flow(
                {part.name: at[part.variable] for part in parts},
                tuple(part.set_of(at[part.variable]) for part in parts),
                relevance,
                relevance / whole if whole else 0.0,
            )
        )
    return Flows(flows, gap, evaluated / math.prod(part.size for part in parts), followed)


def in_depth(layers: Sequence[Variable], graph: Graph) -> list[Variable]:
    """Layers from the output down.

    Raises:
        QueryError: two of them lie side by side, so that no walk passes both.
    """
    ordered = sorted(layers, key=lambda variable: -variable.index)
    for upper, lower in itertools.pairwise(ordered):
        if lower not in graph.upstream(upper):
            raise QueryError(
                f"no walk passes both {upper.name!r} and {lower.name!r}: they are the same layer "
                "or lie side by side."
            )
    return ordered


def _whole(forward: Pass, start: Tensor, layers: Sequence[Partition]) -> float:
    """The relevance of all combinations together, where parts do not overlap."""
    message = layers[0].covered(start)
    for upper, lower in itertools.pairwise(layers):
        arrived = send(forward, {upper.variable: message}, {lower.variable: None})
        if lower.variable not in arrived:
            return 0.0
        message = lower.covered(arrived[lower.variable])
    return float(message.sum())


def _check(forward: Pass, k: int, order: str, sample: int, method: str, budget: Budget) -> None:
    if order not in get_args(Order):
        raise QueryError(f"the order is one of {get_args(Order)}, not {order!r}")
    if method not in get_args(Way):
        raise QueryError(f"the method is one of {get_args(Way)}, not {method!r}")
    _require_positive("k", k)
    if budget.work is not None:
        _require_positive("work", budget.work)
    seconds = budget.seconds
    known = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if seconds is not None and not (known and seconds > 0):
        raise QueryError(f"seconds is a positive number, not {seconds!r}")
    if not isinstance(sample, int) or isinstance(sample, bool) or not 0 <= sample < forward.batch:
        raise QueryError(f"sample {sample!r} is out of range: the batch has {forward.batch}")


def _require_positive(what: str, number: Any) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise QueryError(f"{what} is a positive integer, not {number!r}")
