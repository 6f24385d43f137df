"""What a set of a lower layer does by way of one of an upper layer, read in several exact ways.

Between two layers A and B lie a block, h(a), and what is above it, f(h). All that A does passes
the upper layer, h. From what removing A changes there, h - h(without A), everything else is read:

path           gradients of f, averaged between the two, times the change at B: additive over B
in place       f(x) less f with B as it is without A: what reaches the output through B alone
restored       f without A, and B as it is with A, less f without A: the same at the other end
best additive  what no reading with the same sums over B exceeds

The first sums to f(x) - f(x without A) over B, as walks through blocks do (`nrm.Blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nrm.errors import QueryError
from nrm.evaluation import Families, Interventions
from nrm.removal import by_variable, replacement

Points = Sequence[tuple[float, float]]
"""Where on a path from 0 (without A) to 1 (with A), and with which weight; weights sum to one."""

_At = Callable[[float, slice], Tensor]
"""Values of the upper layer at some place of a path, of some sets."""

_KEPT = 8
"""How much more a copy takes whose derivatives are wanted, roughly."""

HERE: Points = ((1.0, 1.0),)
"""At the input itself: f is linear there."""


def gauss(count: int) -> Points:
    """So many points of Gauss and Legendre: exact for polynomials of degree 2 count - 1."""
    places, weights = np.polynomial.legendre.leggauss(count)
    return [((a + 1) / 2, w / 2) for a, w in zip(places.tolist(), weights.tolist(), strict=True)]


class Between:
    """A network with sets of two layers, the upper one of which all passes that the lower does.

    Values are flat, `[copies, neurons]`.

    Arguments:
        families: of two layers, the lower one first.
        interventions: on the same sample; its removal counts.
        memory: bytes that copies which are computed at once may take.

    Attributes:
        here: `[1, neurons]`, the upper layer.
        without: `[sets, neurons]`, the upper layer without each set of the lower one.
        members: `[parts, neurons]`, one at the neurons of each part of the upper layer.
        output, lost: f(x), and `[sets]` f(x) - f(x without A).

    Raises:
        QueryError: something bypasses the upper layer.
    """

    def __init__(
        self, families: Families, interventions: Interventions, memory: int = 2**28
    ) -> None:
        lower, upper = families.parts
        rerun, graph = interventions.rerun, interventions.graph
        low, high = lower.variable.node, upper.variable.node
        assert low is not None
        assert high is not None
        self._rerun, self._low, self._high, self._memory = rerun, low, high, memory
        self._explained = graph.explained
        self._target = int(interventions.target.reshape(-1)[0])
        changed = rerun.changed_by([low])
        self._block = rerun.part([high], changed, rerun.place[low], True)
        self._top = rerun.part([graph.explained], changed, rerun.place[high], True)
        if self._block.changed != {low} or self._top.changed != {high}:
            raise QueryError(
                f"{upper.name!r} is bypassed: not all that {lower.name!r} does passes it."
            )
        removal = by_variable(interventions.removal, graph)
        below = rerun.copies.rows(low, rerun.values[low], 1)
        removed = replacement(removal, lower.variable, rerun.values[low])
        inside = self._members(families, 0)
        self._below, self._below_without = below, torch.where(inside > 0, removed, below)
        self.here = rerun.copies.rows(high, rerun.values[high], 1)
        self.members = self._members(families, 1)
        with torch.no_grad():
            self.without = self._values(self._below_without)
            self.output = interventions.output
            self.lost = self.output - self.outputs(self.without)

    def outputs(self, values: Tensor) -> Tensor:
        """`[copies]`, f of values of the upper layer."""
        found = [self._f(values[some]) for some in self._chunks(len(values), self._top.bytes)]
        return torch.cat(found)

    def along_path(self, points: Points) -> Tensor:
        """`[sets, parts]`: gradients along the straight path, times the change at each part."""

        def at(share: float, some: slice) -> Tensor:
            return self.without[some] + share * (self.here - self.without[some])

        return self._by_gradients(points, at)

    def along_removal(self, points: Points) -> Tensor:
        """`[sets, parts]`: the same where the upper layer is when A is scaled by degrees."""

        def at(share: float, some: slice) -> Tensor:
            with torch.no_grad():
                below = self._below_without[some]
                return self._values(below + share * (self._below - below))

        return self._by_gradients(points, at)

    def in_place(self) -> Tensor:
        """`[sets, parts]`: f(x) less f with each part as it is without A, all else as it is."""
        return self.output - self._patched(self.here.expand_as(self.without), self.without)

    def restored(self) -> Tensor:
        """`[sets, parts]`: f without A but with each part as it is, less f without A."""
        alone = (self.output - self.lost)[:, None]
        return self._patched(self.without, self.here.expand_as(self.without)) - alone

    def _patched(self, values: Tensor, others: Tensor) -> Tensor:
        """`[sets, parts]`: f of values, with others in the place of each part."""
        found = []
        with torch.no_grad():
            for one, other in zip(values, others, strict=True):
                row = [
                    self._f(torch.where(self.members[some] > 0, other, one))
                    for some in self._chunks(len(self.members), self._top.bytes)
                ]
                found.append(torch.cat(row))
        return torch.stack(found)

    def _by_gradients(self, points: Points, at: _At) -> Tensor:
        found = []
        for some in self._chunks(len(self.without), _KEPT * self._top.bytes):
            mean = torch.zeros_like(self.without[some])
            for share, weight in points:
                values = at(share, some).requires_grad_()
                with torch.enable_grad():
                    output = self._f(values, derivatives=True)
                    (slope,) = torch.autograd.grad(output.sum(), values)
                mean += weight * slope
            found.append(mean.mul_(self.here - self.without[some]) @ self.members.T)
        return torch.cat(found)

    def _members(self, families: Families, place: int) -> Tensor:
        part = families.parts[place]
        value = families.R.activations(part.variable.name).unsqueeze(0)
        split = part.variable.canonical(part.split(torch.ones_like(value), range(part.size)))
        return split.reshape(part.size, -1)

    def _values(self, below: Tensor) -> Tensor:
        """`[copies, neurons]` of the upper layer, from those of the lower one."""
        found = []
        for some in self._chunks(len(below), self._block.bytes):
            start = {self._low: self._rerun.copies.unrows(self._low, below[some])}
            values = self._rerun.compute(self._block, start, self._copies(below[some]), None)
            value, count = values[self._high], len(below[some])
            found.append(self._rerun.copies.rows(self._high, value, count))
        return torch.cat(found)

    def _f(self, values: Tensor, derivatives: bool = False) -> Tensor:
        copies = self._rerun.copies
        start = {self._high: copies.unrows(self._high, values)}
        found = self._rerun.compute(self._top, start, self._copies(values), None, derivatives)
        rows: Tensor = copies.rows(self._explained, found[self._explained], len(values))
        return rows[:, self._target]

    def _copies(self, values: Tensor) -> Tensor:
        return torch.zeros(len(values), dtype=torch.long, device=values.device)

    def _chunks(self, count: int, each: int) -> list[slice]:
        size = max(1, self._memory // max(1, each))
        return [slice(begin, begin + size) for begin in range(0, count, size)]


def best_additive(contribution: Tensor, lost: Tensor) -> float:
    """The largest correlation with `[sets, ...]` of any reading with given sums `[sets]`.

    Over the parts, a reading that sums to `lost` for each set may be anything: best is the
    contribution there, at some scale, and its mean is given. With the squares between sets and
    within them, B and W, and the correlation r of the sums, the largest is that of the scale for
    which `(r^2 B + W) / (B + W)` is reached, its root; no negative r helps.
    """
    values = contribution.double().flatten(1)
    means = values.mean(1)
    within = float((values - means[:, None]).square().sum())
    around = means - means.mean()
    between = float(around.square().sum()) * values.shape[1]
    given = lost.double() - lost.double().mean()
    size = float(given.square().sum()) * float(around.square().sum())
    met = max(0.0, float(given @ around))
    explained = between * met**2 / size if size > 0 else 0.0
    return float(((explained + within) / (between + within)) ** 0.5)
