"""Pages of one file: tables and pictures, to be opened without anything else.

Nothing that is written into one is read as markup; pictures lie within.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from nrm.display import Table

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
thead th { border-bottom: 1px solid #222; }
img { max-width: 100%; height: auto; }
p { color: #444; max-width: 60rem; }"""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: its head, if it has one.
        picture: the bytes of a PNG.
        tables: below it.
        texts: below these, a paragraph each.
    """

    title: str
    picture: bytes | None = None
    tables: Sequence[Table] = ()
    texts: Sequence[str] = ()


def page(
    title: str,
    facts: Table | None,
    sections: Sequence[Section],
    links: Mapping[str, str] | None = None,
) -> str:
    """A whole page.

    Arguments:
        facts: what is known of all of it.
        links: to pages beside it: what they are called, by their places.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    if facts is not None:
        parts.append(facts.html(most=None))
    if links:
        items = (f'<li><a href="{quote(at)}">{escape(to)}</a></li>' for at, to in links.items())
        parts.append(f"<ul>{''.join(items)}</ul>")
    for section in sections:
        if section.title:
            parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.picture is not None:
            data = base64.b64encode(section.picture).decode("ascii")
            alt = escape(section.title)
            parts.append(f'<p><img alt="{alt}" src="data:image/png;base64,{data}"></p>')
        parts += [table.html(most=None) for table in section.tables]
        parts += [f"<p>{escape(text)}</p>" for text in section.texts]
    return document(title, "\n".join(parts), _STYLE)


def document(title: str, body: str, style: str) -> str:
    """A whole page of markup.

    Arguments:
        title: as text.
        body, style: as HTML and CSS.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}\n</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
