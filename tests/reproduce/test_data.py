"""What experiments read: idx files, the parts of data sets, photographs, series, molecules."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="nrm[reproduce] is not installed")

from nrm.errors import InputError
from nrm_reproduce import data
from nrm_reproduce.data import (
    Task,
    all_events,
    choose_photos,
    load_flat,
    load_molecules,
    make_series,
    middle,
    read_idx,
)


def idx(path, magic, shape, content=None):
    head = struct.pack(f">{1 + len(shape)}I", magic, *shape)
    body = bytes(int(np.prod(shape))) if content is None else content
    raw = head + body
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["pictures", "pictures.gz"])
def test_an_idx_file_is_read_whole(tmp_path, name):
    content = bytes(range(2 * 3 * 3))
    found = read_idx(idx(tmp_path / name, 0x803, (2, 3, 3), content), (2, 3, 3))
    assert found.dtype == torch.uint8
    assert found.flatten().tolist() == list(content)


def test_a_damaged_idx_file_is_refused_by_name(tmp_path):
    file = tmp_path / "labels"
    idx(file, 0x803, (4,))
    with pytest.raises(InputError, match=r"labels: begins with 00000803.*00000801"):
        read_idx(file, (4,))
    idx(file, 0x801, (4,), content=b"abc")
    with pytest.raises(InputError, match=r"labels: 4 in 11 bytes; MNIST's is 4 in 12"):
        read_idx(file, (4,))
    idx(file, 0x801, (5,))
    with pytest.raises(InputError, match="5 in 13 bytes"):
        read_idx(file, (4,))
    file.write_bytes(b"")
    with pytest.raises(InputError, match="begins with nothing"):
        read_idx(file, (4,))
    file.write_bytes(b"\x00\x00\x08\x01\x00")
    with pytest.raises(InputError, match="5 bytes"):
        read_idx(file, (4,))
    packed = idx(tmp_path / "labels.gz", 0x801, (4,))
    packed.write_bytes(packed.read_bytes()[:-6])
    with pytest.raises(InputError, match="not a whole gzip file"):
        read_idx(packed, (4,))


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_flat(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.gz.*download=True"):
        load_flat(str(tmp_path))


def test_labels_that_no_digit_has(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PARTS", {"train": ("t", 2), "test": ("t", 2)})
    idx(tmp_path / "t-images-idx3-ubyte", 0x803, (2, 28, 28))
    idx(tmp_path / "t-labels-idx1-ubyte", 0x801, (2,), bytes([3, 10]))
    with pytest.raises(InputError, match="a label is 10"):
        load_flat(str(tmp_path))


def test_the_parts_share_no_digit(digits):
    assert [len(digits.train), len(digits.held_out), len(digits.test)] == [1300, 100, 397]
    parts = [{x.numpy().tobytes() for x in p.x} for p in (digits.train, digits.held_out)]
    assert not parts[0] & parts[1]
    assert float(digits.train.x.min()) == 0
    assert float(digits.train.x.max()) == 1
    assert torch.equal(load_flat("digits").test.x, digits.test.x)


def test_mnist_is_read(shared):
    mnist = load_flat(str(shared))
    assert [len(mnist.train), len(mnist.held_out), len(mnist.test)] == [59_000, 1_000, 10_000]
    assert mnist.test.y[:5].tolist() == [7, 2, 1, 0, 4]  # as published
    assert mnist.test.x.shape == (10_000, 784)
    assert (float(mnist.test.x.min()), float(mnist.test.x.max())) == (0, 1)


def test_pictures_are_drawn_by_the_seed(tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"{name}.JPEG").touch()
    (tmp_path / "classes.txt").touch()
    few, more = choose_photos(tmp_path, 3, 0), choose_photos(tmp_path, 5, 0)
    assert few == sorted(few)
    assert len(few) == 3
    assert set(few) < set(more)
    assert choose_photos(tmp_path, 3, 1) != few
    assert len(choose_photos(tmp_path, 100, 0)) == 8


def test_a_folder_without_pictures_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no folder with pictures"):
            choose_photos(folder, 3, 0)


def test_series_set_their_label_at_the_label_step():
    for task in Task:
        series = make_series(task, 7, 200, seed=3)
        state = series.x.argmax(-1).gather(1, series.label_step[:, None])[:, 0]
        assert torch.equal(state, series.label + (1 if task is Task.EVENT else 0))
        assert torch.equal(series.x.sum(-1), torch.ones(200, 7, dtype=torch.float64))
        assert torch.equal(series.x, make_series(task, 7, 200, seed=3).x)
        assert not torch.equal(series.x, make_series(task, 7, 200, seed=4).x)
    assert (make_series(Task.POSITION, 7, 5, 0).label_step == middle(7)).all()
    events = all_events(7)
    assert len(events.x.flatten(1).unique(dim=0)) == len(events) == 14
    assert (events.x[..., 1:].sum((1, 2)) == 1).all()


def test_rings(shared):
    molecules = load_molecules(shared / "graphs")
    first = molecules[0]
    assert len(first.rings) == 5
    for molecule in molecules:
        # As many rings as bonds beyond those of a tree; every atom of a ring has two bonds in it.
        assert len(molecule.rings) == len(molecule.bonds) - molecule.size + 1
        for ring in molecule.rings:
            inside = molecule.adjacency[list(ring)][:, list(ring)].sum(1) - 1
            assert (inside == 2).all()


def test_a_folder_without_molecules_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no mutag\.json"):
        load_molecules(tmp_path)
