"""Results appear in their folder complete or not at all, and a killed run leaves no litter.

Files are made in a temporary folder beside the result, `.OUT-nrm-XXXXXXXX`, which holds a file
that the process keeps locked. The system frees the lock when the process ends, however it ends:
folders of that name whose lock is free are what a killed run left, and the next run removes them.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nrm.cli.errors import CommandError

try:
    import fcntl
except ModuleNotFoundError:  # no such locks on this system: nothing is taken for litter
    fcntl = None  # type: ignore[assignment]

_LOCK = "in-use"
_FILES = "files"
_TEMPORARY = re.compile(r"\..*-nrm-[a-z0-9_]{8}")  # as tempfile names folders
_MOMENT = 60.0  # seconds, in which a folder that was made is locked


def check_folder(out: Path) -> None:
    """Refuse early a folder that cannot be one."""
    for path in (out, *out.absolute().parents):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):  # it, or something further up
            continue
        except OSError as error:
            raise CommandError(f"--out {out}: {path}: {error.strerror}") from error
        if not path.is_dir():
            raise CommandError(f"--out {out}: {path} is not a folder")
        if not os.access(path, os.W_OK | os.X_OK):
            raise CommandError(f"--out {out}: nothing can be written to {path}")
        return


@contextmanager
def filled_at_once(out: Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files all move to `out` at the end; after an error none does.

    Those in its folders move to folders of the same names. What killed runs left is removed.

    Arguments:
        last: the file to move last: once it is there, so are the others.
    """
    check_folder(out)
    out = out.resolve()
    parent = out.parent
    while not parent.exists():  # those in between come with `out`, not before it
        parent = parent.parent
    for place in (out, *out.parents):
        _remove_litter(place, out.name)
    if out.exists() and not _movable(parent, out):
        parent = out  # a mounted folder, or one in a folder of somebody else's
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-nrm-", dir=parent))
    except OSError as error:
        raise CommandError(f"--out {out}: no folder in {parent}: {error.strerror}") from error
    try:
        with open(temporary / _LOCK, "w") as lock:
            _lock(lock.fileno())
            staging = temporary / _FILES
            staging.mkdir()
            yield staging
            _move(staging, out, last)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(staging: Path, out: Path, last: str) -> None:
    files = [file.relative_to(staging) for file in staging.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (file == Path(last), file.name == last, file))
    for file in files:  # before the first one moves
        _check_place(out, file)
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / file, out / file)


def _remove_litter(place: Path, name: str) -> None:
    """Remove the temporary folders for `name` whose process is no more; nothing else."""
    try:
        inside = list(place.iterdir())
    except OSError:  # it cannot be read, or is none yet
        return
    for folder in inside:
        if not (folder.name.startswith(f".{name}-nrm-") and _TEMPORARY.fullmatch(folder.name)):
            continue
        with suppress(OSError):  # another process removes it at this moment, or it is not ours
            if folder.is_dir() and not folder.is_symlink() and _is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    """Whether the process that made a temporary folder has ended."""
    held = {file.name for file in folder.iterdir()}
    if not held <= {_LOCK, _FILES}:
        return False  # not as we make them
    if _LOCK not in held:  # killed before it could lock it, or about to
        return not held and time.time() - folder.stat().st_mtime > _MOMENT
    with open(folder / _LOCK, "r+") as lock:
        return _lock(lock.fileno())


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed; `False` if somebody else has, or where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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
