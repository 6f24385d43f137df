"""A condition: what is asked of the walks, written once for any query of any measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from nrm.display import Shown, Table, sizes
from nrm.errors import NrmError, QueryError
from nrm.formulas import All, Formula, NeuronSet, as_formula, as_set, conjunction
from nrm.rules import Normalized, Original
from nrm.tensors import check_dense

Within = NeuronSet | str | None
Weights = Mapping[str, Tensor]
"""For some layers, a weight of each of their neurons, shaped like the layer without its batch
axis, or with it, there or in front."""


@dataclass(frozen=True, init=False, repr=False)
class Condition(Shown):
    """Which walks are asked for, and what their relevance is divided by.

    Every query of a measure takes these arguments, or a condition in place of its sets: what is
    written once may be asked of many measures and in many ways. A measure keeps what it has worked
    out about a condition (where its sets lie, the masks of their neurons, the relevance of what is
    given) as long as the condition itself is kept.

    A walk visits a set if it visits any of its neurons; what flows past the set over a skip
    connection does not count. To keep what bypasses it, say `within` instead.

    Arguments:
        sets: neuron sets, or formulas over such (`~a & b`, eqs. 53-55), which hold together; the
            name of a layer stands for all of its neurons. A condition among them adds what it
            says itself.
        given: a set or formula, or several that hold jointly: results are divided by their
            relevance (eq. 11), and 0 where that is 0.
        within: count only walks that visit no other neurons of the variables of this set: they
            pass the set, or bypass these variables altogether. The relevance of `given`, by which
            results are divided, counts all walks.
        normalized: `False`: the unnormalised walk relevance, a product of contributions as they
            are (eq. 26), summed over the same walks. `"original"` or `rules.Original(stabilizer)`:
            LRP as it was first written (eqs. 43-46), with each rule's own denominator, by which
            relevance is lost on the way. A result is then what *arrives* at the last set, or at
            the layer asked for; formulas are answered in heatmaps alone.
        weights: of neurons, by layer: a walk counts with the product of the weights of the neurons
            that it visits (eq. 33), those of other layers with 1. What is given has none.

    Raises:
        NeuronSetError, QueryError: something is none of that.

    Example:
        >>> wheel = nrm.Condition(nrm.channels("features.28", 12), given="features.26")
        >>> R(wheel), R.heatmap(wheel), R.marginal("features.24", wheel)
    """

    sets: tuple[Formula, ...]
    given: tuple[Formula, ...]
    within: NeuronSet | None
    normalized: Normalized
    _weights: tuple[_Weight, ...]

    def __init__(
        self,
        *sets: Sets,
        given: Given = None,
        within: Within = None,
        normalized: Reading = True,
        weights: Weights | None = None,
    ) -> None:
        with naming(lambda: _text(sets, given, within, normalized)):
            reading = as_reading(normalized)
            held: list[Formula] = []
            known = only_formulas(given)
            laid = _checked(weights)
            inside = None if within is None else as_set(within)
            for one in sets:
                if not isinstance(one, Condition):
                    held.append(as_formula(one))
                    continue
                if one.within is not None:
                    if inside is not None and inside != one.within:
                        raise QueryError(
                            f"walks stay within {inside!r} or within {one.within!r}: say it once."
                        )
                    inside = one.within
                held += one.sets
                known += one.given
                laid += one._weights
                if one.normalized is not True:
                    if reading is not True and reading != one.normalized:
                        raise QueryError(
                            f"normalized={reading!r} and normalized={one.normalized!r}: say it "
                            "once."
                        )
                    reading = one.normalized
            if len({weight.layer for weight in laid}) < len(laid):
                raise QueryError("a layer is weighed by two conditions: weigh it once.")
        for name, value in (
            ("sets", tuple(held)),
            ("given", tuple(known)),
            ("within", inside),
            ("normalized", reading),
            ("_weights", tuple(laid)),
        ):
            object.__setattr__(self, name, value)

    @property
    def weights(self) -> dict[str, Tensor]:
        """By layer; none by default."""
        return {weight.layer: weight.values for weight in self._weights}

    @cached_property
    def formula(self) -> Formula | bool:
        """What holds of the walks that count: all sets and all that is given."""
        return _all_of((*self.sets, *self.given))

    @cached_property
    def known(self) -> Formula | bool:
        """What is given; `True` if nothing is."""
        return _all_of(self.given)

    @property
    def counts_all(self) -> bool:
        """Whether walks count with their normalised relevance, wherever they go."""
        return self.normalized is True and self.within is None and not self._weights

    def counting_all(self, what: str) -> Condition:
        """This condition, where walks have to count with their normalised relevance.

        Arguments:
            what: needs that, with its verb.

        Raises:
            QueryError: they count otherwise.
        """
        if not self.counts_all:
            raise QueryError(
                f"{what} normalised relevance, of walks that may go anywhere: a condition has "
                "neither within, nor weights, nor normalized=False."
            )
        return self

    @property
    def counting(self) -> tuple[object, ...]:
        """How walks count. Conditions for which it is equal can be answered in one run."""
        own = self if isinstance(self.normalized, Original) else None
        return self.normalized, self.within, self._weights, own

    def __repr__(self) -> str:
        return f"Condition({self.said()})"

    def __str__(self) -> str:
        return repr(self)

    def table(self) -> Table:
        rows = [("passes", _short(one)) for one in self.sets]
        rows += [("given", _short(one)) for one in self.given]
        if self.within is not None:
            rows.append(("within", _short(self.within)))
        if self.normalized is False:
            rows.append(("normalized", "no: products of unnormalised contributions"))
        elif self.normalized is not True:
            rows.append(("normalized", f"by the rules' own denominators, {self.normalized}"))
        for weight in self._weights:
            rows.append(("weighed", f"{weight.layer}: {sizes(weight.values.shape)} weights"))
        return Table("Condition", (), rows, [] if rows else ["All walks."])

    def said(self) -> str:
        """The arguments as text."""
        layers = [weight.layer for weight in self._weights]
        return _text(self.sets, self.given, self.within, self.normalized, layers)


Sets = Formula | str | Condition
"""A neuron set, a formula over such, the name of a layer for all of its neurons; or a condition."""

Given = Sets | Sequence[Sets] | None


@dataclass(frozen=True, eq=False)
class _Weight:
    """The weights of a layer's neurons. Equal to nothing but itself, and so are conditions."""

    layer: str
    values: Tensor


Reading = Normalized | Literal["original"]
"""How contributions are read, as it may be asked for."""


def as_reading(normalized: object) -> Normalized:
    """How contributions are read, as it was asked for.

    Raises:
        QueryError: it is none of the three readings.
    """
    if isinstance(normalized, bool | Original):
        return normalized
    if normalized == "original":
        return Original()
    raise QueryError(
        "normalized is True, False, 'original' or nrm.rules.Original(stabilizer), not "
        f"{normalized!r}."
    )


def as_condition(
    sets: Sequence[Sets],
    given: Given = None,
    within: Within = None,
    normalized: Reading = True,
) -> Condition:
    """What a query was asked: the very condition, where it was given one and nothing else."""
    if len(sets) == 1 and given is None and within is None and normalized is True:
        (only,) = sets
        if isinstance(only, Condition):
            return only
    return Condition(*sets, given=given, within=within, normalized=normalized)


def listed(sets: Sets | Sequence[Sets]) -> Sequence[Sets]:
    """One set, formula, layer or condition as a list of one."""
    return [sets] if isinstance(sets, (str, Formula, Condition)) else sets


@contextmanager
def naming(asked: Callable[[], str]) -> Iterator[None]:
    """Add what was asked to errors that this raises: their types and messages stay as they are."""
    try:
        yield
    except NrmError as error:
        text = asked()
        if text and not getattr(error, "__notes__", None):
            error.add_note(f"in R({text})")
        raise


_LONGEST_PART = 200


def _text(
    sets: Sequence[object],
    given: object,
    within: object,
    normalized: object = True,
    layers: Sequence[str] = (),
) -> str:
    """The arguments as they were given, long ones cut short."""
    parts = [_short(one) for one in sets]
    if isinstance(given, tuple) and len(given) == 1:
        (given,) = given
    if isinstance(given, (list, tuple)):
        parts += [f"given=[{', '.join(map(_short, given))}]"] if given else []
    elif given is not None:
        parts.append(f"given={_short(given)}")
    if within is not None:
        parts.append(f"within={_short(within)}")
    if normalized is not True:
        parts.append(f"normalized={normalized!r}")
    if layers:
        parts.append(f"weights of {', '.join(map(repr, layers))}")
    return ", ".join(parts)


def _short(one: object) -> str:
    text = repr(one)
    return text if len(text) <= _LONGEST_PART else text[: _LONGEST_PART - 1] + "…"


def only_formulas(given: Given) -> list[Formula]:
    """What is given, one by one."""
    if given is None:
        return []
    found: list[Formula] = []
    for one in given if isinstance(given, (list, tuple)) else (given,):
        if not isinstance(one, Condition):
            found.append(as_formula(one))  # type: ignore[arg-type] # refuses others by name
        elif one.given or not one.counts_all:
            raise QueryError(f"only sets and formulas can be taken here, not {one!r}.")
        else:
            found += one.sets
    return found


def alone(one: Sets) -> Formula | bool:
    """A formula, or what a condition says that says nothing but which sets hold."""
    return _all_of(only_formulas([one]))


def _all_of(formulas: Sequence[Formula]) -> Formula | bool:
    parts = conjunction(formulas)
    return All(parts) if parts else True


def _checked(weights: Weights | None) -> list[_Weight]:
    """Copies of weights, so that their owner may go on to change them."""
    found = []
    if weights is not None and not weights:
        raise QueryError("there are no weights: name at least one layer.")
    for layer, values in (weights or {}).items():
        if isinstance(values, Tensor):
            check_dense(values, f"the tensor of weights of {layer!r}", QueryError)
        if (
            not isinstance(values, Tensor)
            or values.is_complex()
            or not bool(torch.isfinite(values).all())
        ):
            raise QueryError(
                f"the weights of {layer!r} are to be a tensor of real, finite numbers."
            )
        found.append(_Weight(layer, values.detach().clone()))
    return found
