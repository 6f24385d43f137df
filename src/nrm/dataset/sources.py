"""Data sets as numbered shards of numbered samples, whatever they are kept in.

A *shard* is what is computed and kept as one piece: some samples that are always the same ones, in
the same order. A sample's number is its place in the data set (in archives, the archive's number
times `2^32`, plus its place there). What cannot be read is a sample with an `error`.

- `Rows`: whatever has `len` and `[i]`: data sets of torchvision and Hugging Face, tensors.
- `Pictures`: a folder of pictures; those in folders of their own are of that class.
- `Archives`: tar files as webdataset writes them, each a shard.
- `Stream`: whatever can only be iterated over.

`as_source` chooses. All of them can be pickled, if what they hold can be: workers read on their
own.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nrm.dataset.samples import Held, Load, Read, Sample, attempted, plain, reason
from nrm.errors import InputError
from nrm.evaluation.store import described
from nrm.io import imagenet, read_image

SHARD = 1024
"""Samples of a shard, by default."""

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}
_PIECE = 2**32
_PROBED = 16


class Source(Protocol):
    """A data set in shards.

    Attributes:
        shards: how many there are; `None` where only reading tells.
        samples: how many there are, likewise.
        size: the most samples of a shard.
    """

    size: int

    @property
    def shards(self) -> int | None:
        """How many shards."""

    @property
    def samples(self) -> int | None:
        """How many samples."""

    def read(self, shard: int) -> Iterator[Load]:
        """The samples of a shard, each to be read by a call."""

    def sample(self, number: int) -> Sample:
        """One sample by its number."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set from others, as JSON: also which samples make a shard."""


class Rows:
    """A data set with `len` and `[i]`.

    Arguments:
        data: it.
        read: makes an item the input, or (input, label); by default items are tensors, pairs of
            a tensor and a label, or mappings with `image` and `label` (see `as_sample`).
        shard: samples of a shard.
        name: the data set's, and its version: tells it from others. By default type, length,
            and the contents of 16 items that are spread over it.
    """

    def __init__(
        self, data: Any, read: Read | None = None, shard: int = SHARD, name: str | None = None
    ) -> None:
        self.data, self._read, self._name = data, read, name
        self.size = _positive(shard)
        self._names: Sequence[str] = ()

    @property
    def samples(self) -> int:
        return len(self.data)

    @property
    def shards(self) -> int:
        return -(-self.samples // self.size)

    def read(self, shard: int) -> Iterator[Load]:
        first = shard * self.size
        for number in range(first, min(first + self.size, self.samples)):
            yield _Later(self, number)

    def sample(self, number: int) -> Sample:
        name = self.name(number)
        return attempted(number, name, lambda: self.data[number], self._read)

    def name(self, number: int) -> str:
        """What a sample is called."""
        return str(number)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "samples": self.samples,
            "shard": self.size,
            "contents": self._name or self._contents(),
            "read": None if self._read is None else described(self._read),
        }

    def _contents(self) -> str:
        known = getattr(self.data, "_fingerprint", None)  # Hugging Face's own
        if isinstance(known, str):
            return known
        count = self.samples
        chosen = sorted({round(k * (count - 1) / (_PROBED - 1)) for k in range(_PROBED)})
        parts = [type(self.data).__qualname__, str(count)]
        for number in chosen if count else ():
            try:
                parts.append(described(plain(self.data[number])))
            except Exception as error:  # it is counted when it is read
                parts.append(type(error).__name__)
        return _hash(parts)


@dataclass(frozen=True)
class _Later:
    """Reads a sample of some rows when it is called."""

    rows: Rows
    number: int

    def __call__(self) -> Sample:
        return self.rows.sample(self.number)


class Pictures(Rows):
    """The pictures in a folder and in the folders in it, by name.

    The label is the place of a picture's folder among those right below the top, in the order of
    their names; there is none where pictures lie at the top. What tells a folder from another are
    names, sizes and times of its files.

    Arguments:
        folder: it.
        transform: makes a Pillow picture a tensor `[C, H, W]`; by default torchvision's ImageNet
            transform (`nrm.io.imagenet`).
        labels: of a file, by its path; in place of folders.

    Raises:
        InputError: there are no pictures.
    """

    def __init__(
        self,
        folder: Path | str,
        transform: Callable[[Any], Tensor] | None = None,
        labels: Callable[[Path], int] | None = None,
        shard: int = SHARD,
    ) -> None:
        self.folder, self._transform, self._labels = Path(folder), transform, labels
        if not self.folder.is_dir():
            raise InputError(f"data {self.folder}: no such folder")
        files = sorted(
            os.path.join(place, name)
            for place, _, names in os.walk(self.folder, followlinks=True)
            for name in names
            if os.path.splitext(name)[1].lower() in _SUFFIXES and not name.startswith(".")
        )
        if not files:
            raise InputError(f"data {self.folder}: there are no pictures in it")
        super().__init__([os.path.relpath(file, self.folder) for file in files], shard=shard)
        tops = sorted({Path(file).parts[0] for file in self.data if os.sep in file})
        self.classes = tops
        """The names of the folders right below the top, of which the labels are the places."""
        self._class = {name: number for number, name in enumerate(tops)}

    def sample(self, number: int) -> Sample:
        return attempted(number, self.name(number), lambda: self._picture(number), None)

    def name(self, number: int) -> str:
        name: str = self.data[number]
        return name

    def _picture(self, number: int) -> tuple[Tensor, int | None]:
        path = self.folder / self.data[number]
        image = read_image(path)
        x = imagenet(image).x[0] if self._transform is None else self._transform(image)
        if self._labels is not None:
            return x, self._labels(path)
        return x, self._class.get(Path(self.data[number]).parts[0])

    def _contents(self) -> str:
        lines = []
        for file in self.data:
            stat = (self.folder / file).stat()
            lines.append(f"{file} {stat.st_size} {stat.st_mtime_ns}")
        lines += [described(f) for f in (self._transform, self._labels) if f is not None]
        return _hash(lines)


class Archives:
    """Tar files in webdataset's layout, each a shard: files with one name make a sample.

    Arguments:
        files: the tar files, in order.
        read: makes the mapping from suffix to bytes (`{"jpg": ..., "cls": ...}`) the input, or
            (input, label). By default a picture by the ImageNet transform, and `cls` as a number.

    Raises:
        InputError: there are none, or one does not exist.
    """

    def __init__(self, files: Sequence[Path | str], read: Read | None = None) -> None:
        self.files, self._read = [Path(file) for file in files], read
        self.size = _PIECE
        for file in self.files:
            if not file.is_file():
                raise InputError(f"data {file}: no such file")
        if not self.files:
            raise InputError("there are no tar files")

    @property
    def shards(self) -> int:
        return len(self.files)

    @property
    def samples(self) -> None:
        return None

    def read(self, shard: int) -> Iterator[Load]:
        file, first = self.files[shard], shard * _PIECE
        try:
            for place, (key, parts) in enumerate(_members(file)):
                yield Held(first + place, f"{file.name}:{key}", parts, self._read or _decoded)
        except (tarfile.TarError, OSError, EOFError) as error:
            broken = Sample(first + _PIECE - 1, file.name, error=reason(error))
            yield lambda: broken

    def sample(self, number: int) -> Sample:
        shard, place = divmod(number, _PIECE)
        for here, load in enumerate(self.read(shard)):
            if here == place:
                return load()
        raise InputError(f"there is no sample {number} in {self.files[shard]}")

    def fingerprint(self) -> dict[str, Any]:
        stats = [(file.name, file.stat()) for file in self.files]
        return {
            "kind": type(self).__name__,
            "shards": len(self.files),
            "contents": _hash([f"{n} {s.st_size} {s.st_mtime_ns}" for n, s in stats]),
            "read": None if self._read is None else described(self._read),
        }


class Stream:
    """A data set that can only be iterated over, from its beginning and always in one order.

    A worker that computes a shard reads past the samples before it. How many shards there are
    shows when the data end.

    Arguments:
        data: an iterable that begins anew whenever it is iterated over; or a function that makes
            an iterator.
        name: the data set's, and its version: nothing else tells it from others but its first
            16 items, so that one that has become longer is taken for the same.
    """

    def __init__(
        self, data: Any, read: Read | None = None, shard: int = SHARD, name: str | None = None
    ) -> None:
        self.data, self._read, self._name = data, read, name
        self.size = _positive(shard)
        self._at, self._items = 0, iter(())
        if iter(self._begin()) is data:
            raise InputError(
                "an iterator can be read once, and a run reads a data set several times. Give what "
                "it was made of, or a function that makes it."
            )

    @property
    def shards(self) -> None:
        return None

    @property
    def samples(self) -> None:
        return None

    def read(self, shard: int) -> Iterator[Load]:
        first = shard * self.size
        if self._at > first or not self._at:
            self._at, self._items = 0, iter(self._begin())
        while self._at < first:
            if next(self._items, self) is self:
                return
            self._at += 1
        for number in range(first, first + self.size):
            item = next(self._items, self)
            if item is self:
                return
            self._at += 1
            yield Held(number, str(number), item, self._read)

    def sample(self, number: int) -> Sample:
        first, place = divmod(number, self.size)
        for here, load in enumerate(self.read(first)):
            if here == place:
                return load()
        raise InputError(f"the data end before sample {number}")

    def fingerprint(self) -> dict[str, Any]:
        name = self._name
        if name is None:
            first = itertools.islice(iter(self._begin()), _PROBED)
            name = _hash([type(self.data).__qualname__, *(described(plain(x)) for x in first)])
        return {
            "kind": type(self).__name__,
            "shard": self.size,
            "contents": name,
            "read": None if self._read is None else described(self._read),
        }

    def _begin(self) -> Iterable[Any]:
        made: Iterable[Any] = self.data() if callable(self.data) else self.data
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_at": 0, "_items": iter(())}


def as_source(data: Any, read: Read | None = None, shard: int = SHARD) -> Source:
    """A data set in shards.

    Arguments:
        data: a source, as it is; a folder of pictures; tar files, or a folder of them; tensors
            or arrays `x` or `(x, labels)`; what has `len` and `[i]`; what can be iterated over.
        read: makes an item the model's input, or (input, label); of a folder of pictures, a
            Pillow picture a tensor.
        shard: how many samples are one piece.

    Raises:
        InputError: it is none of these.
    """
    if all(hasattr(data, name) for name in ("read", "fingerprint", "shards")):
        found: Source = data
        return found
    if isinstance(data, str | os.PathLike):
        return _at_path(Path(data), read, shard)
    if isinstance(data, Tensor | np.ndarray):
        data = (data,)
    if isinstance(data, tuple) and data and isinstance(data[0], Tensor | np.ndarray):
        columns = [torch.as_tensor(column) for column in data]
        if len({len(column) for column in columns}) > 1:
            raise InputError(
                f"the tensors are of {', '.join(str(len(column)) for column in columns)} samples"
            )
        made = torch.utils.data.TensorDataset(*columns)
        return Rows(made, read, shard, name=described(columns))
    iterated = isinstance(data, torch.utils.data.IterableDataset)  # some have a length all the same
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not iterated:
        return Rows(data, read, shard)
    if callable(data) or isinstance(data, Iterable):
        return Stream(data, read, shard)
    raise InputError(
        f"a data set is a folder, tensors, or something with len and [i] or to iterate over, not "
        f"a {type(data).__name__}"
    )


def _at_path(path: Path, read: Read | None, shard: int) -> Source:
    if path.is_file() and path.suffix == ".tar":
        return Archives([path], read)
    if path.is_dir():
        archives = sorted(path.glob("*.tar"))
        if archives:
            return Archives(archives, read)
    elif path.exists():
        raise InputError(f"data {path}: it is neither a folder nor a .tar file")
    return Pictures(path, read, shard=shard)


# -- what archives hold ----------------------------------------------------------------------------


def _decoded(parts: Mapping[str, bytes]) -> tuple[Tensor, int | None]:
    """The picture of a sample of an archive, and its class."""
    from PIL import Image

    found = next((parts[s[1:]] for s in sorted(_SUFFIXES) if s[1:] in parts), None)
    if found is None:
        raise InputError(f"no picture among {', '.join(parts) or 'no files'}")
    with Image.open(io.BytesIO(found)) as image:
        x = imagenet(image.convert("RGB")).x[0]
    return x, int(parts["cls"]) if "cls" in parts else None


def _members(file: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar file: files next to each other with one name up to the first dot."""
    key: str | None = None
    parts: dict[str, bytes] = {}
    with tarfile.open(file) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            here = f"{folder}/{stem}" if folder else stem
            if here != key:
                if key is not None:
                    yield key, parts
                key, parts = here, {}
            parts[suffix.lower()] = content.read()
        # The library takes an archive that was cut off for one that ends.
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the archive was cut off: what follows is missing")
    if key is not None:
        yield key, parts


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _positive(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"a shard is of a positive number of samples, not {size!r}")
    return size
