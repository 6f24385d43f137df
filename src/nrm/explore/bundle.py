"""The page's modules as one: for a file that needs no server, and for notebooks.

The modules are written so that this needs no build step: they import by lines of their own,
`import { a, b } from "./x.js";`, export by a word before a declaration, and no two declare the
same name.
"""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).with_name("page")
VENDORED = ("d3-path", "d3-shape", "d3-format")
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w.]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(async )?(function|const|class) )", re.MULTILINE)


def style() -> str:
    """The style sheet."""
    return (PAGE / "explore.css").read_text(encoding="utf-8")


def vendored() -> str:
    """The parts of d3 that are used, as one script that finds nothing around it but the window."""
    parts = [(PAGE / "vendor" / f"{name}.min.js").read_text(encoding="utf-8") for name in VENDORED]
    return "".join(
        f"(function (exports, module, define) {{\n{text}\n}}).call(globalThis);\n" for text in parts
    )


def modules(first: str) -> str:
    """A module and all that it imports, as one text without imports and exports.

    Arguments:
        first: the name of its file.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        text = (PAGE / name).read_text(encoding="utf-8")
        for other in _IMPORT.findall(text):
            visit(other)
        order.append(name)

    visit(first)
    texts = [(PAGE / name).read_text(encoding="utf-8") for name in order]
    return "\n".join(_EXPORT.sub("", _IMPORT.sub("", text)) for text in texts)
