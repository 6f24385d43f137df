"""A folder of finished samples, so that what was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nrm.errors import InputError
from nrm.io import write_text

_SETTINGS = "settings"


class Store:
    """One JSON file for each sample, and one that says of what settings they are.

    A file is there as a whole or not at all, with a digest of what it holds: one that was damaged
    is as if it were not there. Several processes may share a folder.

    Raises:
        InputError: the folder is of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = wanted = json.loads(json.dumps(settings))  # as it comes back
        known = self.read(_SETTINGS)
        if known is None and any(file.suffix == ".json" for file in self.folder.iterdir()):
            raise InputError(
                f"{self.folder} holds samples, and no settings of theirs that can be read. Give "
                "another folder, or delete this one."
            )
        if known is None:
            self.write(_SETTINGS, wanted)
        elif known != wanted:
            raise InputError(
                f"{self.folder} holds an evaluation with other settings: "
                f"{_differences(known, wanted)}. Give another folder, or delete this one."
            )

    def read(self, key: str) -> Any | None:
        """What was written, if anything was, and it is whole."""
        try:
            held = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            return held["value"] if held["digest"] == _digest(held["value"]) else None
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None  # cut off where the machine went down, or not ours

    def write(self, key: str, value: Any) -> None:
        """Keep what was found; what JSON has no word for is a mistake (`ValueError`)."""
        value = json.loads(json.dumps(value, allow_nan=False))  # as it comes back
        held = {"digest": _digest(value), "value": value}
        write_text(self.folder / f"{key}.json", json.dumps(held, indent=1) + "\n")

    def once(self, key: str, find: Callable[[], Any]) -> Any:
        """What was kept, or found now and kept: as JSON gives it back either way."""
        known = self.read(key)
        if known is None:
            self.write(key, find())
            known = self.read(key)
        return known


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    other = [
        f"{name} {_short(known.get(name))} instead of {_short(wanted.get(name))}"
        for name in dict.fromkeys((*known, *wanted))
        if known.get(name) != wanted.get(name)
    ]
    return "; ".join(other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
