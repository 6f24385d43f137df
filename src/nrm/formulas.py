"""Boolean formulas over neuron sets: what a walk visits, and what it avoids.

A neuron set is the event that the walk visits any of its neurons. Events join by `&`, `|`, `~`,
`^` and `implies` (or `>>`). Python binds `>>` before `&`, and `&` before `|`: write parentheses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from nrm.errors import NeuronSetError
from nrm.graph import Variable

Selector = Callable[[Variable, torch.Size], Tensor]
"""Gives the mask of a variable's neurons, shaped like the variable without its batch axis (or
with it, for a set that differs from sample to sample)."""


class Formula(ABC):
    """What may hold of a walk."""

    @property
    @abstractmethod
    def events(self) -> tuple[NeuronSet, ...]:
        """The neuron sets that it speaks of, each once."""

    @abstractmethod
    def given(self, event: NeuronSet, visited: bool) -> Formula | bool:
        """What is left of it once it is known whether the walk visits one of its events."""

    def __and__(self, other: Formula | str) -> Formula:
        return All((self, as_formula(other)))

    def __rand__(self, other: str) -> Formula:
        return as_formula(other) & self

    def __or__(self, other: Formula | str) -> Formula:
        return Some((self, as_formula(other)))

    def __ror__(self, other: str) -> Formula:
        return as_formula(other) | self

    def __xor__(self, other: Formula | str) -> Formula:
        return Odd((self, as_formula(other)))

    def __rxor__(self, other: str) -> Formula:
        return as_formula(other) ^ self

    def __invert__(self) -> Formula:
        return Not(self)

    def implies(self, other: Formula | str) -> Formula:
        """Not this, or the other."""
        return Some((Not(self), as_formula(other)))

    def __rshift__(self, other: Formula | str) -> Formula:
        return self.implies(other)

    def __rrshift__(self, other: str) -> Formula:
        return as_formula(other).implies(self)

    def __bool__(self) -> bool:
        raise NeuronSetError(
            f"{self!r} holds of some walks and not of others, so it is neither true nor false. "
            "Join sets by &, |, ~ and ^, not by `and`, `or` and `not`."
        )


@dataclass(frozen=True)
class Member:
    """Neurons of one variable.

    Attributes:
        layer: the variable's address.
        select: gives the mask; a value or a function of a module, where sets are to be pickled.
        text: how it was made, to show; sets made in the same way are equal.
        key: tells sets apart that look the same, here and in other processes.
    """

    layer: str
    select: Selector = field(compare=False)
    text: str
    key: object = None

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str):
            raise NeuronSetError(f"a layer is named by a string, not {self.layer!r}.")


@dataclass(frozen=True)
class NeuronSet(Formula):
    """Neurons of one or several variables: a walk visits the set if it visits any of them.

    Made by `neurons`, `channels`, `patch` and `mask`; two sets united by `|` are one set.
    """

    members: tuple[Member, ...]

    @property
    def events(self) -> tuple[NeuronSet, ...]:
        return (self,)

    def given(self, event: NeuronSet, visited: bool) -> Formula | bool:
        if not self.holds_all_of(event):
            return self
        left = () if visited else tuple(m for m in self.members if m not in event.members)
        return NeuronSet(left) if left else visited

    def holds_all_of(self, other: NeuronSet) -> bool:
        """Whether another set is this one, or was united with others into it."""
        return set(other.members) <= set(self.members)

    @overload
    def __or__(self, other: NeuronSet | str) -> NeuronSet: ...

    @overload
    def __or__(self, other: Formula) -> Formula: ...

    def __or__(self, other: Formula | str) -> Formula:
        other = as_formula(other)
        if isinstance(other, NeuronSet):
            return NeuronSet(self.members + other.members)
        return super().__or__(other)

    @property
    def layers(self) -> tuple[str, ...]:
        """The addresses of the variables, each once."""
        return tuple(dict.fromkeys(member.layer for member in self.members))

    def __repr__(self) -> str:
        return " | ".join(member.text for member in self.members)


@dataclass(frozen=True)
class Not(Formula):
    """The walk avoids what `part` says."""

    part: Formula

    @property
    def events(self) -> tuple[NeuronSet, ...]:
        return self.part.events

    def given(self, event: NeuronSet, visited: bool) -> Formula | bool:
        left = self.part.given(event, visited)
        if isinstance(left, bool):
            return not left
        return left.part if isinstance(left, Not) else Not(left)

    def __repr__(self) -> str:
        return f"~{_enclosed(self.part)}"


@dataclass(frozen=True)
class _Joined(Formula):
    parts: tuple[Formula, ...]

    @property
    def events(self) -> tuple[NeuronSet, ...]:
        return tuple(dict.fromkeys(event for part in self.parts for event in part.events))

    def _left(self, event: NeuronSet, visited: bool) -> list[Formula | bool]:
        return [part.given(event, visited) for part in self.parts]


@dataclass(frozen=True)
class All(_Joined):
    """Every part holds."""

    def given(self, event: NeuronSet, visited: bool) -> Formula | bool:
        left = self._left(event, visited)
        if any(part is False for part in left):
            return False
        return _join(All, left, empty=True)

    def __repr__(self) -> str:
        return " & ".join(map(_enclosed, self.parts))


@dataclass(frozen=True)
class Some(_Joined):
    """At least one part holds."""

    def given(self, event: NeuronSet, visited: bool) -> Formula | bool:
        left = self._left(event, visited)
        if any(part is True for part in left):
            return True
        return _join(Some, left, empty=False)

    def __repr__(self) -> str:
        return " | ".join(map(_enclosed, self.parts))


@dataclass(frozen=True)
class Odd(_Joined):
    """An odd number of parts holds; of two parts, exactly one."""

    def given(self, event: NeuronSet, visited: bool) -> Formula | bool:
        left = self._left(event, visited)
        joined = _join(Odd, left, empty=False)
        if sum(part is True for part in left) % 2 == 0:
            return joined
        return not joined if isinstance(joined, bool) else Not(joined)

    def __repr__(self) -> str:
        return " ^ ".join(map(_enclosed, self.parts))


def _join(kind: type[_Joined], parts: Iterable[Formula | bool], empty: bool) -> Formula | bool:
    """The parts that are not settled yet."""
    left = [part for part in parts if not isinstance(part, bool)]
    if len(left) < 2:
        return left[0] if left else empty
    return kind(tuple(left))


def _enclosed(part: Formula) -> str:
    alone = isinstance(part, Not) or (isinstance(part, NeuronSet) and len(part.members) == 1)
    return repr(part) if alone else f"({part!r})"


def every_neuron(layer: str) -> NeuronSet:
    """All neurons of a layer."""
    return NeuronSet((Member(layer, _all_of, f"neurons({layer!r})"),))


def _all_of(variable: Variable, shape: torch.Size) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def as_formula(chosen: Formula | str) -> Formula:
    """A formula as it is; the name of a layer means all of its neurons."""
    if isinstance(chosen, str):
        return every_neuron(chosen)
    if isinstance(chosen, Formula):
        return chosen
    raise NeuronSetError(
        "expected a neuron set, a formula of neuron sets or the name of a layer, got "
        f"{type(chosen).__name__}."
    )


def as_set(chosen: Formula | str) -> NeuronSet:
    """A neuron set as it is; the name of a layer means all of its neurons."""
    if isinstance(chosen, Formula) and not isinstance(chosen, NeuronSet):
        raise NeuronSetError(f"expected a neuron set here, not the formula {chosen!r}.")
    found = as_formula(chosen)
    assert isinstance(found, NeuronSet)
    return found


def events_of(formulas: Iterable[Formula | bool]) -> tuple[NeuronSet, ...]:
    """The neuron sets that any formula speaks of, each once."""
    found: dict[NeuronSet, None] = {}
    for formula in formulas:
        if not isinstance(formula, bool):
            found |= dict.fromkeys(formula.events)
    return tuple(found)


def apart(sets: Sequence[NeuronSet]) -> tuple[NeuronSet, ...]:
    """The sets, with those that have neurons in common by construction taken to pieces.

    `a | b` is the event that a or b is visited: beside a and b it is none of its own.
    """
    used = Counter(member for chosen in sets for member in set(chosen.members))
    pieces: dict[NeuronSet, None] = {}
    for chosen in sets:
        shares = any(used[member] > 1 for member in chosen.members)
        parts = [NeuronSet((m,)) for m in chosen.members] if shares else [chosen]
        pieces |= dict.fromkeys(parts)
    return tuple(pieces)


def united(sets: Iterable[Formula | str]) -> NeuronSet:
    """The neurons in any of some sets.

    Raises:
        NeuronSetError: there are none.
    """
    members = tuple(member for chosen in sets for member in as_set(chosen).members)
    if not members:
        raise NeuronSetError("name at least one neuron set.")
    return NeuronSet(members)


def conjunction(formulas: Iterable[Formula | str]) -> tuple[Formula, ...]:
    """The parts that hold together, those of nested conjunctions one by one."""
    parts: list[Formula] = []
    for formula in map(as_formula, formulas):
        parts += conjunction(formula.parts) if isinstance(formula, All) else [formula]
    return tuple(dict.fromkeys(parts))
