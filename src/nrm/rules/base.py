"""What a rule and an alpha are: how much each parent contributes, how products share (3.3).

Every rule here is a sum of *groups of terms*. A term is a factor at the parent neurons and a weight
on the connections; the unnormalised propagation matrix (eq. 14) is

    T~_ij = sum over groups g of  gate_g(j) * sum over terms t in g of  factor_t(i) * weight_t(i, j)

and `R(i|j) = T~_ij / sum_i T~_ij` (eq. 17). Because each term is linear in its factor, one
vector-Jacobian product of the operator itself propagates a message through it, whatever the
operator is. A new rule says what its terms are, and nothing else; `nrm.testing.check_rule` checks
it. Its options are fields that say what they may be, `gamma: float = number(0.25, least=0)`, so
that no rule can be asked for that means nothing.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

Term = tuple[Tensor, Tensor | None]
"""Factor at the parents (shape of the operand) and weight (shape of the operator's weight);
weight `None` means that every connection counts one."""

Gate = Tensor | float
"""Factor at the neurons j (shape of the operator's output), or one number for all of them."""


class Activation:
    """The parent neurons of one operand, with their values.

    Arguments:
        constant: their value never changes: a bias seen as an input of value one.
        real: `[*operand]`, 0 at explicit zeros (padding and the like), which are no parents, and
            1 elsewhere; `None`: all are parents.
    """

    def __init__(self, value: Tensor, constant: bool = False, real: Tensor | None = None) -> None:
        self.value = value
        self.constant = constant
        self.real = real

    @cached_property
    def _signed(self) -> bool:
        return bool((self.value.amin() < 0).item()) if self.value.numel() else False

    @cached_property
    def positive(self) -> Tensor:
        """max(x, 0); x itself where nothing is negative."""
        return self.value.clamp(min=0) if self._signed else self.value

    @cached_property
    def negative(self) -> Tensor | None:
        """min(x, 0); `None` where nothing is negative, so that its terms can be left out."""
        return self.value.clamp(max=0) if self._signed else None

    @cached_property
    def ones(self) -> Tensor:
        """One at every parent, at no memory; zero at explicit zeros."""
        if self.real is not None:
            return self.real.to(self.value.dtype)
        return self.every

    @cached_property
    def every(self) -> Tensor:
        """One at every neuron, explicit zeros included."""
        return torch.ones((), dtype=self.value.dtype, device=self.value.device).expand(
            self.value.shape
        )


class Weight:
    """A weight and what rules make of it, computed once and kept as long as the weight lives."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._derived: dict[Hashable, Tensor] = {}

    def derive(self, key: Hashable, modify: Callable[[Tensor], Tensor]) -> Tensor:
        """`modify(weight)`, remembered under `key`."""
        if key not in self._derived:
            self._derived[key] = modify(self.value)
        return self._derived[key]

    def size(self, made: Tensor) -> Tensor:
        """The absolute size of the weight, or of what a rule made of it."""
        return made.abs()

    @property
    def positive(self) -> Tensor:
        return self.derive("positive", lambda w: w.clamp(min=0))

    @property
    def negative(self) -> Tensor:
        return self.derive("negative", lambda w: w.clamp(max=0))


class Rule(ABC):
    """A contribution rule. Subclasses are small frozen dataclasses that say their terms."""

    reuses_sum: ClassVar[bool] = False
    """The single group is the operator's own sum, so that the forward pass already computed it."""
    by_sign: ClassVar[bool] = False
    """Group 0 takes the neurons j whose own sum `sum_i z_ij` is not negative; group 1 takes the
    others, with gate -1."""
    nonnegative: ClassVar[bool] = False
    """No `T~_ij` is ever negative: the positive-sum condition (15) fails only where all vanish."""
    reads_ahead: ClassVar[bool] = False
    """The activation after a weighted sum decides what its operands contribute."""
    first_order: ClassVar[bool] = False
    """Operations with several parents per neuron pass relevance by their derivatives."""
    bounds_inputs: ClassVar[bool] = False
    """It knows between which bounds its operands lie."""
    counts_biases: ClassVar[bool] = True
    """Read as the original LRP (`Original`), it has biases in its denominators."""
    stabilizer: float = 0.0
    """Columns with `|sum_i T~_ij|` no larger than this count as vanished."""

    def __post_init__(self) -> None:
        if is_dataclass(self):
            check(self)

    @abstractmethod
    def groups(self, x: Activation, w: Weight) -> Sequence[Sequence[Term]]:
        """The terms of one operand, group by group. A term that is zero may be left out."""

    def gates(self, sums: Sequence[Tensor], own_sum: Tensor | None) -> Sequence[Gate]:
        """One gate per group.

        Arguments:
            sums: each group's sum over all operands, evaluated on demand.
            own_sum: the operator's own sum, for rules that go `by_sign`.
        """
        if not self.by_sign:
            return [1.0] * len(sums)
        assert own_sum is not None
        below = (own_sum < 0).to(torch.int8)  # small: there are as many as neurons
        return [1 - below, -below]

    def opposed_sum(self, first: Tensor, own_sum: Tensor) -> Tensor | None:
        """Group 1's sum `by_sign`, where it follows from that of group 0 and the own sum."""
        return None

    def original_gates(
        self, sums: Sequence[Tensor], own_sum: Tensor | None, original: Original
    ) -> Sequence[Gate]:
        """One gate per group, with the rule's own stabilised denominator in it (eqs. 43-46).

        Arguments: as for `gates`.
        """
        gates = self.gates(sums, own_sum)
        total = sum((gate * sums[g] for g, gate in enumerate(gates)), torch.zeros(()))
        divisor = original.stabilized(total, self)
        return [gate / divisor for gate in gates]


# -- the third reading of a rule -------------------------------------------------------------------


@dataclass(frozen=True)
class Original:
    """LRP as it was first written (appendix E, eqs. 43-46), to be had by `normalized=`.

    Each `T~_ij` is divided by the rule's own denominator, moved away from zero by a stabiliser,
    instead of by the sum of its column: `Epsilon` then absorbs relevance, `AlphaBeta(2, 1)` takes
    twice its positive and once its negative part even where one of them is missing, and what
    cannot be divided is lost instead of split evenly. With biases as inputs they stand in the
    denominators and absorb their part; dropped, they do not. Relevance starts from the explained
    output itself, not from one. This is what zennit, captum and iNNvestigate compute.

    Arguments:
        stabilizer: what denominators are moved by, with their own sign (zero counts as positive).
            `Epsilon` has its own.
    """

    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        moved = Number(least=0).of("Original: stabilizer", self.stabilizer)
        object.__setattr__(self, "stabilizer", moved)

    def stabilized(self, denominator: Tensor, rule: Rule) -> Tensor:
        """A denominator of a rule, moved away from zero."""
        by = rule.stabilizer or self.stabilizer
        moved = denominator + by * torch.where(denominator < 0, -1.0, 1.0).to(denominator)
        return moved.masked_fill(moved == 0, torch.inf)  # nothing is shared out there


Normalized = bool | Original
"""How a rule is read: columns that sum to one (eq. 17), `T~_ij` itself (eq. 26), or `Original`."""


# -- options: what each may be, said beside its default --------------------------------------------

_KEY = "nrm.option"


@dataclass(frozen=True)
class Number:
    """What a number may be.

    Attributes:
        least, most: bounds, themselves included.
        whole: whether it is an integer.
    """

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.least == -math.inf and self.most == math.inf:
            return kind
        if self.most == math.inf:
            return f"{kind} of {self.least:g} or more"
        return f"{kind} from {self.least:g} to {self.most:g}"

    def of(self, where: str, value: Any) -> float:
        """The value as a plain Python number.

        Raises:
            TypeError: it is no number of that kind.
            ValueError: it is out of bounds, infinite or NaN.
        """
        kind = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{where} is {self}, not {value!r}")
        plain: float = int(value) if self.whole and isinstance(value, Integral) else float(value)
        if not math.isfinite(plain) or not self.least <= plain <= self.most:
            raise ValueError(f"{where} is {self}, not {value!r}")
        return plain


@dataclass(frozen=True)
class Flag:
    """What is on or off."""

    def of(self, where: str, value: Any) -> bool:
        """The value itself.

        Raises:
            TypeError: it is neither.
        """
        if not isinstance(value, bool):
            raise TypeError(f"{where} is True or False, not {value!r}")
        return value


def number(
    default: Any = dataclasses.MISSING,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    whole: bool = False,
) -> Any:
    """A field of a rule or alpha that is a finite number within bounds (see `Number`)."""
    return _field(default, Number(least, most, whole))


def flag(default: Any = dataclasses.MISSING) -> Any:
    """A field of a rule or alpha that is `True` or `False`."""
    return _field(default, Flag())


def check(owner: Any) -> None:
    """Check every option of a dataclass that says what it may be, and keep it as a plain value.

    Raises:
        TypeError, ValueError: naming the class, the option, and what it may be.
    """
    for field in dataclasses.fields(owner):
        kind = field.metadata.get(_KEY)
        if kind is not None:
            where = f"{type(owner).__name__}: {field.name}"
            object.__setattr__(owner, field.name, kind.of(where, getattr(owner, field.name)))


def _field(default: Any, kind: Number | Flag) -> Any:
    return dataclasses.field(default=default, metadata={_KEY: kind})


# -- how the factors of a product share: alphas (eqs. 19-23) ---------------------------------------
#
# `y_j = sum_k a_jk b_kj` has two variables as parents. Its relevance is split by coefficients that
# sum to one, and within each variable a contribution rule decides as for any weighted sum.

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
