"""The folder of a run: what it is of, and its shards, each there as a whole or not at all.

    manifest.json            what was asked of what (compared before a run goes on)
    shards/00000012/         the tables of one shard, and shard.json with its counts
    merged/                  the tables of all of them, written at the end
    in-use                   locked by the one run that writes here

One process writes: whoever holds the lock. Shards are computed anywhere and committed here, by a
rename, under their number: what is committed twice counts once.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nrm.dataset import tables
from nrm.dataset.shard import Known, Pair, Quantity, ShardResult
from nrm.dataset.statistics import Joint, Statistics
from nrm.errors import InputError, StorageError
from nrm.io import check_folder, locked, made_at_once, unfinished, write_text

MANIFEST = "manifest.json"
_SHARDS, _MERGED, _COUNTS, _LOCK = "shards", "merged", "shard.json", "in-use"
_FULL = (errno.ENOSPC, errno.EDQUOT)
MADE_FROM = "made_from"
"""The entry of a manifest that is not compared: how the run was asked for."""


@dataclass(frozen=True)
class Counts:
    """What became of the samples of one shard, or of all.

    Attributes:
        samples: explained.
        read: the skipped ones included.
        ended: whether the data end there.
        cautions: batches that each kind of warning was given for.
    """

    samples: int
    read: int
    ended: bool
    cautions: dict[str, int]

    def __add__(self, other: Counts) -> Counts:
        kinds = sorted({*self.cautions, *other.cautions})
        return Counts(
            self.samples + other.samples,
            self.read + other.read,
            self.ended or other.ended,
            {kind: self.cautions.get(kind, 0) + other.cautions.get(kind, 0) for kind in kinds},
        )


class Folder:
    """A run on disk.

    Raises:
        InputError: there is none in it, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = (path / MANIFEST).read_text(encoding="utf-8")
            self.manifest: dict[str, Any] = json.loads(text)
            schema = self.manifest["schema"]
        except FileNotFoundError:
            raise InputError(f"{path} holds no results: there is no {MANIFEST} in it") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path / MANIFEST} is damaged: it is no manifest") from error
        if schema != tables.SCHEMA:
            raise InputError(
                f"{path} holds results in form {schema}, and this version of nrm reads form "
                f"{tables.SCHEMA}. Read them with nrm {self.manifest.get('nrm')}, or give another "
                "folder."
            )

    @classmethod
    @contextmanager
    def writing(cls, path: Path, manifest: Mapping[str, Any]) -> Iterator[Folder]:
        """The folder of a run, new or begun before, for one process to write to.

        Arguments:
            manifest: what is asked of what; as JSON, with `made_from` beside.

        Raises:
            StorageError: nothing can be written there, or another run does.
            InputError: what is there is of another question, model or data set.
        """
        check_folder(path, "results folder")
        wanted = json.loads(json.dumps({"schema": tables.SCHEMA, **manifest}))  # as it comes back
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"results folder {path}: {error.strerror}") from error
        with locked(path / _LOCK, f"results folder {path}"), stopped_by_full_disk(path):
            if (path / MANIFEST).exists():
                found = cls(path)
                found._require(wanted)
            elif (path / _SHARDS).exists():
                raise InputError(
                    f"{path} holds shards and no {MANIFEST} that says what they are of. Give "
                    "another folder, or delete this one."
                )
            else:
                write_text(path / MANIFEST, json.dumps(wanted, indent=1) + "\n")
                found = cls(path)
            for parent in (path, path / _SHARDS):
                for left in unfinished(parent):
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink(missing_ok=True)
            yield found

    def _require(self, wanted: Mapping[str, Any]) -> None:
        known = self.manifest
        other = [
            f"{name} is {_short(wanted.get(name))}, there it is {_short(known.get(name))}"
            for name in dict.fromkeys((*known, *wanted))
            if name != MADE_FROM and known.get(name) != wanted.get(name)
        ]
        if other:
            raise InputError(
                f"{self.path} holds another run, which is not to be mixed with this one: "
                f"{'; '.join(other)}. Give another folder, or delete this one."
            )

    # -- shards ----------------------------------------------------------------------------------

    def committed(self) -> dict[int, Counts]:
        """The shards that are there, in their order.

        Raises:
            InputError: one of them is damaged.
        """
        found: dict[int, Counts] = {}
        inside = (self.path / _SHARDS).glob("[0-9]*") if self.path.exists() else ()
        for folder in sorted(inside, key=lambda folder: int(folder.name)):
            try:
                counts = Counts(**json.loads((folder / _COUNTS).read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                counts = None
            if counts is None or not tables.is_whole(folder):
                raise InputError(
                    f"the shard {folder} is damaged. Delete this folder: the next run computes "
                    "it again."
                )
            found[int(folder.name)] = counts
        return found

    def commit(self, result: ShardResult) -> Counts:
        """Keep a shard, unless it is there already."""
        counts = Counts(result.samples, result.read, result.ended, result.cautions)
        with made_at_once(self._shard(result.shard)) as beside:
            tables.write(beside, tables.of_shard(result))
            (beside / _COUNTS).write_text(json.dumps(vars(counts)), encoding="utf-8")
        return counts

    def _shard(self, number: int) -> Path:
        return self.path / _SHARDS / f"{number:08}"

    # -- all of them -----------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, list[str]]:
        """The names of every layer's parts."""
        named: dict[str, list[str]] = self.manifest["parts"]
        return named

    @property
    def pairs(self) -> dict[Pair, tuple[int, int]]:
        """How many parts the layers of every pair have."""
        return {(a, b): (m, n) for (a, b), (m, n) in self.manifest["pairs"]}

    def merged(self, shards: Mapping[int, Counts]) -> tables.Tables:
        """The tables of some shards together, merged in the order of their numbers."""
        sizes = {layer: len(names) for layer, names in self.parts.items()}
        statistics: dict[tuple[str, Quantity], Statistics] = {}
        joint: dict[Pair, Joint] = {}
        known: dict[int, Known] = {}
        skipped: list[tuple[int, str, str]] = []
        for number in sorted(shards):
            folder = self._shard(number)
            found = tables.statistics_in(folder, sizes, self.manifest["k"])
            for key, one in found.items():
                statistics[key] = statistics[key].merge(one) if key in statistics else one
            for pair, each in tables.joint_in(folder, self.pairs).items():
                joint[pair] = joint[pair].merge(each) if pair in joint else each
            known |= tables.known_in(folder)
            known = _still_wanted(known, statistics, joint)
            rows = tables.read(folder, "skipped").to_pylist()
            skipped += [(row["sample"], row["name"], row["reason"]) for row in rows]
        return tables.of_run(statistics, joint, known, skipped, self.parts)

    def finish(self, shards: Mapping[int, Counts]) -> None:
        """Write the tables of all shards together, in place of those of fewer."""
        place = self.path / _MERGED
        total = sum((shards[number] for number in sorted(shards)), Counts(0, 0, False, {}))
        mark = {**vars(total), "shards": len(shards)}
        if self.finished() == mark:
            return
        if place.exists():
            shutil.rmtree(place)
        with made_at_once(place) as beside:
            tables.write(beside, self.merged(shards))
            (beside / _COUNTS).write_text(json.dumps(mark), encoding="utf-8")

    def finished(self) -> dict[str, Any] | None:
        """The counts of the merged tables; `None` where the run is not over."""
        try:
            text = (self.path / _MERGED / _COUNTS).read_text(encoding="utf-8")
            found: dict[str, Any] = json.loads(text)
        except (OSError, ValueError):
            return None
        return found

    def table(self, name: str) -> Any:
        """One of the merged tables."""
        return tables.read(self.path / _MERGED, name)


def _still_wanted(
    known: Mapping[int, Known],
    statistics: Mapping[tuple[str, Quantity], Statistics],
    joint: Mapping[Pair, Joint],
) -> dict[int, Known]:
    """The samples that are still among the largest of anything."""
    wanted: set[int] = set()
    for samples in (
        *(s.top.samples for s in statistics.values()),
        *(j.samples for j in joint.values()),
    ):
        wanted.update(np.unique(samples).tolist())
    return {number: found for number, found in known.items() if number in wanted}


@contextmanager
def stopped_by_full_disk(path: Path) -> Iterator[None]:
    """Say of a disk that is full, or a folder that cannot be written, what is kept.

    Raises:
        StorageError: it is.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"the disk of {path} is full. All shards that were finished are kept there: make "
                "room, and start the same run again to go on."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"results folder {path}: nothing can be written there: {error.strerror}. All "
                "shards that were finished are kept."
            ) from error
        raise


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
