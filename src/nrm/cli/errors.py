"""What the command line refuses, and how every refusal becomes one line on stderr."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer

from nrm.cli.starting import INTERRUPTED, interrupts_raise
from nrm.errors import NrmError
from nrm.io import one_line, printable

REFUSED = 2
_WANTED = re.compile(r"[\d.]+ ?([kKMGT]i?B|bytes)\b")  # the first figure of a message


class CommandError(NrmError):
    """Something given on the command line does not exist, cannot be read or does not fit."""


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Errors on purpose end the command with one line and exit code 2; `debug` lets them through.

    So do files that cannot be read or written, and running out of memory. A reader that goes away
    (`nrm layers | head`) ends it without a word. Warnings become single lines too, each shown once.
    """
    shown: set[str] = set()

    def show(message: Warning | str, *_: object) -> None:
        text = f"warning: {' '.join(str(message).split())}"
        if text not in shown:
            shown.add(text)
            typer.echo(text, err=True)

    with interrupts_raise(), warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # typer ends without a word
        except Exception as error:
            short = out_of_memory(error)
            if debug or not (short or isinstance(error, NrmError | OSError)):
                raise
            typer.echo(f"error: {short or one_line(error)}", err=True)
            raise typer.Exit(REFUSED) from None


def out_of_memory(error: BaseException) -> str | None:
    """What there is to say of an error that comes, also by another, of a lack of memory."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if (
            isinstance(cause, MemoryError | torch.OutOfMemoryError)
            or "DefaultCPUAllocator" in text  # torch has no type for it
            or "out of memory" in text
        ):
            wanted = _WANTED.search(text)
            return f"there is not enough memory{f' for {wanted[0]}' if wanted else ''}"
        cause = cause.__cause__ or cause.__context__
    return None


def as_text(path: object) -> str:
    """A path as text that can be written down; what is no text in it is replaced."""
    return printable(os.fsencode(str(path)).decode("utf-8", errors="replace"))
