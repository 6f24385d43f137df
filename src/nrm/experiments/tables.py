"""Tables of a report: that of correlations, and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Value = str | int | float | None


@dataclass(frozen=True)
class Row:
    """One figure of a table: the mean correlation of a method over samples.

    Attributes:
        pearson: relevance with joint contribution; `None` where it is not defined.
        ci_low, ci_high: its bootstrap interval over samples.
        paper: what the paper reports; `None` where it reports nothing.
        samples: over how many.
    """

    experiment: str
    layers: tuple[str, ...]
    method: str
    pearson: float | None
    ci_low: float | None
    ci_high: float | None
    paper: float | None
    samples: int


@dataclass(frozen=True)
class Table:
    """A table of anything.

    Attributes:
        heads: of its columns.
        lines: a value for each column; numbers keep all their digits until they are shown.
        group: how many columns at the left say what a line belongs to. Where they are those of
            the line before, they are not said again.
        note: how it is to be read.
    """

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[Value]]
    group: int = 1
    note: str = ""

    def texts(self) -> list[tuple[tuple[str, ...], bool]]:
        """The lines as text, and whether each begins a group."""
        found: list[tuple[tuple[str, ...], bool]] = []
        before: tuple[str, ...] | None = None
        for line in self.lines:
            texts = tuple(brief(value) for value in line)
            group = texts[: self.group]
            begins = not self.group or group != before
            found.append((texts if begins else ("",) * self.group + texts[self.group :], begins))
            before = group
        return found


def shown(value: Value) -> str:
    """A number with three digits after the point; nothing is a dash."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def brief(value: Value) -> str:
    """A number with three digits, whatever its size; nothing is a dash."""
    if not isinstance(value, float):
        return shown(value)
    if 999.5 <= abs(value) < 99_999.5:
        return f"{value:.0f}"
    digits, _, power = f"{value + 0.0:#.3g}".partition("e")  # not -0.00
    digits = digits.rstrip(".")
    return f"{digits}e{int(power)}" if power else digits


def interval(row: Row) -> str:
    """A row's interval in brackets."""
    if row.ci_low is None or row.ci_high is None:
        return shown(None)
    return f"[{row.ci_low:.3f}, {row.ci_high:.3f}]"


HEADS = ("layers", "method", "Pearson", "95 % interval", "paper", "samples")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, under `HEADS`."""
    return (
        ", ".join(row.layers),
        row.method,
        shown(row.pearson),
        interval(row),
        shown(row.paper),
        str(row.samples),
    )


def correlations(title: str, rows: Sequence[Row]) -> Table:
    """The table of rows; it says of which experiment they are where there are several."""
    if len({row.experiment for row in rows}) < 2:
        return Table(title, HEADS, [cells(row) for row in rows])
    lines = [(row.experiment, *cells(row)) for row in rows]
    return Table(title, ("experiment", *HEADS), lines, group=2)
