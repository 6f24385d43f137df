"""What the command line refuses, and how every refusal becomes one line on stderr."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer

from nrm.errors import NrmError

REFUSED = 2
INTERRUPTED = 130


class CommandError(NrmError):
    """Something given on the command line does not exist, cannot be read or does not fit."""


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Errors on purpose end the command with one line and exit code 2; `debug` lets them through.

    Warnings become single lines too.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            yield
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (NrmError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            if debug:
                raise
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(REFUSED) from None


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many there are besides."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _show_warning(message: Warning | str, *_: object) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)
