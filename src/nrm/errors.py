"""Everything that nrm refuses, by name. Each message says what was wrong, where, and what to do."""

from __future__ import annotations

import contextlib
import difflib
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class NrmError(Exception):
    """Base of every error that nrm raises on purpose."""


class CaptureError(NrmError):
    """The model could not be turned into a graph that reproduces its outputs."""


class UnsupportedOperatorError(NrmError):
    """An operator on the way from the inputs to the output has no row in the operator table."""


class InputError(NrmError, ValueError):
    """An input has the wrong shape, dtype or device, or holds NaN or infinite values."""


class TargetError(NrmError, ValueError):
    """The explained output does not exist, or its relevance cannot be normalised."""


class UnknownLayerError(NrmError, KeyError):
    """No variable of the graph bears this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(name, tuple(known))  # what it is made of, in other processes too

    def __str__(self) -> str:
        name, known = self.args
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.3)
        hint = f" Nearest names: {', '.join(near)}." if near else ""
        return (
            f"no layer is called {name!r}.{hint} "
            "`Explainer.layers(...)` or `nrm layers` lists every addressable variable."
        )


class NeuronSetError(NrmError, ValueError):
    """A neuron set is empty, out of range or of the wrong shape."""


class QueryError(NrmError, ValueError):
    """A query that the measure does not answer, or cannot answer on this graph."""


class StorageError(NrmError, OSError):
    """Results cannot be kept: the disk is full, a folder cannot be written, another run has it."""


class RelevanceWarning(UserWarning):
    """A result is exact and yet says little: it cancels, its output is zero, or columns vanished.

    `warnings.simplefilter("ignore", nrm.RelevanceWarning)` silences all of them.
    """


class PositiveSumError(NrmError, ArithmeticError):
    """`strict`: relevance met a column that violates a positive-sum condition (eqs. 15, 16)."""


# -- What a person has to know of a number without asking for it: one warning for each forward pass.
# Totals stay exact whatever a network does, so nothing in a result shows that it is made of large
# relevances that cancel, of a division by almost nothing, or of relevance that had no parent to go
# to. Each is said once, with the place and what to do. `R.diagnostics()` has the figures.

VARIATION = 1e3
"""Absolute relevances that add up to more than this, where the total is one, are warned of."""

VANISHED = 1e-2
"""Relevance above this that met neurons without any contribution is warned of."""

_PACKAGE = str(Path(__file__).parent)
_PASSED = (_PACKAGE, str(contextlib.__file__))
"""Where no line is that asked: functions of the package, and what decorates them."""
_SILENCE = "Silence it with warnings.simplefilter('ignore', nrm.RelevanceWarning)."


CANCELS = "cancels"
"""The kind of warning that relevances of a result cancel."""


class Cautions:
    """The warnings that one forward pass gave; each kind is given once.

    Attributes:
        said: the kinds that were given.
    """

    def __init__(self) -> None:
        self.said: set[str] = set()
        self._heard: dict[str, str] | None = None

    @contextmanager
    def anew(self, known: Collection[str] = ()) -> Iterator[dict[str, str]]:
        """Note, instead of warning, all that there is to be warned of in this context, whether or
        not it was said before.

        Arguments:
            known: kinds that need not be noted.

        Returns:
            the texts by kind, complete once the context ends.
        """
        before, outside = self.said, self._heard
        heard: dict[str, str] = {}
        self.said, self._heard = set(known), heard
        try:
            yield heard
        finally:
            self.said, self._heard = self.said | before, outside

    def vanished(self, address: str, relevance: float) -> None:
        """Relevance was split evenly, for want of any contribution, at an operation."""
        if relevance > VANISHED:
            self._say(
                "vanished",
                f"relevance of absolute size {relevance:.2g} (of all samples together) met "
                f"neurons of {address!r} whose contributions all vanish: it was split evenly over "
                "their parents, or ended in a leaf. Where a bias alone made them active, biases "
                "as inputs (bias='input') take it; where a rule leaves contributions out, as "
                "rules.ZPlus() does, another such as rules.Gamma(0.25) counts them.",
            )

    def cancels(self, name: str, variation: float, place: str) -> None:
        """Relevances of a result cancel.

        Arguments:
            name: where it was asked for.
            variation: the sum of absolute relevances.
            place: where it grew most, in words.
        """
        self._say(
            CANCELS,
            f"relevances at {name!r} cancel: their absolute sizes add up to {variation:.2g}, the "
            f"relevance of all walks is 1{place}. Single values say little then. Rules that "
            "bound it: composites.GammaFlat(), or rules.Gamma(0.25) at that place; biases as "
            "inputs (bias='input') under LRP-0.",
        )

    def output_vanishes(self, value: float, size: float, sample: str) -> None:
        """The explained output is nothing but rounding."""
        self._say(
            "output",
            f"the explained output{sample} is {value:.2g}, which is within rounding of zero: it "
            f"adds up terms of absolute size {size:.2g}. Shares of it mean little, and R.scale "
            "turns them into next to nothing. Explain another target, or a difference of outputs "
            "(output_relevance=).",
        )

    def negative(self, what: str, value: float, sample: str) -> None:
        """A combination of outputs is negative, so that shares of it point the other way."""
        self._say(
            "negative",
            f"what is explained, {what}, is {value:.3g}{sample}: it is negative, so that a "
            "positive share makes it more so. Times R.scale, relevance has its own sign.",
        )

    def _say(self, kind: str, text: str) -> None:
        if kind in self.said:
            return
        self.said.add(kind)
        if self._heard is not None:
            self._heard[kind] = text
            return
        warnings.warn(f"{text} {_SILENCE}", RelevanceWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The `stacklevel` of `_say`'s warning that points to the first frame outside the package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED):
        frame, level = frame.f_back, level + 1
    return level


# -- texts of messages ----------------------------------------------------------------------------


def printable(text: str) -> str:
    """A text without what a terminal would obey instead of showing it."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many there are besides."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Of an exception's message; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
