"""Words coloured by their relevance: as a page (HTML), on a terminal (rich), as a picture (plot).

Orange is a positive value, blue a negative one; the stronger the colour the more. These two are
told apart by the colour-blind. All lines share one scale, so give values in one unit: relevance
times the explained logit (`R.scale`), of which orange is what raises the logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from nrm.errors import printable
from nrm.pages import document

FOR, AGAINST = (230, 97, 1), (33, 102, 172)
"""Red, green and blue of the largest value there is, and of the least."""

_DARK = 110  # mean brightness of what white letters are read better on
_STYLE = "font-family: monospace; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere"


@dataclass(frozen=True)
class Line:
    """A text whose words are coloured.

    Attributes:
        title: what stands before it.
        words: as they are written, with their blanks.
        values: of each.
        mark: which of the words is explained, if one of them is; it is drawn in a frame.
    """

    title: str
    words: Sequence[str]
    values: Sequence[float]
    mark: int | None = None


def limit_of(lines: Sequence[Line]) -> float:
    """Where the scale ends: at the largest size of all values; one where all are zero."""
    return max((abs(value) for line in lines for value in line.values), default=0.0) or 1.0


def colour(value: float, limit: float) -> tuple[int, int, int]:
    """Red, green and blue from 0 to 255: white for zero, the whole colour from the limit on."""
    part = min(1.0, abs(value) / limit)
    end = FOR if value > 0 else AGAINST
    red, green, blue = (round(255 + part * (channel - 255)) for channel in end)
    return red, green, blue


def letters_on(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """The colour of letters that are read on a background: black or white."""
    return (255, 255, 255) if sum(background) / 3 < _DARK else (0, 0, 0)


def shown(word: str) -> str:
    """A word as it is drawn: ends of lines and tabs are seen, and what a terminal obeys is not."""
    return printable(word.replace("\n", "⏎").replace("\t", "⇥"))


# -- a page ----------------------------------------------------------------------------------------


def html(lines: Sequence[Line], title: str = "", notes: Sequence[str] = ()) -> str:
    """A part of a page; nothing in it is read as markup. The value of a word shows where the
    pointer rests on it."""
    limit = limit_of(lines)
    head = f"<p><b>{escape(title)}</b></p>" if title else ""
    body = "".join(
        f'<tr><td style="white-space: nowrap; vertical-align: top; padding-right: 1em">'
        f"{escape(shown(line.title))}</td><td>{_spans(line, limit)}</td></tr>"
        for line in lines
    )
    table = f'<table style="text-align: left; border-spacing: 0 6px; {_STYLE}">{body}</table>'
    return f"<div>{head}{table}{''.join(f'<p>{escape(note)}</p>' for note in notes)}</div>"


def page(lines: Sequence[Line], title: str, notes: Sequence[str] = ()) -> str:
    """A whole page, of one file."""
    style = "body { background: white; color: black; font-family: sans-serif; margin: 2em; }"
    return document(title, html(lines, title, notes), style)


def _spans(line: Line, limit: float) -> str:
    return "".join(
        f'<span title="{value:+.4f}" style="{_style(value, limit, place == line.mark)}">'
        f"{escape(shown(word))}</span>"
        for place, (word, value) in enumerate(zip(line.words, line.values, strict=True))
    )


def _style(value: float, limit: float, marked: bool) -> str:
    background = colour(value, limit)
    frame = "; outline: 2px solid black" if marked else ""
    return f"background: rgb{background}; color: rgb{letters_on(background)}{frame}"


# -- a terminal ------------------------------------------------------------------------------------


def rich(lines: Sequence[Line], title: str = "", notes: Sequence[str] = ()) -> Any:
    """The same for a rich console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    limit, drawn = limit_of(lines), Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for line in lines:
        text = Text()
        for place, (word, value) in enumerate(zip(line.words, line.values, strict=True)):
            background = colour(value, limit)
            style = f"{_name(letters_on(background))} on {_name(background)}"
            text.append(shown(word), f"{style} bold underline" if place == line.mark else style)
        drawn.add_row(Text(shown(line.title)), text)
    head = [Text(shown(title), style="bold")] if title else []
    return Group(*head, drawn, *(Text(note) for note in notes))


def _name(rgb: tuple[int, int, int]) -> str:
    return f"rgb({rgb[0]},{rgb[1]},{rgb[2]})"
