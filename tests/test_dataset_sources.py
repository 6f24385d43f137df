"""Data sets as numbered samples: what is read, what is skipped, what tells them apart."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="nrm[dataset] is not installed")
pytest.importorskip("PIL", reason="nrm[cli] is not installed")

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from nrm.dataset import Archives, Pictures, Rows, Sample, Source, Stream, as_source
from nrm.dataset.sources import _members
from nrm.errors import InputError

X = torch.arange(7 * 4.0).view(7, 4)
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0])


def small(image: Any) -> Tensor:
    """A picture as a tensor `[3, 2, 2]`."""
    return torch.from_numpy(np.array(image.resize((2, 2)))).permute(2, 0, 1).float() / 255


def pixels(parts: dict[str, bytes]) -> tuple[Tensor, int]:
    """A sample of an archive."""
    with Image.open(io.BytesIO(parts["png"])) as image:
        return small(image.convert("RGB")), int(parts["cls"])


class Mapped(Dataset[Any]):
    """A data set of which one item cannot be read."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 3:
            raise OSError("a bad sector")
        return X[index], int(Y[index])


class Streamed(IterableDataset[Any]):
    """A data set that can only be iterated over."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(X, Y, strict=True)


def _png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 10, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def _all(source: Source) -> list[Sample]:
    found = []
    for shard in range(10 if source.shards is None else source.shards):
        found += [load() for load in source.read(shard)]
    return found


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        (X.numpy(), Y.tolist()),
        list(zip(X, Y.tolist(), strict=True)),
        [{"image": x.numpy(), "label": np.int64(y)} for x, y in zip(X, Y.tolist(), strict=True)],
        Streamed(),
        Streamed().__iter__,
    ],
    ids=["tensors", "arrays", "list", "mappings", "iterable", "function"],
)
def test_all_kinds_give_the_same_samples(data: Any) -> None:
    source = as_source(data, shard=3)
    for _ in range(2):  # and again, from the beginning
        samples = _all(source)
        assert [sample.number for sample in samples] == list(range(7))
        assert [sample.label for sample in samples] == Y.tolist()
        assert torch.equal(torch.stack([sample.inputs[0] for sample in samples]), X)
    assert torch.equal(source.sample(4).inputs[0], X[4])
    assert torch.equal(source.sample(1).inputs[0], X[1])
    assert [load().number for load in source.read(2)] == [6]
    if not callable(data):
        sent = pickle.loads(pickle.dumps(source))
        assert [load().number for load in sent.read(1)] == [3, 4, 5]


def test_inputs_without_labels_and_several_inputs() -> None:
    assert [sample.label for sample in _all(as_source(X))] == [None] * 7
    sample = as_source((X, X + 1, Y)).sample(2)
    assert torch.equal(sample.inputs[1], X[2] + 1)
    assert sample.label == 2
    sample = as_source([(x, x + 1) for x in X]).sample(1)
    assert len(sample.inputs) == 2
    assert sample.label is None


def test_what_cannot_be_read_is_a_sample_with_a_reason() -> None:
    samples = _all(as_source(Mapped()))
    assert [sample.number for sample in samples if sample.error] == [3]
    assert samples[3].error == "OSError: a bad sector"
    bad = torch.tensor([1.0, torch.nan])
    (sample,) = _all(as_source([(bad, 1)]))
    assert sample.error is not None
    assert "NaN" in sample.error
    for item, text in ((("word", 1), "read="), ((X[0], 0.5), "input"), ({"image": None}, "None")):
        (sample,) = _all(as_source([item]))
        assert sample.error is not None
        assert text in sample.error


def test_read_makes_items_inputs() -> None:
    source = as_source([(x, y) for x, y in zip(X, Y, strict=True)], read=lambda item: item[0] * 2)
    assert torch.equal(source.sample(1).inputs[0], X[1] * 2)
    assert source.sample(1).label is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of two classes, one of them no picture."""
    for name, colour in (("cats/b", 200), ("cats/a", 100), ("dogs/c", 50)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(_png(colour))
    (tmp_path / "dogs" / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "dogs" / "notes.txt").write_text("ignored")
    return tmp_path


def test_a_folder_of_pictures(folder: Path) -> None:
    source = Pictures(folder, small)
    samples = _all(source)
    assert [sample.name for sample in samples] == [
        "cats/a.png", "cats/b.png", "dogs/bad.jpg", "dogs/c.png",
    ]  # fmt: skip
    assert [sample.label for sample in samples] == [0, 0, None, 1]
    assert samples[2].error is not None
    assert "not a picture" in samples[2].error
    assert float(samples[3].inputs[0][0, 0, 0]) == pytest.approx(50 / 255)
    assert Pictures(folder).sample(0).inputs[0].shape == (3, 224, 224)
    labelled = Pictures(folder, small, labels=lambda path: len(path.stem))
    assert labelled.sample(0).label == 1


def test_archives(tmp_path: Path) -> None:
    for number, names in enumerate((("a", "b"), ("c",))):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for name in names:
                for suffix, content in (("png", _png(100 + number)), ("cls", b"7")):
                    info = tarfile.TarInfo(f"x/{name}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    source = as_source(tmp_path, pixels)
    assert isinstance(source, Archives)
    samples = _all(source)
    assert [sample.number for sample in samples] == [0, 1, 2**32]
    assert [sample.name for sample in samples] == ["0.tar:x/a", "0.tar:x/b", "1.tar:x/c"]
    assert [sample.label for sample in samples] == [7, 7, 7]
    assert torch.equal(source.sample(2**32).inputs[0], samples[2].inputs[0])
    assert as_source(tmp_path).sample(1).inputs[0].shape == (3, 224, 224)
    # Cut off in the middle: what can be read is, and the rest is said.
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:1200])
    for size in (len(whole), 2560, 2400, 2048, 1200, 512, 100):
        (tmp_path / "0.tar").write_bytes(whole[:size])
        samples = [load() for load in as_source(tmp_path, pixels).read(0)]
        bad = [sample for sample in samples if sample.error is not None]
        if size == len(whole):
            assert not bad
        else:
            assert bad[-1].name == "0.tar"


def test_hugging_face() -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets are not installed")
    found = datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()})
    source = as_source(found.with_format("torch"), shard=4)
    assert isinstance(source, Rows)
    assert torch.equal(source.sample(5).inputs[0], X[5])
    assert source.sample(5).label == 2
    other = datasets.Dataset.from_dict({"x": (X + 1).tolist(), "label": Y.tolist()})
    assert source.fingerprint() != as_source(other.with_format("torch"), shard=4).fingerprint()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left open
def test_archives_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for number in range(5):
            sample = {"png": _png(40 * number), "cls": str(number), "seg.txt": f"at {number}"}
            writer.write({"__key__": f"sub/{number:03}", **sample})
    theirs = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False))
    ours = list(_members(tmp_path / "0.tar"))
    assert [key for key, _ in ours] == [sample["__key__"] for sample in theirs]
    for (_, parts), sample in zip(ours, theirs, strict=True):
        assert parts == {name: sample[name] for name in parts}
        assert len(parts) == 3
    assert [sample.label for sample in _all(as_source(tmp_path, pixels))] == [0, 1, 2, 3, 4]


def test_fingerprints_tell_data_sets_apart(folder: Path) -> None:
    def mark(data: Any, shard: int = 3) -> Any:
        return as_source(data, shard=shard).fingerprint()

    assert mark((X, Y)) == mark((X.clone(), Y.clone()))
    changed = X.clone()
    changed[3, 2] += 1e-6
    assert mark((X, Y)) != mark((changed, Y))
    assert mark((X, Y)) != mark((X, Y), shard=4)
    assert mark(Mapped()) == mark(Mapped())
    assert mark(list(X)) != mark(list(X + 1))
    assert mark(Streamed()) == mark(Streamed())
    pictures = mark(folder)
    assert pictures == mark(folder)
    os.utime(folder / "cats" / "a.png", (1, 1))
    assert mark(folder) != pictures
    named = Rows(list(X), name="digits 1.0").fingerprint()
    assert named == Rows(list(X + 1), name="digits 1.0").fingerprint()


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    for data, text in (
        (tmp_path / "file.txt", "neither a folder"),
        (tmp_path / "missing", "no such folder"),
        (tmp_path / "empty", "no pictures"),
        (iter([1, 2]), "read once"),
        ((X, Y[:3]), "7, 3 samples"),
        (3, "a data set is"),
    ):
        with pytest.raises(InputError, match=text):
            as_source(data)
    for size in (0, True, 1.5):
        with pytest.raises(InputError, match="positive number"):
            as_source(X, shard=size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no such file"):
        Archives([tmp_path / "none.tar"])
    with pytest.raises(InputError, match="end before sample"):
        Stream(list(X)).sample(9)


class Counted(Streamed):
    """One that says how long it is, as some do, and has no items by number."""

    def __len__(self) -> int:
        return len(X)


def test_what_is_iterated_over_may_have_a_length() -> None:
    source = as_source(Counted(), shard=4)
    assert isinstance(source, Stream)
    assert [load().error for load in source.read(0)] == [None] * 4


def test_streams_are_told_apart_by_what_follows_the_first_item() -> None:
    other = X.clone()
    other[3] += 1
    assert Stream(iter_of(X)).fingerprint() == Stream(iter_of(X.clone())).fingerprint()
    assert Stream(iter_of(X)).fingerprint() != Stream(iter_of(other)).fingerprint()


def iter_of(x: Tensor) -> Any:
    return partial(iter, list(x))
