"""What to install where a package of an extra is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import packages of an extra; ends the command, saying what to install, if one is missing.

    Example:
        >>> with needs("cli"):
        ...     import typer
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("nrm"):
            raise
        package = error.name.partition(".")[0]
        sys.stderr.write(f"error: {package} is not installed: pip install 'nrm[{extra}]'\n")
        raise SystemExit(2) from None
