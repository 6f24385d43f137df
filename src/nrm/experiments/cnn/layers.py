"""Which layers are compared, refused before anything takes long."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nrm.errors import QueryError
from nrm.graph import Graph, Variable

Pair = tuple[str, str]


def pairs(named: Sequence[Sequence[str]]) -> list[Pair]:
    """Layers as they are given, each pair once.

    Raises:
        QueryError: there are more or fewer than two.
    """
    for names in named:
        if len(names) != 2 or names[0] == names[1]:
            raise QueryError(f"--layers {','.join(names)}: name two different layers to compare.")
    return list(dict.fromkeys((names[0], names[1]) for names in named))


def combinations(graph: Graph, layers: Pair, k: int | None) -> int:
    """How many pairs of channels two layers have, or of `k` clusters each.

    Raises:
        UnknownLayerError, QueryError: they cannot be compared.
    """
    given = f"--layers {','.join(layers)}"
    first, second = (graph.variable(layer) for layer in layers)
    if second in graph.upstream(first):
        raise QueryError(f"{given}: {layers[1]} comes first. Name the lower layer first.")
    if first not in graph.upstream(second):
        raise QueryError(
            f"{given}: neither leads to the other, so no relevance flows through both."
        )
    return math.prod(_parts(variable, k, given) for variable in (first, second))


def _parts(variable: Variable, k: int | None, given: str) -> int:
    """How many sets a layer is divided into."""
    shape = [size for size in variable.shape if size is not None]
    if len(shape) < 3:
        raise QueryError(
            f"{given}: {variable.name} has neurons of shape {tuple(shape)} and so no channels at "
            "positions. Choose layers between the input and where it is flattened."
        )
    positions = math.prod(shape[1:])
    if k is None:
        return shape[0]
    if positions < k:
        raise QueryError(
            f"{given}: {variable.name} has {positions} positions, too few for {k} clusters."
        )
    return k
