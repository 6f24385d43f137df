"""A folder of finished samples, so that an evaluation that was interrupted goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nrm.errors import InputError

_SETTINGS = "settings"


class Store:
    """One file for each sample, and one that says of what settings they are.

    A file is written beside its place and then renamed: it is there as a whole or not at all.
    Several processes may share a folder.

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
        """What was written, if anything was."""
        try:
            return json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # cut off where the machine went down
            return None

    def write(self, key: str, value: Any) -> None:
        """Keep what was found."""
        beside = self.folder / f".{key}.{os.getpid()}.part"
        beside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(self.folder / f"{key}.json")


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
