"""What an experiment found, as a page, pictures and JSON: own figures beside the paper's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nrm.experiments import page
from nrm.experiments.tables import HEADS, Row, Table, cells, correlations, interval, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "HEADS",
    "PAGE",
    "RESULT",
    "Picture",
    "Report",
    "Row",
    "Table",
    "cells",
    "interval",
    "shown",
]

PAGE, RESULT = "report.html", "result.json"


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
        """The page, which holds its pictures, the pictures beside it, the JSON, and the parts."""
        from nrm import plot

        for part in self.parts:
            own = folder / part.experiment
            own.mkdir()
            part.write(own)
        for picture in self.pictures:
            plot.save(picture.figure, folder / picture.file)
        (folder / PAGE).write_text(self._page(folder), encoding="utf-8")
        (folder / RESULT).write_text(self.as_json(), encoding="utf-8")

    def _page(self, folder: Path) -> str:
        return page.page(
            self.title,
            page.facts({name: shown(value) for name, value in self.facts.items()}),
            page.links({f"{part.experiment}/{PAGE}": part.title for part in self.parts}),
            *(page.table(table) for table in self.all_tables()),
            *(page.paragraph(note) for note in self.notes),
            *(
                page.picture(picture.title, picture.caption, folder / picture.file)
                for picture in self.pictures
            ),
        )
