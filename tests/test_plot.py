"""Pictures of relevance: what is drawn, and on which scale."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from nrm import plot
from nrm.coloured import FOR, Line
from nrm.errors import InputError


def drawn(relevance: torch.Tensor, **options: object) -> np.ndarray:
    ax = Figure().add_subplot()
    plot.heatmap(relevance, ax, **options)  # type: ignore[arg-type]
    return np.asarray(ax.images[0].get_array())


def test_colours_are_summed() -> None:
    relevance = torch.randn(3, 5, 7, dtype=torch.float64)
    np.testing.assert_allclose(plot.by_pixel(relevance), relevance.sum(0).numpy())
    np.testing.assert_allclose(plot.by_pixel(relevance.sum(0)), relevance.sum(0).numpy())
    np.testing.assert_allclose(plot.by_pixel(relevance[None]), relevance.sum(0).numpy())
    with pytest.raises(ValueError, match="not of shape"):
        plot.by_pixel(torch.zeros(2, 3, 4, 5))


def test_red_for_blue_against_and_white_for_nothing() -> None:
    red, white, blue = drawn(torch.tensor([[1.0, 0.0, -1.0]]))[0]
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert white.min() > 0.95


def test_the_scale_is_symmetric_and_not_decided_by_one_pixel() -> None:
    relevance = torch.ones(100, 100)
    relevance[0, 0] = -1000
    assert plot.scale(relevance) == 1.0
    relevance = torch.rand(50, 50)
    np.testing.assert_allclose(plot.scale(relevance), plot.scale(-relevance))


@pytest.mark.parametrize("relevance", [torch.zeros(4, 4), torch.eye(100) * (torch.arange(100) < 1)])
def test_the_scale_is_never_zero(relevance: torch.Tensor) -> None:
    assert plot.scale(relevance) == 1.0
    assert np.isfinite(drawn(relevance)).all()


def test_outlines_darken_what_they_lie_under() -> None:
    picture = np.zeros((80, 80, 3))
    picture[:, 40:] = 1
    plain = drawn(torch.zeros(80, 80))
    outlined = drawn(torch.zeros(80, 80), picture=picture)
    assert (outlined[:, 39:41] < plain[:, 39:41]).all()
    np.testing.assert_array_equal(outlined[:, :30], plain[:, :30])


def test_pictures_of_few_pixels_are_outlined_by_a_line() -> None:
    picture = np.zeros((8, 8))
    picture[2:6, 2:6] = 1
    ax = Figure().add_subplot()
    plot.heatmap(torch.zeros(8, 8), ax, picture=picture)
    assert len(ax.collections) == 1
    np.testing.assert_array_equal(ax.images[0].get_array(), drawn(torch.zeros(8, 8)))


def test_pictures_are_read_as_they_are_meant() -> None:
    """`[3, H, W]` as the model takes it, `[H, W, 3]` as it is shown, and others."""
    picture = np.random.default_rng(0).random((70, 80, 3))
    relevance = torch.randn(3, 70, 80)
    expected = drawn(relevance, picture=picture)
    assert (expected != drawn(relevance)).any()
    first = torch.as_tensor(picture).movedim(2, 0)
    for same in (
        first,
        first[None],
        first.requires_grad_(),
        first.detach().numpy(),
        torch.as_tensor(picture),
        picture[None],
        np.concatenate([picture, np.ones((70, 80, 1))], 2),
        first * 5 - 2,  # normalised: outlines are the same
    ):
        np.testing.assert_allclose(drawn(relevance, picture=same), expected, atol=1e-6)
    grey = picture.mean(2)
    of_grey = drawn(relevance, picture=grey)
    for same in (grey, torch.as_tensor(grey), grey[None], grey[..., None], grey[None, None]):
        np.testing.assert_allclose(drawn(relevance, picture=same), of_grey, atol=1e-6)
    np.testing.assert_allclose(drawn(relevance[None], picture=picture), expected)
    figure = plot.single(relevance, picture=first)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), expected, atol=1e-6)


def test_pictures_of_pillow_are_read_too() -> None:
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 4, (70, 80, 3), dtype=np.uint8) * 60
    relevance = torch.randn(70, 80)
    image = pillow.fromarray(pixels)
    expected = drawn(relevance, picture=pixels / 255)
    palette = image.quantize(64, dither=0)
    assert palette.mode == "P"
    for same in (pixels, image, palette, image.convert("RGBA")):
        np.testing.assert_allclose(drawn(relevance, picture=same), expected, atol=1e-6)
    hidden = image.convert("RGBA")
    hidden.putalpha(0)  # all of it transparent: white, without outlines
    np.testing.assert_allclose(drawn(relevance, picture=hidden), drawn(relevance))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((70, 70)), "the picture has 70 x 70 pixels, the relevance 9 x 9"),
        (torch.zeros(3, 9, 8), "9 x 8"),
        (np.zeros((2, 9, 9)), "not of shape"),
        (np.zeros((2, 3, 9, 9)), "of one sample"),
        (np.zeros(9), "not of shape"),
        (np.full((9, 9), np.nan), "NaN"),
        (np.zeros((0, 0)), "empty"),
        (np.array([["a"]]), "numbers"),
    ],
)
def test_what_is_no_picture_of_the_relevance_is_refused(picture: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plot.single(torch.randn(9, 9), picture=picture)


@pytest.mark.parametrize(
    "relevance", [torch.zeros(2, 3, 4, 5), torch.zeros(5), torch.full((3, 3), torch.nan)]
)
def test_what_is_no_relevance_is_refused(relevance: torch.Tensor) -> None:
    with pytest.raises(InputError):
        plot.single(relevance)


def test_photos_beyond_zero_and_one_are_stretched() -> None:
    ax = Figure().add_subplot()
    plot.photo(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), ax)
    np.testing.assert_allclose(ax.images[0].get_array(), [[0, 0.5], [1, 0.75]])
    plot.photo(np.array([[0, 255]], dtype=np.uint8), ax)
    np.testing.assert_allclose(ax.images[1].get_array(), [[0, 1]])


MATHEMATICS = (r"$\bad{$", "$x^2$", r"a \$ b", "100 % _of_ ^it", "{", r"\frac")


@pytest.mark.parametrize("text", MATHEMATICS)
def test_texts_are_drawn_as_they_are(text: str, tmp_path: Path) -> None:
    """Whatever a class or a layer is called: no text is read as a formula."""
    panel = plot.Panel(text, torch.randn(9, 9))
    figure = plot.overview(np.eye(9), panel, [[panel]], [text], [text, text], (text, text))
    figures = figure, plot.single(torch.randn(9, 9), title=text, ends=(text, text))
    for place, one in enumerate(figures):
        texts = [t for t in one.findobj(Text) if text in t.get_text()]
        assert len(texts) >= 2
        assert not any(t.get_parse_math() for t in texts)
        plot.save(one, tmp_path / f"{place}.png")


def test_endless_and_invisible_texts_do_not_widen_a_picture(tmp_path: Path) -> None:
    plot.save(plot.single(torch.randn(9, 9), title="long " * 10_000), tmp_path / "long.png")
    assert imread(tmp_path / "long.png").shape[1] < 4000
    figure = plot.single(torch.randn(9, 9), title="one\x00\x1b[2J\ntwo")
    assert figure.axes[0].get_title() == "one\ufffd\ufffd[2J\ntwo"


@pytest.mark.parametrize(("flows", "rows"), [(0, 0), (1, 1), (3, 2), (6, 3)])
def test_an_overview_has_every_panel(flows: int, rows: int, tmp_path: Path) -> None:
    def panel(name: str) -> plot.Panel:
        return plot.Panel(name, torch.randn(3, 70, 70))

    columns = [[panel(f"{c}, {r}") for r in range(rows)] for c in range(flows)]
    names = [f"layer {r}" for r in range(rows)]
    picture = np.random.default_rng(0).random((70, 70, 3))
    figure = plot.overview(picture, panel("all"), columns, names, ["headline", "fact"])
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["input", "all", *(p.title for column in columns for p in column)]
    plot.save(figure, tmp_path / "overview.png")
    assert imread(tmp_path / "overview.png").std() > 0


@pytest.mark.parametrize("ends", [plot.ENDS, ("raises the logit", "lowers the logit")])
def test_no_text_of_an_overview_overlaps_another(ends: tuple[str, str]) -> None:
    facts = ["class 3", "class 3, probability 0.1030, logit -0.85", "a:model, GammaFlat(0.25)", "x"]
    panel = plot.Panel("LRP heatmap", torch.randn(8, 8))
    figure = plot.overview(np.zeros((8, 8, 3)), panel, facts=facts, ends=ends)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    shown = {t.get_text() for t in texts}
    assert {*ends, "no relevance"} <= shown
    boxes = [t.get_window_extent(renderer) for t in texts]
    for (a, one), (b, other) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not one.overlaps(other), (a.get_text(), b.get_text())


def test_tiny_pictures_are_enlarged(tmp_path: Path) -> None:
    plot.save_photo(np.eye(10), tmp_path / "grey.png")
    assert imread(tmp_path / "grey.png").shape[:2] == (230, 230)
    picture = np.random.default_rng(0).random((224, 224, 3))
    plot.save_photo(picture, tmp_path / "colour.png")
    pixels = imread(tmp_path / "colour.png")[..., :3]
    np.testing.assert_allclose(pixels, picture, atol=1 / 254)


def test_a_line_of_pixels_is_not_enlarged_without_end(tmp_path: Path) -> None:
    plot.save_photo(np.zeros((1, 60_000)), tmp_path / "line.png")
    assert imread(tmp_path / "line.png").shape[:2] == (8, 480_000)


def test_words_in_colour() -> None:
    """Each has its place and its colour; what is too long goes on in the next row."""
    words = ["one", " $two", "\n", " three"]
    lines = [Line("+1.5", words, [1.0, -0.5, 0.0, 0.25], mark=3), Line("", words[:1], [0.0])]
    figure = plot.text(lines, title="of $ words", columns=10)
    FigureCanvasAgg(figure).draw()
    ax = figure.axes[0]
    drawn = [text for text in ax.texts if text.get_text()]
    assert [text.get_text() for text in drawn] == ["+1.5", "one", " $two", "⏎", " three", "one"]
    assert [text.get_position()[1] for text in drawn] == [0.5, 0.5, 0.5, 0.5, 1.5, 2.5]
    colours = [box.get_facecolor()[:3] for box in ax.patches]
    assert colours[1] == pytest.approx([channel / 255 for channel in FOR])
    assert colours[2][2] > colours[2][0]
    assert colours[3] == pytest.approx((1, 1, 1))
    framed = [box for box in ax.patches if box.get_linewidth() > 0]
    assert len(framed) == 1
    assert plot.text([]) is not None


def test_circuits_are_drawn_with_their_nodes_by_level(tmp_path: Path) -> None:
    from nrm import Circuit

    senders, receivers = ("embed", "a0.h0", "m0"), ("output", "a0.h0", "m0")
    scores = torch.tensor([[0.5, 0.3, -0.2], [0.3, 0.0, 0.0], [0.1, 0.2, 0.0]])
    found = Circuit(receivers, senders, scores, scores != 0, 1.0, 0.9, 2)
    ax = Figure().add_subplot()
    plot.circuit(found, ax)
    height = {text.get_text(): text.get_position()[1] for text in ax.texts if text.get_text()}
    assert height == {"embed": 0, "a0.h0": 1, "m0": 2, "output": 3}
    arrows = [text for text in ax.texts if not text.get_text()]
    assert len(arrows) == 6
    assert ax.get_title() == "6 edges, which keep 1.00 of the relevance"
    plot.circuit(found, ax := Figure().add_subplot(), most=2, title="$two$")
    assert sum(not text.get_text() for text in ax.texts) == 2
    none = Circuit(receivers, senders, scores, scores > 9, 0.0, 0.9, None)
    with pytest.raises(InputError, match="no edges to draw"):
        plot.circuit(none, ax)
