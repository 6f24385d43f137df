"""How the factors of a product share its relevance: the alpha coefficients (eqs. 19-23).

`y_j = sum_k a_jk b_kj` has two variables as parents. Its relevance is split by coefficients that
sum to one, and within each variable a contribution rule decides as for any weighted sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass

from nrm.rules.base import check, number

STRUCTURE = 4
"""The rank of what says how features are connected, an adjacency matrix given as an input."""

SCALE = 5
"""From this rank on a gate is a scale, what normalises a vector (see `nrm.structure`)."""


class Alpha(ABC):
    """Splits the relevance of a product between its factors."""

    def __post_init__(self) -> None:
        if is_dataclass(self):
            check(self)

    @abstractmethod
    def coefficients(self, gates: Sequence[int]) -> list[float]:
        """One coefficient for each factor; they sum to one, and a factor with zero is no parent.

        Arguments:
            gates: how much each factor is a gate (see `nrm.structure`); 0: it is none.
        """


@dataclass(frozen=True)
class ValueTakesAll(Alpha):
    """LRP-all: the value takes all, the gate none. Factors that are gates alike share equally."""

    def coefficients(self, gates: Sequence[int]) -> list[float]:
        values = [gate == min(gates) for gate in gates]
        return [value / sum(values) for value in values]


@dataclass(frozen=True)
class Uniform(Alpha):
    """Every factor takes the same (AttnLRP), but scales none: they are part of a norm."""

    def coefficients(self, gates: Sequence[int]) -> list[float]:
        taking = [gate < SCALE or min(gates) >= SCALE for gate in gates]
        return [takes / sum(taking) for takes in taking]


@dataclass(frozen=True)
class Shares(Alpha):
    """Coefficients as given: those of values first, and those of gates.

    Where no factor is a gate, or all are alike, they share equally.

    Arguments:
        value, gate: what values and gates take together; they sum to one.
    """

    value: float = number(least=0, most=1)
    gate: float = number(least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_sum_of_one(self, self.value, self.gate)

    def coefficients(self, gates: Sequence[int]) -> list[float]:
        values = [gate == min(gates) for gate in gates]
        if all(values):
            return Uniform().coefficients(gates)
        others = len(gates) - sum(values)
        return [self.value / sum(values) if value else self.gate / others for value in values]


@dataclass(frozen=True)
class InOrder(Alpha):
    """Coefficients by the factors' order in the operator's call: `InOrder(0.8, 0.2)`."""

    first: float = number(least=0, most=1)
    second: float = number(least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_sum_of_one(self, self.first, self.second)

    def coefficients(self, gates: Sequence[int]) -> list[float]:
        return [self.first, self.second]


def _require_sum_of_one(alpha: Alpha, *shares: float) -> None:
    if abs(sum(shares) - 1) > 1e-12:
        raise ValueError(f"{type(alpha).__name__}: shares sum to one, got {shares}")
