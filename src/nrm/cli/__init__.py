"""The command `nrm`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from nrm.cli.starting import clean_up_when_ended, interrupts_end_at_once

_EXTRAS = ("typer", "rich", "matplotlib", "PIL", "safetensors")


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
