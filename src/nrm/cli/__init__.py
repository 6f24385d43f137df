"""The command `nrm`."""

from __future__ import annotations

import sys

_EXTRAS = ("typer", "rich", "matplotlib", "PIL", "safetensors")


def main() -> None:
    """Run the command line; says what to install where one of its packages is missing."""
    try:
        from nrm.cli.app import app

        app(prog_name="nrm")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        sys.stderr.write(f"error: {package} is not installed: pip install 'nrm[cli]'\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # between the commands' own handling: imports, parsing
        raise SystemExit(130) from None
