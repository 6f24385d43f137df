"""The explorer on five networks, wide and narrow: that it is right, and what it looks like.

`NRM_PICTURES=docs/pictures .venv/bin/pytest tests/explorer/test_explore_pictures.py` takes the
screenshots anew; without it they go into a folder of the test. Look at them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the explorer's packages are not installed")
pytest.importorskip("uvicorn", reason="the explorer's packages are not installed")
pytest.importorskip("typer", reason="the command line's packages are not installed")

from PIL import Image
from support.explored import looks, settled

import nrm
from benchmarks.explore import DATA, NETWORKS, examples
from nrm.explore.opened import Opened
from nrm.explore.serving import running

WIDTHS = {"wide": (1280, 820), "narrow": (390, 844)}
CLICKED = {
    "digits": ("node", "relu2", 3),
    "squeezenet": ("node", "features.5.squeeze_activation", 7),
    "sentences": ("place", "similarity.encoder.embeddings.word_embeddings", 4),
    "series": ("place", "input", 4),
    "molecules": ("place", "features", 11),
}
"""Of each network what is clicked: a channel, or a place of the input; its layer and number."""
NEEDED = {"squeezenet": "squeezenet", "molecules": "graphs"}
"""Folders of data without which a network cannot be opened."""
WHERE: dict[str, Callable[[], Opened]] = NETWORKS | examples()


def opened(name: str) -> Opened:
    """A network, or a skip with the reason why there is none."""
    folder = NEEDED.get(name)
    if folder is not None and not (DATA / folder).exists():
        pytest.skip(f"there is no folder {folder} with its data")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torchvision's compiled operators", RuntimeWarning)
            return WHERE[name]()
    except (ModuleNotFoundError, nrm.errors.InputError) as error:
        pytest.skip(f"it needs a package that is not installed: {error}")


@pytest.mark.parametrize("name", CLICKED)
def test_it_is_right_at_both_widths(chromium: Any, name: str, tmp_path: Path) -> None:
    shown = opened(name)
    kind, layer, index = CLICKED[name]
    R = shown.measure(shown.inputs[0])
    total = float(R(nrm.channels(layer, index, axis=shown.axis if kind == "place" else None)))
    folder = Path(os.environ.get("NRM_PICTURES", tmp_path))
    with running(shown) as address:
        for width, (across, down) in WIDTHS.items():
            page = chromium.new_page(viewport={"width": across, "height": down})
            wrong: list[str] = []
            page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            page.goto(address)
            settled(page, 1, 120)
            nothing_is_cut(page, across)
            check_columns(page, R)
            clicked = page.locator(
                f".node[data-layer='{layer}'][data-index='{index}']"
                if kind == "node"
                else f".place[data-place='{index}']"
            )
            clicked.click()
            settled(page, 2, 120)
            value = float(page.locator(".formula").get_attribute("data-value"))
            assert value == pytest.approx(total, abs=1e-5)
            nothing_is_cut(page, across)
            page.evaluate("scrollTo(0, 0)")
            page.mouse.move(across / 2, 3)
            keep(page.screenshot(), folder / f"explore_{name}_{width}.png")
            page.close()
            assert wrong == []


def check_columns(page: Any, R: Any) -> None:
    """The heatmap is there; the columns' totals are the library's."""
    assert page.locator("canvas.heatmap, .place").count() >= 1
    assert page.locator(".node").count() >= 12
    for head in page.locator(".head .total").all():
        value = head.get_attribute("data-value")
        if value is None:
            assert "walks visit several" in head.text_content()  # they have no sum
            continue
        right = float(R.marginal(head.get_attribute("data-layer")).double().sum())
        assert float(value) == pytest.approx(right, abs=1e-5)
    values = [float(one.get_attribute("data-value")) for one in page.locator(".place").all()]
    if values:
        label = page.locator(".input h2").inner_text().rpartition("total ")[2]
        assert sum(values) == pytest.approx(float(label.replace("−", "-")), abs=1e-3)


def nothing_is_cut(page: Any, width: int) -> None:
    """Nothing has to be scrolled to sideways but the columns; no text is drawn over another."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert looks(page, "outside", width) == []
    assert looks(page, "overlapping") == []


def keep(png: bytes, file: Path) -> None:
    """A screenshot, without what it says of transparency."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(BytesIO(png)) as seen:
        seen.convert("RGB").save(file, optimize=True)
