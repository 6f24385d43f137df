"""Results appear in their folder complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nrm.cli.errors import CommandError


def check_folder(out: Path) -> None:
    """Refuse early a folder that cannot be one."""
    for path in (out, *out.absolute().parents):
        if path.exists():
            if not path.is_dir():
                raise CommandError(f"--out {out}: {path} is not a folder")
            return


@contextmanager
def filled_at_once(out: Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files all move to `out` at the end; after an error none does.

    Arguments:
        last: the file to move last: once it is there, so are the others.
    """
    check_folder(out)
    out = out.resolve()
    parent = out.parent
    while not parent.exists():  # those in between come with `out`, not before it
        parent = parent.parent
    if out.exists() and not _movable(parent, out):
        parent = out  # a mounted folder, or one in a folder of somebody else's
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent))
    try:
        yield staging
        files = sorted(staging.iterdir(), key=lambda file: (file.name == last, file.name))
        for file in files:  # before the first one moves
            if (out / file.name).is_dir():
                raise CommandError(f"{out / file.name} is a folder, not a file to replace")
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _movable(parent: Path, out: Path) -> bool:
    """Whether files can be made in `parent` and moved from there to `out`."""
    return os.access(parent, os.W_OK | os.X_OK) and parent.stat().st_dev == out.stat().st_dev
