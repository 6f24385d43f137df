"""What a search finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nrm.formulas import NeuronSet

Order = Literal["largest", "smallest", "absolute"]
"""Which flows are wanted: those with the largest, smallest or absolutely largest relevance."""


def keys(values: Tensor, order: Order) -> Tensor:
    """What is to be large."""
    if order == "absolute":
        return values.abs()
    return values if order == "largest" else -values


@dataclass(frozen=True)
class Flow:
    """One combination of parts, and the relevance that flows through all of them.

    Attributes:
        parts: the part of each layer, by its number (that of a channel, of a neuron as they lie,
            of a set as given), in the order in which the layers were given.
        sets: the same as neuron sets, to query on with.
        relevance: the joint relevance; all walks together have one.
        share: the relevance as a fraction of what passes the layers at all. Equal to the
            relevance where every layer is a cut; elsewhere what passes may be small or negative,
            and shares beyond one or of the other sign.
    """

    parts: dict[str, int]
    sets: tuple[NeuronSet, ...]
    relevance: float
    share: float


@dataclass(frozen=True)
class Flows:
    """The flows found, in order.

    Attributes:
        flows: the first of the order wanted, first.
        gap: no combination that is not listed goes beyond the last one listed by more than this,
            in the order wanted. Zero: the list is exact. Infinite: nothing is known.
        visited: the share of all combinations whose relevance was computed. Of others it is known
            that they stay behind, or that nothing flows there.
        expanded: how many beginnings were followed, by a message each.
    """

    flows: list[Flow]
    gap: float
    visited: float
    expanded: int

    @property
    def exact(self) -> bool:
        """Whether no combination that is not listed goes beyond those listed, up to rounding."""
        return self.gap == 0

    def __iter__(self) -> Iterator[Flow]:
        return iter(self.flows)

    def __len__(self) -> int:
        return len(self.flows)

    def __getitem__(self, index: int) -> Flow:
        return self.flows[index]
