"""Browser tabs: each has a session, which keeps its input and the measure of it.

Sessions are apart: what one tab opens or sends is seen by no other. There are at most so many, of
which the one that was used least lately ends. Within a session a newer request ends an older one;
computing goes on in one thread at a time, because passes use all cores.
"""

from __future__ import annotations

import logging
import math
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nrm.errors import InputError, NrmError, QueryError, one_line
from nrm.explore.answers import Found, Part, Request, Searching
from nrm.explore.columns import chosen_at_first, columns_of
from nrm.explore.opened import Input, Opened, Sample
from nrm.explore.script import script
from nrm.explore.view import answer, search
from nrm.measure import Measure

MOST_SESSIONS, MOST_INPUTS = 16, 8
"""Browser tabs at once; inputs that somebody sent, in each."""
EVERY = 0.1
"""Seconds between what is said of a search."""


class SupersededError(NrmError):
    """A newer request of the same tab took the place of this one."""


@dataclass(frozen=True)
class Turn:
    """One request of a session; `check` raises once there is a newer one."""

    session: Session
    number: int

    def check(self) -> None:
        if self.session.newest != self.number:
            raise SupersededError("a newer click took the place of this one.")


class Session:
    """One browser tab.

    Attributes:
        newest: the number of its newest request.
    """

    def __init__(self, opened: Opened, computing: threading.Lock) -> None:
        self.id = secrets.token_urlsafe(16)
        self.newest = 0
        self._opened, self._computing = opened, computing
        self._counting = threading.Lock()
        self._inputs: list[Input] = list(opened.inputs)
        self._measure: tuple[int, Measure] | None = None

    @property
    def axis(self) -> int | None:
        """Along which the places of inputs that are no pictures lie."""
        return self._opened.axis

    def turn(self) -> Turn:
        """A new request, which ends the one before it."""
        with self._counting:
            self.newest += 1
            return Turn(self, self.newest)

    def add(self, data: bytes, name: str) -> int:
        """Take a file that somebody sent as an input; its number."""
        if self._opened.read is None:
            raise InputError("nothing can be sent here: the inputs are those that were opened.")
        sent = len(self._inputs) - len(self._opened.inputs)
        if sent >= MOST_INPUTS:
            raise InputError(f"{MOST_INPUTS} files were sent already: reload the page to go on.")
        self._inputs.append(self._opened.read(data, name))
        return len(self._inputs) - 1

    def input(self, number: Any) -> Input:
        """An input by its number."""
        if type(number) is not int or not 0 <= number < len(self._inputs):
            raise QueryError(f"there is no input {str(number)[:20]} in this tab.")
        return self._inputs[number]

    def inputs(self) -> list[Input]:
        return list(self._inputs)

    def measure(self, number: Any) -> Measure:
        """The measure of an input, made where it is not the one that was looked at last."""
        chosen = self.input(number)
        if self._measure is None or self._measure[0] != number:
            self._measure = number, self._opened.measure(chosen)
        return self._measure[1]

    def answer(self, number: Any, request: Request, turn: Turn) -> Iterator[Part]:
        """The parts of an answer, each computed while no other session computes."""
        parts: Iterator[Part] | None = None
        while True:
            with self._computing:
                turn.check()
                if parts is None:
                    parts = answer(self.measure(number), request, self._opened, turn.check)
                part = next(parts, None)
            if part is None:
                return
            yield part

    def search(self, number: Any, request: Request, turn: Turn) -> Iterator[Part]:
        """The gap that is left, whenever it is asked for, and at last the flows."""
        waiting: queue.Queue[Part | NrmError] = queue.Queue()
        said = 0.0

        def tell(gap: float) -> None:
            nonlocal said
            turn.check()
            if time.monotonic() - said > EVERY:
                said = time.monotonic()
                waiting.put(Searching(gap if math.isfinite(gap) else None))

        def work() -> None:
            try:
                with self._computing:
                    turn.check()
                    waiting.put(search(self.measure(number), request, self._opened, tell))
            except NrmError as error:
                waiting.put(error)
            except Exception as error:  # or the one that waits would wait for ever
                waiting.put(QueryError(f"the search failed: {one_line(error)}"))

        threading.Thread(target=work, daemon=True).start()
        while True:
            found = waiting.get()
            if isinstance(found, NrmError):
                raise found
            yield found
            if isinstance(found, Found):
                return

    def script(self, number: Any, request: Request) -> str:
        """Python that gives the numbers of a view when it is run."""
        chosen = self.input(number)
        with self._computing:
            return script(self.measure(number), request, self._opened, chosen)

    def references(self, layer: Any, channel: Any) -> list[Sample]:
        """The samples of a data set in which a channel is most relevant."""
        opened = self._opened
        if opened.references is None or layer not in opened.referenced:
            raise QueryError(f"no samples are kept of {str(layer)[:80]!r}.")
        if type(channel) is not int or channel < 0:
            raise QueryError("a channel is named by its number.")
        with self._computing:
            return list(opened.references(layer, channel))

    def columns(self, number: int) -> tuple[list[dict[str, Any]], list[str]]:
        """The layers that may be columns, and those that are at first."""
        with self._computing:
            R = self.measure(number)
            found = columns_of(R.graph, self._opened, R)
        rows = [
            {
                "layer": one.layer, "size": one.size, "kind": one.kind, "axis": one.axis,
                "group": one.group,
                "ways": [{"by": w.by.how, "size": w.size, "of": w.by.of} for w in one.ways],
            }
            for one in found
        ]  # fmt: skip
        known = [one.layer for one in found if one.layer in self._opened.referenced]
        return rows, list(self._opened.columns) or known or chosen_at_first(found)


def told(parts: Iterator[Part]) -> Iterator[dict[str, Any]]:
    """The parts of an answer for JSON, and after them what went wrong, if anything did."""
    try:
        for part in parts:
            yield asdict(part)
    except SupersededError:
        yield {"kind": "superseded"}
    except NrmError as error:
        yield {"kind": "error", "error": one_line(error)}
    except Exception as error:  # a model's code; there is somebody who waits for an answer
        logging.getLogger(__name__).exception("an answer failed")
        yield {"kind": "error", "error": f"it failed: {type(error).__name__}: {one_line(error)}"}


class Sessions:
    """All that are open."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self._computing, self._lock = threading.Lock(), threading.Lock()
        self._open: OrderedDict[str, Session] = OrderedDict()

    def new(self) -> Session:
        """One more; the one that was used least lately ends, where there are too many."""
        session = Session(self.opened, self._computing)
        with self._lock:
            self._open[session.id] = session
            while len(self._open) > MOST_SESSIONS:
                self._open.popitem(last=False)
        return session

    def __getitem__(self, name: Any) -> Session:
        """The one of an id.

        Raises:
            QueryError: it has ended, or there was none.
        """
        with self._lock:
            found = self._open.get(name) if isinstance(name, str) else None
            if found is None:
                raise QueryError("this tab's session has ended: reload the page.")
            self._open.move_to_end(found.id)
            return found
