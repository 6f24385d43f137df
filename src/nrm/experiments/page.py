"""The pieces of a report's page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from nrm.experiments.tables import Table


def page(title: str, *pieces: str) -> str:
    """A whole page."""
    return _PAGE.format(title=escape(title), pieces="\n".join(piece for piece in pieces if piece))


def facts(values: Mapping[str, str]) -> str:
    """A name and a value in each line."""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in values.items()
    )
    return f'<table class="facts">{lines}</table>'


def links(pages: Mapping[str, str]) -> str:
    """A list of pages: what they are called, by where they are."""
    if not pages:
        return ""
    lines = "".join(
        f'<li><a href="{escape(quote(place))}">{escape(title)}</a></li>'
        for place, title in pages.items()
    )
    return f"<ul>{lines}</ul>"


def table(found: Table) -> str:
    """A table under its title, with a line where another group begins."""
    heads = "".join(f"<th>{escape(head)}</th>" for head in found.heads)
    lines: list[str] = []
    for texts, begins in found.texts():
        kind = ' class="begins"' if begins and found.group else ""
        line = "".join(f"<td>{escape(text)}</td>" for text in texts)
        lines.append(f"<tr{kind}>{line}</tr>")
    return (
        f'<h2>{escape(found.title)}</h2>\n<div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        + (paragraph(found.note) if found.note else "")
    )


def paragraph(text: str) -> str:
    """Running text."""
    return f"<p>{escape(text)}</p>"


def picture(title: str, caption: str, file: Path) -> str:
    """A picture inside the page."""
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return (
        f"<figure><h2>{escape(title)}</h2>"
        f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
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
td, th {{ padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top;
  font-weight: normal; }}
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
{pieces}
</body>
</html>
"""
