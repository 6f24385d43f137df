"""What the command `nrm` does before it imports anything that takes long.

`nrm/__init__.py` imports this first, because Python runs that file before any of the command's own:
torch takes seconds, in which somebody may press Ctrl-C, and is searched along the import path.
Nothing here does anything where `nrm` is imported as a library.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INTERRUPTED = 130

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def is_command() -> bool:
    """Whether this process is `nrm` or `python -m nrm`, rather than one that imports nrm."""
    if not sys.argv:
        return False
    if sys.argv[0] != "-m":  # which stands there while Python looks for the module to run
        return Path(sys.argv[0]).stem == "nrm"
    module = sys.orig_argv[-len(sys.argv)]
    return module.removeprefix("-m").partition(".")[0] == "nrm"


def working_folder_last() -> None:
    """Take the working folder from the front of the import path, where `python -m` puts it.

    What lies beside a picture must not run in the place of an installed package. Models of one's
    own are found all the same: `nrm.cli.models` appends the folder.
    """
    if sys.argv[:1] == ["-m"] and sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]


def interrupts_end_at_once() -> Any:
    """From now on Ctrl-C ends the process with one line; returns what it did before.

    At once, because an exception in the middle of an import is caught, renamed and shown by
    whatever is imported just then. Nothing has been made yet that would need cleaning up.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, in the background; or a debugger's
        return None
    try:
        signal.signal(signal.SIGINT, _end_at_once)
    except ValueError:  # not the main thread, which alone is interrupted
        return None
    return before


def interrupts_as(before: Any) -> None:
    """Undo `interrupts_end_at_once`."""
    if before is not None:
        signal.signal(signal.SIGINT, before)


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """Where there is something to clean up, Ctrl-C is an exception again."""
    at_once = signal.getsignal(signal.SIGINT) is _end_at_once
    if at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if at_once:
            signal.signal(signal.SIGINT, _end_at_once)


def clean_up_when_ended() -> None:
    """Let a request to end become an exception, so that nothing half done is left behind."""
    for number in _ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end_at_once(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _end(number: int, _: object) -> None:
    os.write(2, b"terminated\n")
    raise SystemExit(128 + number)


_before = None
if is_command():
    working_folder_last()
    _before = interrupts_end_at_once()


def library_is_imported() -> None:
    """The last line of `nrm/__init__.py`."""
    interrupts_as(_before)
