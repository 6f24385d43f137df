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


def drawn(relevance: torch.Tensor, **options: object) -> np.ndarray:
    ax = Figure().add_subplot()
    plot.heatmap(relevance, ax, **options)  # type: ignore[arg-type]
    return np.asarray(ax.images[0].get_array())


def test_colours_are_summed() -> None:
    relevance = torch.randn(3, 5, 7, dtype=torch.float64)
    np.testing.assert_allclose(plot.by_pixel(relevance), relevance.sum(0).numpy())
    np.testing.assert_allclose(plot.by_pixel(relevance.sum(0)), relevance.sum(0).numpy())
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


def test_an_outline_of_another_size_is_left_out() -> None:
    relevance = torch.randn(9, 9)
    np.testing.assert_array_equal(
        drawn(relevance, picture=np.random.default_rng(0).random((70, 70))), drawn(relevance)
    )


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
