"""Greys of more than eight bits, where the file says what is white."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the command line's packages are not installed")

from nrm import io


def test_greys_of_tiff(tmp_path: Path) -> None:
    """White may be the smallest number, which Pillow minds for 8 bits alone."""

    def write(name: str, photometric: int, values: list[int]) -> Path:
        data = np.array(values, dtype="<u2").tobytes()
        tags = [(256, 4), (257, 1), (258, 16), (259, 1), (262, photometric), (273, 200), (277, 1),
                (278, 1), (279, len(data))]  # fmt: skip
        head = b"II*\0" + struct.pack("<IH", 8, len(tags))
        head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        (tmp_path / name).write_bytes((head + b"\0" * 4).ljust(200, b"\0") + data)
        return tmp_path / name

    for photometric, expected in ((1, [0, 128, 255, 1]), (0, [255, 127, 0, 254])):
        path = write("a.tif", photometric, [0, 32896, 65535, 257])
        assert np.asarray(io.read_image(path))[0, :, 0].tolist() == expected
