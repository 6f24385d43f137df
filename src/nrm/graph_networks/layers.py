"""The layers of message passing: where walks of nodes are read."""

from __future__ import annotations

from itertools import pairwise

from nrm.errors import QueryError
from nrm.graph import Graph, Variable
from nrm.graph_networks.mixing import mixes, scope
from nrm.measure import Measure

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
    steps = [v for v in graph.variables if v.producer and mixes(v.producer) and _rows(v) == size]
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
    sizes = [size for axis, size in enumerate(variable.shape) if axis != variable.batch_axis]
    return sizes[0] if sizes else None


def _refuse_chain(graph: Graph, steps: list[Variable]) -> None:
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
