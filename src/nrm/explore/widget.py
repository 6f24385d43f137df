"""The explorer in a notebook: the same page, whose requests go to the kernel instead of a server.

Needs anywidget (`pip install 'nrm[notebook]'`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from nrm.errors import NrmError, one_line
from nrm.explore.answers import Request
from nrm.explore.bundle import modules, style, vendored
from nrm.explore.described import described
from nrm.explore.opened import Opened
from nrm.explore.session import Sessions, told

try:
    import anywidget
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"nrm.explore.widget needs {error.name}, which is not installed: "
        "pip install 'nrm[notebook]'",
        name=error.name,
    ) from error


def show(opened: Opened) -> Explorer:
    """The explorer as the result of a cell.

    Example:
        >>> show(nrm.explore.opened.pictures(explainer, images, names))
    """
    return Explorer(opened)


class Explorer(anywidget.AnyWidget):  # type: ignore[misc]
    """The widget. Each has a session of its own; a newer click ends an older one."""

    _esm = vendored() + modules("widget.js")
    _css = style()

    def __init__(self, opened: Opened) -> None:
        super().__init__()
        self._opened = opened
        self._session = Sessions(opened).new()
        self.on_msg(self._asked)

    def _asked(self, _: Any, content: Any, buffers: Any) -> None:
        """Answer a message of the page in a thread, so that the next one can be heard."""
        if isinstance(content, dict):
            threading.Thread(target=self._answer, args=(content,), daemon=True).start()

    def _answer(self, content: dict[str, Any]) -> None:
        for part in answers(self._opened, self._session, content):
            self.send({"id": content.get("id"), **part})


def answers(opened: Opened, session: Any, content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the page is told, message by message; the last one has `over`."""
    try:
        what, number = content.get("what"), content.get("input", 0)
        if what == "open":
            yield {"found": {**described(opened, session), "sends": False}}
        else:
            request = Request.read(content.get("request"))
            if what == "script":
                yield {"found": session.script(number, request)}
            elif what in ("view", "search"):
                asked = session.answer if what == "view" else session.search
                for part in told(asked(number, request, session.turn())):
                    yield {"part": part}
    except NrmError as error:
        yield {"error": one_line(error)}
    yield {"over": True}
