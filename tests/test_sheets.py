"""Cuts to where relevance lies, grids of pictures, and pages of one file."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nrm import sheets
from nrm.display import Table
from nrm.errors import InputError
from nrm.pages import Section, page
from nrm.sheets import Row, Tile, where


def by_trying(relevance: np.ndarray, share: float) -> tuple[int, float]:
    """The side of the smallest square that holds a share, and the most that one of it holds."""
    size = np.abs(relevance)
    high, wide = size.shape
    for side in range(max(1, min(high, wide) // sheets.LEAST), max(high, wide) + 1):
        down, across = min(side, high), min(side, wide)
        held = [
            float(size[top : top + down, left : left + across].sum())
            for top in range(high + 1 - down)
            for left in range(wide + 1 - across)
        ]
        if max(held) >= share * size.sum() * (1 - 1e-9):
            return side, max(held)
    raise AssertionError


@pytest.mark.parametrize("shape", [(9, 9), (5, 12), (16, 3), (1, 7), (24, 24)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_a_cut_is_the_smallest_square_that_holds_a_share(
    shape: tuple[int, int], share: float
) -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        relevance = random.normal(size=shape) * (random.random(shape) < 0.3)
        if not relevance.any():
            continue
        rows, columns = where(relevance, share)
        side, most = by_trying(relevance, share)
        assert rows.stop - rows.start == min(side, shape[0])
        assert columns.stop - columns.start == min(side, shape[1])
        assert np.abs(relevance[rows, columns]).sum() == pytest.approx(most)
        assert 0 <= rows.start < rows.stop <= shape[0]
        assert 0 <= columns.start < columns.stop <= shape[1]


def test_a_cut_of_one_place_of_nothing_and_of_colours() -> None:
    relevance = torch.zeros(3, 40, 32)
    assert where(relevance) == (slice(0, 40), slice(0, 32))
    relevance[:, 20, 11] = -1.0
    rows, columns = where(relevance)
    assert rows.stop - rows.start == columns.stop - columns.start == 32 // sheets.LEAST
    assert rows.start <= 20 < rows.stop
    assert columns.start <= 11 < columns.stop
    relevance[0, 20, 11], relevance[0, 0, 0] = 2.0, 0.5  # colours cancel where they are summed
    assert where(relevance)[0].start == 0
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(InputError, match="above 0 and up to 1"):
            where(relevance, share)


def drawn(figure: Figure) -> None:
    FigureCanvasAgg(figure).draw()


def test_samples_and_their_cuts_have_one_scale() -> None:
    relevance = torch.zeros(2, 1, 80, 80)
    relevance[0, 0, 10:20, 10:20], relevance[1, 0, 60:, 60:] = 1.0, -1.0
    relevance[:, 0, 12, 12] = 3.0
    rows = sheets.references(["a $x", "b"], list(torch.rand(2, 1, 80, 80)), list(relevance))
    assert [row.label for row in rows] == ["sample", "relevance", "cut", "its relevance"]
    whole, cut = rows[1].tiles, rows[3].tiles
    for one, part in zip(whole, cut, strict=True):
        assert one is not None
        assert part is not None
        assert one.limit == part.limit
        assert one.frame is not None
        assert part.relevance is not None
        assert np.asarray(part.relevance).shape == (10, 10) or part is cut[1]
    uncut = sheets.references(["a", "b"], list(torch.rand(2, 1, 80, 80)), list(relevance), None)
    assert [row.label for row in uncut] == ["sample", "relevance"]
    figure = sheets.grid(rows, "a title with a $", ["a note"])
    drawn(figure)
    assert len(figure.axes) == 8
    framed = [ax for ax in figure.axes if ax.patches]
    assert len(framed) == 4
    with pytest.raises(InputError, match="no samples"):
        sheets.grid([])


def test_clusters_are_drawn_in_their_colours() -> None:
    tile = Tile(torch.rand(1, 8, 8), title="one")
    clusters = np.array([0, 0, 1, -1])
    rows = [Row("cluster 0", [tile, None])]
    figure = sheets.clustered(rows, np.random.rand(4, 2), clusters, np.array([0, 0.1, 0.9]), "t")
    drawn(figure)
    scatter = figure.subfigs[0].axes[0]
    labels = [text.get_text() for text in scatter.get_legend().get_texts()]
    assert labels == ["in none: 1", "cluster 0: 2", "cluster 1: 1"]
    colours = [tuple(one.get_facecolor()[0][:3]) for one in scatter.collections]
    assert len(set(colours)) == 3
    drawn(sheets.clustered(rows, np.random.rand(4, 2), clusters, np.empty(0)))


def test_a_page_holds_all_and_nothing_in_it_is_markup() -> None:
    nasty = "<script>alert('x')</script>&"
    table = Table("a table", ("name",), [(nasty,)] * 100, [nasty])
    text = page(nasty, Table("", (), [("model", nasty)]), [Section(nasty, b"png", [table])])
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 105
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(data) == b"png"
    assert "http" not in text
    assert text.startswith("<!doctype html>")
    assert page("t", None, []).count("<h1>t</h1>") == 1
