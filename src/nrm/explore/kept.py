"""The explorer as one HTML file that needs no server: its answers are worked out before.

It holds what every single click gives: for each input and the target that is explained of it, the
view without a selection, and that of every channel shown, jointly and given. More than that (other
columns, formulas of several parts, patches) needs `nrm explore`, and the page says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nrm.explore.answers import Columns, Request
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
<script type="application/json" id="kept">{kept}</script>
<script>
{vendored}</script>
<script type="module">
{modules}</script>
</body>
</html>
"""


def keep(opened: Opened, file: Path, top: int = 12, say: Say = lambda text: None) -> int:
    """Write the file; how many answers it holds.

    Arguments:
        top: parts of a column to show, each of which can be clicked.
    """
    session = Sessions(opened).new()
    facts = described(opened, session) | {"sends": False, "top": top}
    answers: dict[str, list[dict[str, Any]]] = {}
    for number, one in enumerate(session.inputs()):
        say(f"{one.name}: what every click gives")
        for request, parts in _answers(session, number, facts["first"], top):
            answers[_key(number, request)] = parts
    text = _PAGE.format(
        title=_escaped(f"nrm explore: {opened.name}"),
        style=style(),
        kept=_in_a_script(json.dumps({"opened": facts, "answers": answers})),
        vendored=vendored(),
        modules=modules("kept.js"),
    )
    write_text(file, text)
    return len(answers)


def _answers(
    session: Session, number: int, columns: list[str], top: int
) -> Iterator[tuple[Request, list[dict[str, Any]]]]:
    """Requests of one input, and the parts of their answers."""

    def asked(selection: Any, mode: Any = "joint") -> tuple[Request, list[dict[str, Any]]]:
        request = Request(None, None, columns, selection, mode, top)
        found = list(session.answer(number, request, session.turn()))
        shown.extend(part for part in found if isinstance(part, Columns))
        return request, [asdict(part) for part in found]

    shown: list[Columns] = []
    yield asked(None)
    for column in shown[0].columns:
        for node in column.nodes:
            part = {"layer": column.layer, "channels": [node.index], "axis": column.axis}
            part |= {"by": column.by, "of": column.of}
            for mode in ("joint", "given"):
                yield asked({"op": "and", "parts": [part]}, mode)


def _key(number: int, request: Request) -> str:
    """What an answer is found by: the input, the mode where it matters, and the selection."""
    if request.selection is None:
        return f"{number}"
    (part,) = request.selection["parts"]
    return f"{number} {request.mode} {part['layer']} {part['channels'][0]}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _in_a_script(text: str) -> str:
    """JSON that ends no script element, whatever names are in it."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
