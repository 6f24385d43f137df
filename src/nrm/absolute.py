"""A forward pass with every connection at its absolute size: what bounds are computed with.

`|R(i|j)|` in place of `R(i|j)` carries the sum of the absolute relevance of walks. No part of the
walks that a message stands for has a relevance beyond (total + absolute) / 2 or below
(total - absolute) / 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from nrm.graph import Operation, Variable
from nrm.operators import Propagation
from nrm.program import Pass


class Absolute(Pass):
    """A pass that messages travel at absolute sizes, between layers that `covers` is true of."""

    def __init__(self, forward: Pass) -> None:
        self.graph, self.output, self.batch = forward.graph, forward.output, forward.batch
        self.telescope = None
        self.cautions = forward.cautions
        self._forward = forward
        self._sizes = _Sizes(forward)

    @property
    def propagations(self) -> Mapping[Operation, Propagation]:  # type: ignore[override]
        return self._sizes

    def shape(self, variable: Variable) -> torch.Size:
        return self._forward.shape(variable)

    def covers(self, upper: Variable, lower: Variable) -> bool:
        """Whether every operation between two layers can tell its absolute sizes."""
        graph = self.graph
        between = (graph.upstream(upper) | {upper}) & graph.leading_to([lower]) - {lower}
        return all(v.producer is None or v.producer in self._sizes for v in between)


class _Sizes(Mapping[Operation, Propagation]):
    """Each operation at absolute size, made when it is first asked for."""

    def __init__(self, forward: Pass) -> None:
        self._forward = forward
        self._known: dict[Operation, Propagation | None] = {}

    def __getitem__(self, operation: Operation) -> Propagation:
        if operation not in self._known:
            self._known[operation] = self._forward.propagations[operation].absolute()
        found = self._known[operation]
        if found is None:
            raise KeyError(operation)
        return found

    def __iter__(self) -> Iterator[Operation]:
        return (operation for operation in self._forward.propagations if operation in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
