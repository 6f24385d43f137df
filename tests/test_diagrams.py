"""Diagrams: what is drawn has the size, the place and the colour of what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from nrm import diagrams, plot
from nrm.errors import InputError

TABLES = {
    ("a", "b"): torch.tensor([[[0.5, 0.0, -0.2], [0.1, 0.4, 0.2]]]),
}


class Fixed:
    """A measure with numbers by hand."""

    def channels(self, layer: str, *sets: Any, given: Any = None) -> torch.Tensor:
        table = TABLES["a", "b"]
        return table.sum(2) if layer == "a" else table.sum(1)

    def joint(self, a: str, b: str, *more: Any, given: Any = None) -> torch.Tensor:
        return TABLES[a, b]


def axes() -> Any:
    return Figure().add_subplot()


def test_columns_have_the_most_relevant_channels_first_and_flows_as_wide_as_they_are() -> None:
    ax = axes()
    plot.columns(Fixed(), ["a", "b"], ax)
    texts = {text.get_text(): text.get_position() for text in ax.texts}
    assert texts["1"][1] in (0, 1)
    bars = [patch for patch in ax.patches if hasattr(patch, "get_width")]
    a, b = TABLES["a", "b"][0].sum(1), TABLES["a", "b"][0].sum(0)
    right = sorted(map(abs, [*a.tolist(), *b.tolist()]), reverse=True)
    assert sorted((abs(bar.get_width()) for bar in bars), reverse=True) == pytest.approx(
        [0.42 * value / right[0] for value in right], abs=1e-6
    )
    flows = [patch for patch in ax.patches if not hasattr(patch, "get_width")]
    widths = []
    for flow in flows:
        ends = flow.get_path().vertices
        widths.append(abs(ends[3, 1] - ends[4, 1]) * (1 if _is(flow, diagrams.RED) else -1))
    largest = max(TABLES["a", "b"].abs()[0].sum(0).max(), TABLES["a", "b"].abs()[0].sum(1).max())
    values = [value * 0.8 / float(largest) for value in TABLES["a", "b"].flatten().tolist()]
    assert sorted(widths) == pytest.approx(sorted(value for value in values if value), abs=1e-6)


def _is(patch: Any, colour: str) -> bool:
    return bool(to_hex(patch.get_facecolor()) == colour)


def test_columns_add_the_others_up() -> None:
    ax = axes()
    plot.columns(Fixed(), ["a", "b"], ax, top=1)
    assert {"+1", "+2"} <= {text.get_text() for text in ax.texts}
    for wrong in ({"layers": []}, {"layers": ["a"], "top": 0}):
        with pytest.raises(InputError):
            plot.columns(Fixed(), ax=ax, **wrong)  # type: ignore[arg-type]


def test_a_joint_matrix_is_symmetric_about_zero() -> None:
    ax = axes()
    colours = plot.joint(TABLES["a", "b"], ax, names=("$a", "b"))
    assert (colours.norm.vmin, colours.norm.vmax) == (-0.5, 0.5)
    assert np.allclose(ax.images[0].get_array(), TABLES["a", "b"][0])
    assert ax.get_ylabel() == "$a"
    for wrong in (torch.zeros(3), torch.zeros(2, 3, 3), torch.tensor([[torch.nan]])):
        with pytest.raises(InputError):
            plot.joint(wrong, ax)


def test_steps_are_bars_or_lines() -> None:
    ax = axes()
    plot.over_time(torch.tensor([[0.5, -0.25, 0.0]]), ax, mark=1)
    assert [bar.get_height() for bar in ax.patches] == [0.5, -0.25, 0.0]
    assert [_is(bar, diagrams.RED) for bar in ax.patches[:2]] == [True, False]
    ax = axes()
    plot.over_time({"one": [1.0, 2.0], "two": np.array([0.0, -1.0])}, ax)
    assert [list(line.get_ydata()) for line in ax.lines[1:]] == [[1, 2], [0, -1]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    with pytest.raises(InputError, match="one number for each place"):
        plot.over_time(torch.zeros(2, 2), ax)


def test_a_graph_is_laid_out_by_its_distances() -> None:
    """A path is straight, and a ring round; and the same every time."""
    path = [(k, k + 1) for k in range(5)]
    found = diagrams.laid_out(6, path)
    far = np.linalg.norm(found[:, None] - found[None], axis=-1)
    right = np.abs(np.arange(6)[:, None] - np.arange(6)[None])
    assert np.abs(far - right).max() < 0.25
    ring = diagrams.laid_out(6, [*path, (5, 0)])
    sides = [np.linalg.norm(ring[k] - ring[(k + 1) % 6]) for k in range(6)]
    assert max(sides) - min(sides) < 0.05
    assert np.array_equal(found, diagrams.laid_out(6, path))
    assert diagrams.laid_out(1, []).shape == (1, 2)
    assert np.isfinite(diagrams.laid_out(4, [(0, 1)])).all()  # two nodes that nothing reaches
    with pytest.raises(InputError, match="nodes 0 to 2"):
        diagrams.laid_out(3, [(0, 3)])


def test_walks_are_drawn_over_a_graph() -> None:
    ax = axes()
    walks = [((0, 1, 2), 0.5), ((1, 1, 1), -0.25)]
    places = plot.graph([0.5, 0.0, -0.5], [(0, 1), (1, 2)], ax, marks="ABC", walks=walks)
    assert [text.get_text() for text in ax.texts] == ["A", "B", "C"]
    drawn = [line for line in ax.lines if to_hex(line.get_color()) in (diagrams.RED, diagrams.BLUE)]
    wide = [line.get_linewidth() for line in drawn if len(line.get_xdata()) == 3]
    assert wide == [pytest.approx(4.0), pytest.approx(0.6 + 3.4 / 2)]
    rings = [line for line in drawn if len(line.get_xdata()) == 1]
    assert len(rings) == 1
    assert (rings[0].get_xdata()[0], rings[0].get_ydata()[0]) == pytest.approx(tuple(places[1]))


def test_the_code_of_the_page_runs() -> None:
    page = Path(__file__).parents[1] / "docs" / "plot.md"
    told: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(block, told)
    assert len(told["figure"].axes) == 7  # with a colour bar
