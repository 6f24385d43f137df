"""A progress bar of rich for long queries, where one is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nrm.errors import QueryError


@contextmanager
def counted(
    progress: bool | Callable[[int], None], what: str, total: int
) -> Iterator[Callable[[int], None]]:
    """A function to call with how many of `total` things have just been done.

    Arguments:
        progress: whether to show a bar, or what to call instead.
    """
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done: None
    else:
        bars = _bars()
        with bars:
            task = bars.add_task(what, total=total)
            yield lambda done: bars.advance(task, done)


@contextmanager
def narrowed(
    progress: bool | Callable[[float], None], what: str
) -> Iterator[Callable[[float], None]]:
    """A function to call with the gap that a search has left to close.

    Arguments:
        progress: whether to show it, or what to call instead.
    """
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda gap: None
    else:
        bars = _bars()
        with bars:
            task = bars.add_task(what, total=None)

            def advance(gap: float) -> None:
                left = "" if math.isinf(gap) else f", gap {gap:.2g}"
                bars.update(task, advance=1, description=what + left)

            yield advance


def _bars() -> Any:
    """On stderr, gone when it is full."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        raise QueryError(
            "progress bars need rich: pip install 'nrm[cli]', or give a function to call."
        ) from None
    return Progress(console=Console(stderr=True), transient=True)
