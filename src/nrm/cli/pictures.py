"""Many pictures: which are meant, where the results of each go, and the index over all.

A single picture's results lie in the folder of `--out` itself. Those of several lie in a folder
each, named after the picture, and the index beside them says of every picture what became of it:
`index.json` for programs, `index.html` for people.

A run may end before it is over. Every result is there as a whole or not at all, and says what it
was made from (`fingerprint`): the next run takes those that it would make alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nrm import __version__
from nrm.cli.commands import RESULT, CommandError, as_text
from nrm.cli.report import HEATMAP, INPUT, OVERVIEW, amounts, explanations, to_json
from nrm.errors import some
from nrm.io import Say, write_text
from nrm.pages import document

ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm",
    ".pgm", ".pbm", ".pnm", ".jp2", ".avif",
)  # fmt: skip
"""How files end that are pictures in a folder; one that is named may end as it will."""

INDEX, PAGE = "index.json", "index.html"


@dataclass(frozen=True)
class Job:
    """A picture, and the folder of its results, seen from that of all of them."""

    picture: Path
    folder: Path


def find(given: Sequence[Path], out: Path, say: Say = lambda text: None) -> list[Job]:
    """The pictures that are named, and those in folders that are; each of them once.

    Folders are searched with those in them, but for hidden ones and those of results. Files in
    them that are no pictures by their names are passed over, and said.

    Arguments:
        out: the folder of the results.

    Returns:
        for a single picture that is named, the folder `.`; for others the way to the picture from
        the folder that all that is given has in common, without the ending where that is enough.

    Raises:
        CommandError: a folder holds no pictures, or cannot be read.
    """
    found: dict[Path, Path] = {}
    for place in given:
        held = [place]
        if place.is_dir():
            held, others = _in_folder(place, out)
            shown = as_text(place)
            if not held:
                raise CommandError(f"folder {shown}: no picture in it ({', '.join(ENDINGS)})")
            if others:
                names = [as_text(path.relative_to(place)) for path in others]
                say(f"folder {shown}: {len(others)} files are no pictures: {some(names, 3)}")
        for picture in held:
            found.setdefault(_absolute(picture), picture)
    pictures = list(found.values())
    if len(pictures) == 1 and not any(place.is_dir() for place in given):
        return [Job(pictures[0], Path())]
    roots = [_absolute(place) if place.is_dir() else _absolute(place).parent for place in given]
    root = Path(os.path.commonpath(roots))
    whole = [path.relative_to(root) for path in found]
    short = Counter(path.with_name(path.stem) for path in whole)
    folders = [
        path if short[path.with_name(path.stem)] > 1 or path.stem in (INDEX, PAGE) else
        path.with_name(path.stem)
        for path in whole
    ]  # fmt: skip
    return [Job(picture, folder) for picture, folder in zip(pictures, folders, strict=True)]


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _in_folder(folder: Path, out: Path) -> tuple[list[Path], list[Path]]:
    """The files in a folder that are pictures by their names, and the others."""

    def fail(error: OSError) -> None:
        raise CommandError(f"folder {as_text(error.filename)}: {error.strerror}") from error

    pictures: list[Path] = []
    others: list[Path] = []
    for place, inner, names in os.walk(folder, onerror=fail):
        here = Path(place)
        # What an earlier run drew is none of the pictures.
        inner[:] = sorted(
            name for name in inner if not (name.startswith(".") or _is_of_results(here / name, out))
        )
        for name in sorted(names):
            if not name.startswith("."):
                kind = pictures if name.lower().endswith(ENDINGS) else others
                kind.append(here / name)
    return pictures, others


def _is_of_results(folder: Path, out: Path) -> bool:
    return _absolute(folder) == _absolute(out) or any(
        (folder / name).is_file() for name in (RESULT, INDEX)
    )


# -- results that are there already ----------------------------------------------------------------


def fingerprint(**made_from: Any) -> str:
    """The SHA-256 of all that a result depends on, as text."""
    told = json.dumps({"nrm": __version__, **made_from}, sort_keys=True, default=str)
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()


def finished(folder: Path, wanted: str) -> dict[str, Any] | None:
    """The result in a folder, if it is whole and of this fingerprint."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        whole = all((folder / name).is_file() for name in result["pictures"])
        return result if whole and result["fingerprint"] == wanted else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- the index -------------------------------------------------------------------------------------


@dataclass
class Index:
    """What became of every picture.

    Attributes:
        model, command: what was run.
        out: where it lies.
        jobs: all that there are.
        done: results, by the place of the job.
        failed: what was wrong, by the place of the job.
        taken: how many results were there already.
    """

    model: str
    command: Sequence[str]
    out: Path
    jobs: Sequence[Job]
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    taken: int = 0

    @property
    def left(self) -> list[str]:
        """The pictures that were not come to."""
        return [
            as_text(job.picture)
            for k, job in enumerate(self.jobs)
            if k not in self.done and k not in self.failed
        ]

    def state(self) -> str:
        """How far the run is, in words."""
        words = [f"{len(self.done)} of {len(self.jobs)} pictures are explained"]
        if self.taken:
            words.append(f"{self.taken} of them were there already")
        if self.failed:
            words.append(f"{len(self.failed)} could not be")
        return ", ".join(words)

    def as_json(self) -> dict[str, Any]:
        """As it stands in `index.json`."""
        return {
            "model": self.model,
            "complete": not self.left,
            "pictures": [
                {
                    "image": result["image"],
                    "folder": as_text(self.jobs[k].folder.as_posix()),
                    "explanations": [
                        {name: entry[name] for name in _TOLD} for entry in explanations(result)
                    ],
                }
                for k, result in sorted(self.done.items())
            ],
            "failed": [
                {"image": as_text(self.jobs[k].picture), "error": error}
                for k, error in sorted(self.failed.items())
            ],
            "left": self.left,
            "command": list(self.command),
        }

    def write(self) -> None:
        """Write both files, whole or not at all; nothing, where nothing is explained."""
        if self.done:
            write_text(self.out / PAGE, self._page())
            write_text(self.out / INDEX, to_json(self.as_json()))

    def _page(self) -> str:
        title = f"{self.model}: {len(self.done)} of {len(self.jobs)} pictures"
        rows = "\n".join(self._rows())
        failed = [error for _, error in sorted(self.failed.items())]
        failed += [f"{picture}: the run ended before it" for picture in self.left]
        notes = "".join(f"<li>{escape(line)}</li>" for line in failed)
        failures = f"<h2>Not explained</h2><ul>{notes}</ul>" if notes else ""
        body = f"<h1>{escape(title)}</h1>\n<table>\n{rows}\n</table>\n{failures}"
        return document(title, body, _STYLE)

    def _rows(self) -> Iterator[str]:
        for k, result in sorted(self.done.items()):
            folder = self.jobs[k].folder
            several = len(explanations(result)) > 1
            for entry in explanations(result):
                prefix = f"target_{entry['target']}_" if several else ""
                link = _link(folder)
                name = entry["label"] or what_is_explained(entry, result["outputs"])
                words = (
                    f"<b>{escape(name)}</b><br>{escape(amounts(entry))}<br>"
                    f"<small>{escape(result['image'])}</small>"
                )
                pictures = "".join(
                    f'<td><a href="{link(prefix + OVERVIEW)}"><img src="{link(file)}" '
                    f'alt="{alt}"></a></td>'
                    for file, alt in ((INPUT, "input"), (prefix + HEATMAP, "heatmap"))
                )
                yield f"<tr>{pictures}<td>{words}</td></tr>"


_TOLD = ("target", "label", "explained", "probability", "probability_from", "logit")

_STYLE = """body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; }
td { padding: 0.4em 1em 0.4em 0; vertical-align: middle; }
img { height: 11em; }"""


def what_is_explained(entry: dict[str, Any], outputs: int) -> str:
    """An output without its name: which one it is."""
    return "the output" if outputs == 1 else f"class {entry['target']}"


def _link(folder: Path) -> Callable[[str], str]:
    """Links to the files of a folder, of any name."""
    return lambda file: escape(quote(os.fsencode((folder / file).as_posix())))
