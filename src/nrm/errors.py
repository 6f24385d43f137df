"""Everything that nrm refuses, by name. Each message says what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class RelevanceWarning(UserWarning):
    """A result is exact and yet says little: it cancels, its output is zero, or columns vanished.

    `warnings.simplefilter("ignore", nrm.RelevanceWarning)` silences all of them.
    """


class PositiveSumError(NrmError, ArithmeticError):
    """`strict`: relevance met a column that violates a positive-sum condition (eqs. 15, 16)."""
