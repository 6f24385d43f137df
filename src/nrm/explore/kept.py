"""The explorer as one HTML file that needs no server: its answers are worked out before.

It holds what single clicks give: for each input and the target that is explained of it, the view
without a selection, and that of every channel shown, of every place of a text, a series or a graph,
of the parts of a picture in a coarse grid, and of the most relevant flows of that view. What is
given a selection is what is jointly with it, divided by one number, which the page does. More than
that (other columns, other formulas, any patch) needs `nrm explore`, and the page says so.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nrm.explore.answers import Columns, Flows, Part, Request, Shown
from nrm.explore.bundle import modules, style, vendored
from nrm.explore.described import described
from nrm.explore.opened import Opened
from nrm.explore.session import Session, Sessions
from nrm.io import Say, write_text

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:; \
script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ margin: 0; }}
{style}</style>
</head>
<body>
<div id="explorer"></div>
<script type="application/octet-stream" id="kept">{kept}</script>
<script>
{vendored}</script>
<script type="module">
{modules}</script>
</body>
</html>
"""


CELLS = 4
"""Parts of a picture along each of its sides."""
SMALL, FEW = 64 * 64, 12
"""Of pictures of more pixels fewer flows can be clicked: so many between two columns."""


def keep(opened: Opened, file: Path, top: int = 12, say: Say = lambda text: None) -> int:
    """Write the file; how many answers it holds.

    Arguments:
        top: parts of a column to show, each of which can be clicked.
    """
    session = Sessions(opened).new()
    facts = described(opened, session) | {"sends": False, "top": top}
    cells = []
    answers: dict[str, list[dict[str, Any]]] = {}
    for number, one in enumerate(session.inputs()):
        say(f"{one.name}: what every click gives")
        clicks = _Clicks(session, number, facts["first"], top)
        answers |= clicks.answers()
        cells.append(clicks.cells)
    facts["cells"] = cells if opened.kind == "picture" else None
    packed = gzip.compress(json.dumps({"opened": facts, "answers": answers}).encode(), mtime=0)
    text = _PAGE.format(
        title=_escaped(f"nrm explore: {opened.name}"),
        style=style(),
        kept=base64.b64encode(packed).decode(),
        vendored=vendored(),
        modules=modules("kept.js"),
    )
    write_text(file, text)
    return len(answers)


@dataclass
class _Clicks:
    """What can be clicked of one input, and what it gives.

    Attributes:
        cells: where the parts of a picture begin and end, along each of its axes.
    """

    session: Session
    number: int
    columns: list[str]
    top: int
    cells: Sequence[list[int]] = ()

    def answers(self) -> dict[str, list[dict[str, Any]]]:
        """The parts of each answer, by what it is found by."""
        first = self._asked([])
        found = {_key(self.number, []): first}
        for parts in self._selections(first):
            key = _key(self.number, parts)
            if key not in found:
                found[key] = self._asked(parts)
        return {key: [asdict(part) for part in answer] for key, answer in found.items()}

    def _asked(self, parts: list[dict[str, Any]]) -> list[Part]:
        selection = {"op": "and", "parts": parts} if parts else None
        request = Request(None, None, self.columns, selection, "joint", self.top)
        return list(self.session.answer(self.number, request, self.session.turn()))

    def _selections(self, first: Sequence[Part]) -> Iterator[list[dict[str, Any]]]:
        """The selections that clicks on the first view make."""
        (columns,) = (part for part in first if isinstance(part, Columns))
        heatmap, of = columns.heatmap, {column.layer: column for column in columns.columns}
        for column in columns.columns:
            yield from ([_part_of(column, node.index)] for node in column.nodes)
        if len(heatmap.shape) == 2:
            self.cells = [_cells(size) for size in heatmap.shape]
            for rows, places in itertools.product(*map(itertools.pairwise, self.cells)):
                yield [{"layer": heatmap.layer, "patch": [*rows, *places]}]
        else:
            place = {"layer": heatmap.layer, "axis": self.session.axis}
            yield from ([place | {"channels": [k]}] for k in range(heatmap.shape[0]))
        large = math.prod(heatmap.shape) > SMALL
        for flows in (part for part in first if isinstance(part, Flows)):
            for i, j, _ in flows.links[: FEW if large else None]:
                yield [_part_of(of[flows.lower], i), _part_of(of[flows.upper], j)]


def _cells(size: int) -> list[int]:
    """Where the parts of a side begin, and where the last one ends."""
    count = min(CELLS, size)
    return [round(k * size / count) for k in range(count + 1)]


def _part_of(column: Shown, index: int) -> dict[str, Any]:
    """One part of a column, as the page asks for it."""
    part = {"layer": column.layer, "channels": [index], "axis": column.axis}
    if column.by in ("channels", "places"):
        return part
    return part | {"by": column.by, "of": column.of}


def _key(number: int, parts: Sequence[dict[str, Any]]) -> str:
    """What an answer is found by: the input and the selection."""
    if not parts:
        return f"{number}"
    written = (
        [part["layer"], part["patch"]]
        if "patch" in part
        else [part["layer"], part["axis"], part.get("by"), part.get("of"), part["channels"]]
        for part in parts
    )
    texts = (json.dumps(one, separators=(",", ":"), ensure_ascii=False) for one in written)
    return " ".join([str(number), *sorted(texts)])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
