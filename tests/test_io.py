"""Files: whole or not at all; pictures are read as they are meant, and within bounds."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="the command line's packages are not installed")

from PIL import Image

from nrm import io
from nrm.errors import InputError
from nrm.evaluation.store import Store

RAMP = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(4, 256)
EIGHT = np.rint(RAMP / 65535 * 255).astype(int)


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    told: list[str] = []
    image = io.read_image(str(path), told.append)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int), told


def write_png(
    path: Path, width: int, height: int, bits: int, kind: int, rows: bytes, transparent: bytes = b""
) -> None:
    """By hand: Pillow writes neither 16 bits of colour nor of alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    length = len(rows) // height
    lines = b"".join(b"\0" + rows[k * length : (k + 1) * length] for k in range(height))
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    hidden = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(lines))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + hidden + data + chunk(b"IEND", b"")
    )


def grey_png(path: Path) -> None:
    Image.fromarray(RAMP).save(path, "PNG")


def grey_tiff(path: Path) -> None:
    Image.fromarray(RAMP).save(path, "TIFF")


def floats(path: Path) -> None:
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(path, "TIFF")


def pgm(path: Path) -> None:
    path.write_bytes(b"P5 256 4 65535\n" + RAMP.astype(">u2").tobytes())


def pgm_of_twelve_bits(path: Path) -> None:
    path.write_bytes(b"P5 256 4 4095\n" + np.rint(RAMP / 65535 * 4095).astype(">u2").tobytes())


def colours(path: Path) -> None:
    write_png(path, 256, 4, 16, 2, np.stack([RAMP] * 3, -1).astype(">u2").tobytes())


def grey_with_alpha(path: Path) -> None:
    write_png(path, 256, 4, 16, 4, np.stack([RAMP, RAMP * 0 + 65535], -1).astype(">u2").tobytes())


@pytest.mark.parametrize(
    "write", [grey_png, grey_tiff, floats, pgm, pgm_of_twelve_bits, colours, grey_with_alpha]
)
def test_more_than_eight_bits_become_eight(write: Any, tmp_path: Path) -> None:
    """A ramp from black to white stays one, instead of being white from 1/256 on."""
    write(tmp_path / "ramp")
    pixels, told = read(tmp_path / "ramp")
    assert pixels.shape == (4, 256, 3)
    assert abs(pixels - EIGHT[..., None]).max() <= 1
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert told == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.int32), "32 bits"),
        (RAMP.astype(np.float32), "from 0"),
        (np.float32([[0, np.nan]]), "from 0"),
        (np.float32([[-0.5, 0.5]]), "from 0"),
        (np.float32([[0, np.inf]]), "from 0"),
    ],
)
def test_numbers_that_say_not_where_white_is(
    values: np.ndarray, message: str, tmp_path: Path
) -> None:
    Image.fromarray(values).save(tmp_path / "odd.tif")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "odd.tif")


def test_hidden_colours_are_not_seen(tmp_path: Path) -> None:
    """Under alpha 0 every colour is white; under 128 of 255 it is half white."""
    seen = []
    for hidden in (0, 90, 255):
        pixels = np.full((2, 3, 4), hidden, dtype=np.uint8)
        pixels[:, 1] = (200, 0, 100, 128)
        pixels[:, 2] = (200, 0, 100, 255)
        pixels[:, 0, 3] = 0
        for name, options in (("a.png", {}), ("a.webp", {"lossless": True, "exact": True})):
            Image.fromarray(pixels).save(tmp_path / name, **options)
            found, told = read(tmp_path / name)
            assert len(told) == 1
            assert "laid over white" in told[0]
            seen.append(found)
    expected = [[255, 255, 255], [227, 127, 177], [200, 0, 100]]
    for found in seen:
        assert abs(found[0] - expected).max() <= 1


@pytest.mark.parametrize("kind", ["LA", "P", "L", "RGB", "I;16"])
def test_transparency_of_every_kind(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    dark = Image.new("RGB", (4, 2), (9, 9, 9))
    dark.paste((120, 120, 120), (2, 0, 4, 2))
    if kind == "LA":
        image = dark.convert("LA")
        image.putalpha(Image.fromarray(np.uint8([[0, 0, 255, 255]] * 2)))
        image.save(path)
    elif kind == "P":
        image = dark.quantize(2)
        image.save(path, transparency=image.getpixel((0, 0)))
    elif kind == "I;16":
        rows = np.uint16([[9 * 257] * 2 + [120 * 257] * 2] * 2).astype(">u2").tobytes()
        write_png(path, 4, 2, 16, 0, rows, struct.pack(">H", 9 * 257))
    else:
        image = dark.convert(kind)
        image.save(path, transparency=image.getpixel((0, 0)))
    pixels, told = read(path)
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == 120).all()
    assert len(told) == 1


def test_alpha_that_hides_nothing_is_not_mentioned(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 3), (1, 2, 3, 255)).save(tmp_path / "a.png")
    pixels, told = read(tmp_path / "a.png")
    assert (pixels == (1, 2, 3)).all()
    assert told == []


def test_the_first_of_several_pictures(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    for name in ("a.gif", "a.tif"):
        pixels, told = read(tmp_path / name)
        assert (pixels == (255, 0, 0)).all()
        assert told == [f"{tmp_path / name} holds 3 pictures: this is the first of them"]


def test_pictures_stand_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4), "white")
    image.paste("black", (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "a.png", exif=exif)
    pixels, _ = read(tmp_path / "a.png")
    assert pixels.shape == (6, 4, 3)
    assert (pixels[:3] == 0).all()
    assert (pixels[3:] == 255).all()


def test_other_modes_mean_what_they_meant(tmp_path: Path) -> None:
    for mode, colour, name in (
        ("1", 1, "a.png"),
        ("CMYK", (0, 0, 0, 0), "a.jpg"),
        ("YCbCr", (255, 128, 128), "a.jpg"),
        ("L", 255, "b.png"),
    ):
        Image.new(mode, (8, 8), colour).save(tmp_path / name)
        assert (read(tmp_path / name)[0] == 255).all(), mode


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM" + b"\0" * 60]
)
def test_what_is_no_picture(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match="picture"):
        read(tmp_path / "a")


def test_places_where_no_picture_is(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name, message in ((".", "a folder"), ("none", "no such file"), ("loop", "no such file")):
        with pytest.raises(InputError, match=message):
            read(tmp_path / name)


# -- bounds --------------------------------------------------------------------------------------


def test_more_pixels_than_can_be_held(tmp_path: Path) -> None:
    write_png(tmp_path / "bomb.png", 60_000, 60_000, 1, 0, b"")
    with pytest.raises(InputError, match="exceeds limit"):
        read(tmp_path / "bomb.png")


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 9_000)])
def test_long_pictures_are_not_resized_as_a_whole(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.png"
    Image.new("L", size, 200).save(path)
    assert path.stat().st_size < 1000
    made = []
    resize = Image.Image.resize

    def spy(image: Image.Image, size: tuple[int, int], *others: Any) -> Image.Image:
        made.append(size)
        return resize(image, size, *others)

    monkeypatch.setattr(Image.Image, "resize", spy)
    found = io.imagenet(io.read_image(path))
    assert found.x.shape == (1, 3, 224, 224)
    np.testing.assert_allclose(found.shown, 200 / 255, atol=1e-6)
    width, height = io.resized(*size, 224)
    assert width * height > io.MOST_PIXELS
    assert made == [(224, 224)]


@pytest.mark.parametrize("size", [(300, 500), (641, 480), (257, 1000), (30, 31)])
@pytest.mark.parametrize("side", [224, 299])
def test_the_crop_alone_has_the_same_pixels(
    size: tuple[int, int], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last of 8 bits: the same weights, in another place of the arithmetic."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    whole = io.imagenet(image, side)
    monkeypatch.setattr(io, "MOST_PIXELS", 0)
    torch.testing.assert_close(
        torch.as_tensor(io.imagenet(image, side).shown),
        torch.as_tensor(whole.shown), rtol=0, atol=1.01 / 255,
    )  # fmt: skip


def test_inputs_have_a_largest_side() -> None:
    with pytest.raises(InputError, match="size 100000: the largest is 4096"):
        io.imagenet(Image.new("RGB", (9, 9)), 100_000)


# -- writing -------------------------------------------------------------------------------------


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.txt"
    io.write_text(file, "é")
    assert file.read_text(encoding="utf-8") == "é"

    def stopped() -> None:
        with io.written_at_once(file) as beside:
            beside.write_text("half")
            assert beside.parent == file.parent
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert file.read_text(encoding="utf-8") == "é"
    assert [path.name for path in file.parent.iterdir()] == ["a.txt"]
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode  # others may read it as any file


def test_a_file_written_twice_at_once(tmp_path: Path) -> None:
    file = tmp_path / ("n" * 255)
    with io.written_at_once(file) as one, io.written_at_once(file) as two:
        one.write_text("one")
        two.write_text("two")
    assert file.read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 1


def test_files_in_folders_move_at_once(tmp_path: Path) -> None:
    def fill() -> None:
        with io.filled_at_once(tmp_path / "out", last="z") as folder:
            (folder / "part").mkdir()
            for name in ("z", "part/z", "part/a"):
                (folder / name).write_text("new")

    fill()
    old = tmp_path / "out" / "part" / "old"
    old.write_text("old")
    fill()
    assert old.read_text() == "old"
    assert sorted(f.name for f in (tmp_path / "out").rglob("*")) == ["a", "old", "part", "z", "z"]

    (tmp_path / "out" / "z").write_text("old")
    for file in (tmp_path / "out" / "part").iterdir():
        file.unlink()
    (tmp_path / "out" / "part").rmdir()
    (tmp_path / "out" / "part").write_text("a file")
    with pytest.raises(InputError, match="part is a file, not a folder"):
        fill()
    assert (tmp_path / "out" / "z").read_text() == "old"
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["out", "part", "z"]


# -- what is kept --------------------------------------------------------------------------------


def test_what_is_kept_is_found_once_and_comes_back_alike(tmp_path: Path) -> None:
    asked: list[int] = []

    def find() -> dict[str, Any]:
        asked.append(1)
        return {"a": (1 / 3, None), "b": [1e-300, "é"]}

    store = Store(tmp_path, {"k": (1,)})
    first = store.once("key", find)
    assert first == {"a": [1 / 3, None], "b": [1e-300, "é"]}
    assert Store(tmp_path, {"k": (1,)}).once("key", find) == first
    assert len(asked) == 1
    with pytest.raises(InputError, match=r"other settings: k \[1\] instead of \[2\]"):
        Store(tmp_path, {"k": (2,)})


def test_what_was_changed_is_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    file = tmp_path / "key.json"
    for damage in ("", "{", "{}", "[1]", '{"digest": "0", "value": 3}'):
        assert store.once("key", lambda: {"x": 0.5}) == {"x": 0.5}
        file.write_text(damage)
        assert store.read("key") is None
    store.write("key", {"x": 0.5})
    file.write_text(file.read_text().replace("0.5", "0.6"))
    assert store.once("key", lambda: {"x": 0.5}) == {"x": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        store.write("key", float("nan"))
    assert store.read("key") == {"x": 0.5}
