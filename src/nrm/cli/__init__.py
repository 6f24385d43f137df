"""The command `nrm`: how it starts and ends, with the import path, Ctrl-C, requests to end.

Torch takes seconds to import, in which somebody may press Ctrl-C, and is searched along the import
path. So this comes before anything that takes long, and imports nothing that does. Nothing here
does anything where nrm is imported as a library.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec

INTERRUPTED = 130

_EXTRAS = ("typer", "rich", "matplotlib", "PIL", "safetensors")

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    """Run the command line; says what to install where one of its packages is missing."""
    interrupts_end_at_once()
    for package in _EXTRAS:
        if find_spec(package) is None:
            sys.stderr.write(f"error: {package} is not installed: pip install 'nrm[cli]'\n")
            raise SystemExit(2)
    from nrm.cli.app import app

    clean_up_when_ended()
    # Names of files and classes hold what a terminal may not be able to show.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="nrm")


def working_folder_last() -> None:
    """Take the working folder from the front of the import path, where `python -m` puts it.

    What lies beside a picture must not run in the place of an installed package. Models of one's
    own are found all the same: `nrm.cli.models` appends the folder.
    """
    if sys.path[:1] in ([""], [os.getcwd()]) and not sys.flags.safe_path:
        del sys.path[0]


def interrupts_end_at_once() -> None:
    """From now on Ctrl-C ends the process with one line.

    At once, because an exception in the middle of an import is caught, renamed and shown by
    whatever is imported just then. Nothing has been made yet that would need cleaning up.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ignored, in the background; or a debugger's
    with suppress(ValueError):  # not the main thread, which alone is interrupted
        signal.signal(signal.SIGINT, _end_at_once)


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
