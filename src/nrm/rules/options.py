"""Options of rules and alphas that are numbers: what each may be, said beside its default.

A field `gamma: float = number(0.25, least=0)` is all that a rule says; `check` does the rest when
one is made, so that no rule can be asked for that means nothing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

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
