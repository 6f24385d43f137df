"""What an experiment found, as a page, pictures and JSON: own figures beside the paper's."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, RESULT = "report.html", "result.json"


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
        facts: of the run, in a line each: network, accuracy, seed.
        notes: how the rows are to be read.
        details: whatever else belongs into the JSON, such as curves and single samples.
    """

    experiment: str
    title: str
    rows: Sequence[Row]
    pictures: Sequence[Picture] = ()
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        """Facts, rows and details."""
        found = {
            "experiment": self.experiment,
            "facts": dict(self.facts),
            "rows": [asdict(row) for row in self.rows],
            "details": dict(self.details),
        }
        return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, folder: Path) -> None:
        """The page, which holds its pictures, the pictures beside it, and the JSON."""
        from nrm import plot

        for picture in self.pictures:
            plot.save(picture.figure, folder / picture.file)
        (folder / PAGE).write_text(self._page(folder), encoding="utf-8")
        (folder / RESULT).write_text(self.as_json(), encoding="utf-8")

    def _page(self, folder: Path) -> str:
        facts = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(shown(value))}</td></tr>"
            for name, value in self.facts.items()
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        pictures = "".join(_figure(folder, picture) for picture in self.pictures)
        return _PAGE.format(
            title=escape(self.title),
            facts=facts,
            table=_table(self.rows),
            notes=notes,
            pictures=pictures,
        )


def shown(value: str | float | None) -> str:
    """A number with three digits after the point; nothing is a dash."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


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


def _table(rows: Sequence[Row]) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in HEADS)
    lines: list[str] = []
    before: tuple[str, ...] | None = None
    for row in rows:
        begins = ' class="begins"' if row.layers != before else ""
        before = row.layers
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells(row))
        lines.append(f"<tr{begins}>{line}</tr>")
    return f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"


def _figure(folder: Path, picture: Picture) -> str:
    data = base64.b64encode((folder / picture.file).read_bytes()).decode("ascii")
    return (
        f"<figure><h2>{escape(picture.title)}</h2>"
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .2rem .9rem .2rem 0; text-align: left; font-weight: normal; }}
thead th {{ border-bottom: 1px solid #222; font-weight: 600; }}
tr.begins td {{ border-top: 1px solid #bbb; }}
.facts th {{ color: #666; }}
figure {{ margin: 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption, p {{ color: #444; max-width: 48rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table class="facts">{facts}</table>
<h2>Correlation of relevance with joint contribution</h2>
<div class="wide"><table>{table}</table></div>
{notes}
{pictures}
</body>
</html>
"""
