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

    Those in its folders move to folders of the same names.

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
        files = [file.relative_to(staging) for file in staging.rglob("*") if file.is_file()]
        files.sort(key=lambda file: (file == Path(last), file.name == last, file))
        for file in files:  # before the first one moves
            _check_place(out, file)
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / file, out / file)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_place(out: Path, file: Path) -> None:
    """Refuse a place where a folder is, or that is inside a file."""
    if (out / file).is_dir():
        raise CommandError(f"{out / file} is a folder, not a file to replace")
    for folder in file.parents:
        if (out / folder).exists() and not (out / folder).is_dir():
            raise CommandError(f"{out / folder} is a file, not a folder")


def _movable(parent: Path, out: Path) -> bool:
    """Whether files can be made in `parent` and moved from there to `out`."""
    return os.access(parent, os.W_OK | os.X_OK) and parent.stat().st_dev == out.stat().st_dev
