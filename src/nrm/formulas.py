"""Boolean formulas over neuron sets: what a walk visits, and what it avoids.

A neuron set is the event that the walk visits any of its neurons. Events join by `&`, `|`, `~`,
`^` and `implies` (or `>>`). Python binds `>>` before `&`, and `&` before `|`: write parentheses.

A formula may be nested as deep as a loop makes it, so that nothing here calls itself: what is
asked of a formula is worked out part by part, a part that occurs in several places once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from nrm.errors import NeuronSetError
from nrm.graph import Variable

_LONGEST_TEXT, _LONGEST_OF_A_PAGE = 1_000_000, 2_000
"""Characters of a formula: parts that are shared are written out again and again."""

Selector = Callable[[Variable, torch.Size], Tensor]
"""Gives the mask of a variable's neurons, shaped like the variable without its batch axis (or
with it, for a set that differs from sample to sample)."""


class Formula(ABC):
    """What may hold of a walk."""

    @property
    @abstractmethod
    def events(self) -> tuple[NeuronSet, ...]:
        """The neuron sets that it speaks of, each once."""

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

    def _repr_html_(self) -> str:
        return f"<code>{escape(repr(self)[:_LONGEST_OF_A_PAGE])}</code>"

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


class Compound(Formula):
    """A formula of formulas."""

    parts: tuple[Formula, ...]

    def __post_init__(self) -> None:
        # Worked out while the parts' own are at hand. Never saved: hashes of texts differ between
        # processes.
        object.__setattr__(self, "_hash", hash((type(self).__name__, *map(hash, self.parts))))

    @abstractmethod
    def pieces(self) -> list[Formula | str]:
        """Its text, with the formulas in it as they are."""

    @cached_property
    def events(self) -> tuple[NeuronSet, ...]:
        found: dict[NeuronSet, None] = {}
        waiting: list[Formula] = [self]
        seen: set[int] = set()
        while waiting:
            formula = waiting.pop()
            if isinstance(formula, NeuronSet):
                found[formula] = None
            elif isinstance(formula, Compound) and id(formula) not in seen:
                seen.add(id(formula))
                waiting += reversed(formula.parts)
        return tuple(found)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Formula):
            return NotImplemented
        pairs: list[tuple[Formula, Formula]] = [(self, other)]
        seen: set[tuple[int, int]] = set()
        while pairs:
            one, two = pairs.pop()
            if one is two or (id(one), id(two)) in seen:
                continue
            seen.add((id(one), id(two)))
            if not (isinstance(one, Compound) and isinstance(two, Compound)):
                if isinstance(one, Compound) or isinstance(two, Compound) or one != two:
                    return False
                continue
            if type(one) is not type(two) or hash(one) != hash(two):
                return False
            if len(one.parts) != len(two.parts):
                return False
            pairs += zip(one.parts, two.parts, strict=True)
        return True

    def __hash__(self) -> int:
        known: int = self.__dict__["_hash"]
        return known

    def __repr__(self) -> str:
        text: list[str] = []
        length = 0
        waiting: list[Formula | str] = [self]
        while waiting:
            piece = waiting.pop()
            if isinstance(piece, Compound):
                waiting += reversed(piece.pieces())
                continue
            text.append(piece if isinstance(piece, str) else repr(piece))
            length += len(text[-1])
            if length > _LONGEST_TEXT:  # parts that are shared are written out again and again
                return "".join(text)[:_LONGEST_TEXT] + "…"
        return "".join(text)

    def __reduce__(self) -> tuple[Any, ...]:
        """Its parts in a row, each after those that it is made of: no depth to save."""
        places: dict[int, int] = {}
        row: list[Formula | tuple[type[Compound], tuple[int, ...]]] = []
        for formula in parts_first(self):
            places[id(formula)] = len(row)
            if isinstance(formula, Compound):
                row.append((type(formula), tuple(places[id(part)] for part in formula.parts)))
            else:
                row.append(formula)
        return _built, (row,)


@dataclass(frozen=True, eq=False, repr=False)
class Not(Compound):
    """The walk avoids what `part` says."""

    part: Formula

    @property
    def parts(self) -> tuple[Formula, ...]:  # type: ignore[override]
        return (self.part,)

    def pieces(self) -> list[Formula | str]:
        return ["~", *_enclosed(self.part)]


@dataclass(frozen=True, eq=False, repr=False)
class _Joined(Compound):
    parts: tuple[Formula, ...]

    sign: ClassVar[str]

    def pieces(self) -> list[Formula | str]:
        between = f" {self.sign} "
        return [x for part in self.parts for x in (between, *_enclosed(part))][1:]


@dataclass(frozen=True, eq=False, repr=False)
class All(_Joined):
    """Every part holds."""

    sign = "&"


@dataclass(frozen=True, eq=False, repr=False)
class Some(_Joined):
    """At least one part holds."""

    sign = "|"


@dataclass(frozen=True, eq=False, repr=False)
class Odd(_Joined):
    """An odd number of parts holds; of two parts, exactly one."""

    sign = "^"


def parts_first(formula: Formula) -> Iterator[Formula]:
    """It and everything that it is made of, each once and after its own parts."""
    done: set[int] = set()
    waiting: list[Formula] = [formula]
    while waiting:
        one = waiting[-1]
        before = one.parts if isinstance(one, Compound) and id(one) not in done else ()
        missing = [part for part in before if id(part) not in done]
        if missing:
            waiting += reversed(missing)
            continue
        waiting.pop()
        if id(one) not in done:
            done.add(id(one))
            yield one


def _built(row: Sequence[Formula | tuple[type[Compound], tuple[int, ...]]]) -> Formula:
    """The formula that `Compound.__reduce__` took to pieces."""
    made: list[Formula] = []
    for entry in row:
        if isinstance(entry, Formula):
            made.append(entry)
            continue
        kind, places = entry
        parts = tuple(made[place] for place in places)
        made.append(Not(*parts) if kind is Not else kind(parts))  # type: ignore[call-arg]
    return made[-1]


def _enclosed(part: Formula) -> list[Formula | str]:
    alone = isinstance(part, Not) or (isinstance(part, NeuronSet) and len(part.members) == 1)
    return [part] if alone else ["(", part, ")"]


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
    parts: dict[Formula, None] = {}
    waiting = [as_formula(formula) for formula in formulas][::-1]
    while waiting:
        formula = waiting.pop()
        if isinstance(formula, All):
            waiting += reversed(formula.parts)
        else:
            parts[formula] = None
    return tuple(parts)


def holds_of_nothing(formula: Formula | bool) -> bool:
    """Whether a formula holds of a walk that visits nothing."""
    if isinstance(formula, bool):
        return formula
    held: dict[int, bool] = {}
    for part in parts_first(formula):
        inner = [held[id(one)] for one in part.parts] if isinstance(part, Compound) else []
        if isinstance(part, Not):
            held[id(part)] = not inner[0]
        elif isinstance(part, All):
            held[id(part)] = all(inner)
        elif isinstance(part, Some):
            held[id(part)] = any(inner)
        else:  # an odd number of parts; of a neuron set, none
            held[id(part)] = sum(inner) % 2 == 1
    return held[id(formula)]
