"""What a person sees: a result as a table (text, notebook, rich), and how far long work is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from nrm.errors import QueryError

ROWS = 10
"""Rows that a `repr` shows; `print` shows all."""

ROWS_OF_A_PAGE = 60
"""Rows that a notebook shows."""

Progress = bool | Callable[[int], None]
"""Whether to show a progress bar; or what to call instead, with how many were just done."""


@dataclass(frozen=True)
class Table:
    """Rows of text below heads.

    Attributes:
        title: what it is of, in one line.
        heads: of the columns; none for a table whose first column says what the second is.
        rows: of as many cells each as there are columns.
        notes: sentences below.
    """

    title: str
    heads: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    notes: Sequence[str] = ()

    def text(self, most: int | None = None) -> str:
        """Lines with aligned columns.

        Arguments:
            most: of the rows, how many to show; by default all.
        """
        rows, left = self._cut(most)
        lines = [self.heads, *rows] if self.heads else list(rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*([self.title] if self.title else []), *aligned, *left, *self.notes])

    def html(self, most: int | None = ROWS_OF_A_PAGE) -> str:
        """The same for a page; nothing in it is read as markup."""
        rows, left = self._cut(most)
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.heads)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
        )
        title = f"<p><b>{escape(self.title)}</b></p>" if self.title else ""
        table = f"<thead><tr>{head}</tr></thead>" if head else ""
        table = f'<table style="text-align: left">{table}<tbody>{body}</tbody></table>'
        notes = "".join(f"<p>{escape(note)}</p>" for note in (*left, *self.notes))
        return f"<div>{title}{table if rows or head else ''}{notes}</div>"

    def rich(self) -> Any:
        """The same for a rich console."""
        from rich.console import Group
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(box=None, pad_edge=False, show_header=bool(self.heads))
        for head in self.heads or (self.rows[0] if self.rows else ()):
            drawn.add_column(Text(head), overflow="fold")
        for row in self.rows:
            drawn.add_row(*(Text(cell) for cell in row))  # as it is: names may hold brackets
        title = [Text(self.title, style="bold")] if self.title else []
        return Group(*title, drawn, *(Text(note) for note in self.notes))

    def _cut(self, most: int | None) -> tuple[Sequence[tuple[str, ...]], list[str]]:
        """The first and last rows, and what is said of those between."""
        if most is None or len(self.rows) <= most:
            return self.rows, []
        first = (most + 1) // 2
        blank = ("…", *("" for _ in self.rows[0][1:]))
        rows = [*self.rows[:first], blank, *self.rows[len(self.rows) - (most - first) :]]
        return rows, [f"({len(self.rows) - most} rows are not shown: print it)"]


class Shown(ABC):
    """What is shown as a table: by `print` all of it, at a prompt and in a notebook the ends."""

    @abstractmethod
    def table(self) -> Table:
        """What there is to see."""

    def __str__(self) -> str:
        return self.table().text()

    def __repr__(self) -> str:
        return self.table().text(ROWS)

    def _repr_html_(self) -> str:
        return self.table().html()

    def __rich__(self) -> Any:
        return self.table().rich()


def sizes(shape: Sequence[int | None]) -> str:
    """A shape to read: `3 x 224 x 224`, with `?` for what is not known; `1` for a single neuron."""
    return " x ".join("?" if size is None else str(size) for size in shape) or "1"


def numbers(values: Sequence[float], most: int = 4) -> str:
    """Some numbers to read, one for each sample."""
    shown = ", ".join(f"{value:.4g}" for value in values[:most])
    return shown if len(values) <= most else f"{shown}, … ({len(values)} samples)"


# -- progress --------------------------------------------------------------------------------------


@contextmanager
def counted(
    progress: Progress,
    what: str,
    total: int | None,
    rate: str | None = None,
) -> Iterator[Callable[[int], None]]:
    """A function to call with how many of `total` things have just been done.

    Arguments:
        progress: whether to show a bar, or what to call instead.
        total: `None` where it is not known.
        rate: the unit of how many are done in a second, to show that too.
    """
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done: None
    else:
        bars = _bars(rate)
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


def _bars(rate: str | None = None) -> Any:
    """On stderr, gone when it is full."""
    try:
        from rich import progress
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError:
        raise QueryError(
            "progress bars need rich: pip install 'nrm[cli]', or give a function to call."
        ) from None

    class Rate(progress.ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.4g} {rate}")

    columns = [*progress.Progress.get_default_columns(), *([Rate()] if rate else [])]
    return progress.Progress(*columns, console=Console(stderr=True), transient=True)
