"""What is compared, and the tables it makes in docs/methods.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: its name.
        call: in `nrm.methods`.
        query: what that asks of the measure.
        other: what it is compared with.
        deviation: the largest difference over the largest value.
    """

    method: str
    call: str
    query: str
    other: str
    deviation: float


@dataclass(frozen=True)
class Beside:
    """One question about a concept in a branch beside a skip connection, answered by both.

    Attributes:
        add: how the network adds the two.
        ours: the call here.
        theirs: zennit-crp's.
        heatmap, other_heatmap: what each returns, in units of the logit.
    """

    add: str
    question: str
    ours: str
    heatmap: list[float]
    theirs: str
    other_heatmap: list[float]


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value.

    Raises:
        ValueError: the shapes differ, or all values are zero.
    """
    largest = float(expected.abs().max())
    if found.shape != expected.shape or largest == 0:
        raise ValueError(f"{tuple(found.shape)} against {tuple(expected.shape)}, at most {largest}")
    return float((found - expected).abs().max()) / largest


def methods_table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| method | call | query | compared with | deviation |", "|---|---|---|---|---|"]
    for r in rows:
        call, query = (f"`{text}`".replace("|", "\\|") for text in (r.call, r.query))
        lines.append(f"| {r.method} | {call} | {query} | {r.other} | {_short(r.deviation)} |")
    return "\n".join(lines)


def residual_table(rows: Sequence[Beside]) -> str:
    """In Markdown."""
    lines = [
        "| the sum is | relevance of | call | heatmap | zennit-crp | heatmap |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        ours, theirs = _numbers(r.heatmap), _numbers(r.other_heatmap)
        lines.append(f"| {r.add} | {r.question} | `{r.ours}` | {ours} | {r.theirs} | {theirs} |")
    return "\n".join(lines)


def put(page: str, name: str, table: str) -> str:
    """The page with a table in its place.

    Raises:
        ValueError: the page has no such place.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no place between {begin} and {end}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def _short(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.3g}' for value in values)})"
