"""What an experiment is asked, and what it answers: a page, its pictures, tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

import nrm
from nrm import display, plot
from nrm.pages import Section, page

PAGE, RESULT = "report.html", "result.json"
HEADS = ("layers", "method", "Pearson", "95 % interval", "paper", "samples")
"""Of a table of correlations."""

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
}
"""Of the figures, for `matplotlib.rc_context`."""
GREY = "0.35"
"""Of lines and texts that stand back."""

Value = str | int | float | None


# -- the question ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """How an experiment is to be run.

    Attributes:
        data: what the command line names: a folder, or a word that the experiment knows.
        kept: a folder for what an interrupted run leaves and the next goes on from.
        samples: how many to report on; by default as many as the experiment thinks fit.
        layers: pairs of layers, for experiments that compare layers; by default their own.
        weights: a file of weights, for experiments that explain a pretrained network.
        seed: of all that is drawn at random.
        model: a folder with a language model, for experiments that explain one.
        device: where that one runs, and the networks of `networks` and `bounds`.
        only: which networks, for experiments on several; by default all.
        part: which of how many equal parts of the work is to be done, for experiments whose work
            several processes may share; by default all.
        progress: whether to show bars.
        say: told what happens, a line at a time.
    """

    data: str
    kept: Path
    samples: int | None = None
    layers: tuple[tuple[str, ...], ...] = ()
    weights: Path | None = None
    seed: int = 0
    model: Path | None = None
    device: str = "cpu"
    only: tuple[str, ...] = ()
    part: tuple[int, int] | None = None
    progress: bool = False
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments.

    Attributes:
        name: by which it is run.
        run: runs it, from where an interrupted run stopped.
        options: which of a request's `layers`, `weights`, `model`, `device`, `only` and
            `part` it heeds.
    """

    name: str
    run: Callable[[Request], Report]
    options: frozenset[str] = frozenset()


def versions() -> str:
    """Of nrm and torch, as a fact of a report."""
    return f"nrm {nrm.__version__}, torch {torch.__version__}"


# -- tables ---------------------------------------------------------------------------------------


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

    def shown(self) -> display.Table:
        """The lines as text, without a title; a group is said once."""
        found: list[tuple[str, ...]] = []
        before: tuple[str, ...] | None = None
        for line in self.lines:
            texts = tuple(brief(value) for value in line)
            group = texts[: self.group]
            repeats = bool(group) and group == before
            found.append(("",) * self.group + texts[self.group :] if repeats else texts)
            before = group
        return display.Table("", tuple(self.heads), found, [self.note] if self.note else [])


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


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, under `HEADS`."""
    known = row.ci_low is not None and row.ci_high is not None
    return (
        ", ".join(row.layers),
        row.method,
        shown(row.pearson),
        f"[{row.ci_low:.3f}, {row.ci_high:.3f}]" if known else shown(None),
        shown(row.paper),
        str(row.samples),
    )


def correlations(title: str, rows: Sequence[Row]) -> Table:
    """The table of rows; it says of which experiment they are where there are several."""
    if len({row.experiment for row in rows}) < 2:
        return Table(title, HEADS, [cells(row) for row in rows])
    lines = [(row.experiment, *cells(row)) for row in rows]
    return Table(title, ("experiment", *HEADS), lines, group=2)


# -- the answer -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure and what it shows."""

    file: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True, eq=False)
class Report:
    """All that an experiment found.

    Attributes:
        rows: correlations, the own beside the paper's.
        facts: of the run, in a line each: network, accuracy, seed.
        notes: how the rows are to be read.
        details: whatever else belongs into the JSON, such as curves and single samples.
        heading: of the table of rows.
        tables: what is no correlation.
        files: texts to write beside the page, by their names.
        parts: reports that this one is about, each written into a folder of its name.
        failures: what could not be run, and why.
    """

    experiment: str
    title: str
    rows: Sequence[Row]
    pictures: Sequence[Picture] = ()
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    heading: str = "Correlation of relevance with joint contribution"
    tables: Sequence[Table] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[Report] = ()
    failures: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """Facts, rows, tables and details; of parts their rows only, which are among the rows."""
        found = {
            "experiment": self.experiment,
            "facts": dict(self.facts),
            "rows": [asdict(row) for row in self.rows],
            "tables": [
                {"title": table.title, "heads": table.heads, "lines": table.lines}
                for table in self.tables
            ],
            "failures": dict(self.failures),
            "details": dict(self.details),
        }
        return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def all_tables(self) -> list[Table]:
        """That of the rows, if there are any, and the others."""
        rows = [correlations(self.heading, self.rows)] if self.rows else []
        return [*rows, *self.tables]

    def write(self, folder: Path) -> None:
        """The page, which holds its pictures, the pictures and files beside it, JSON, the parts."""
        for part in self.parts:
            own = folder / part.experiment
            own.mkdir()
            part.write(own)
        with matplotlib.rc_context(STYLE):  # ticks come into being when they are drawn
            for picture in self.pictures:
                plot.save(picture.figure, folder / picture.file)
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / PAGE).write_text(self._page(folder), encoding="utf-8")
        (folder / RESULT).write_text(self.as_json(), encoding="utf-8")

    def _page(self, folder: Path) -> str:
        facts = [(name, shown(value)) for name, value in self.facts.items()]
        tables = [Section(table.title, tables=[table.shown()]) for table in self.all_tables()]
        pictures = [
            Section(one.title, (folder / one.file).read_bytes(), texts=[one.caption])
            for one in self.pictures
        ]
        return page(
            self.title,
            display.Table("", (), facts),
            [*tables, Section("", texts=self.notes), *pictures],
            {f"{part.experiment}/{PAGE}": part.title for part in self.parts},
        )
