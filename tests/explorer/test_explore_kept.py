"""The explorer as one file: opened from disk, with the library's numbers in it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("fastapi", reason="the explorer's packages are not installed")
pytest.importorskip("uvicorn", reason="the explorer's packages are not installed")

from support.explored import does, looked_at, node, shown, total

import nrm
from nrm.explore.kept import keep
from nrm.explore.opened import Input, Opened
from nrm.explore.serving import running
from nrm.measure import Measure


@contextmanager
def from_disk(chromium: Any, file: Path) -> Iterator[Any]:
    """The page of a file; it complains of nothing, and asks nobody."""
    with looked_at(chromium, f"file://{file}") as page:
        page.on("request", lambda request: pytest.fail(f"{request.url} is asked for"))
        yield page


def held(file: Path) -> dict[str, Any]:
    """What a file holds."""
    found = re.search(r'id="kept">([^<]*)<', file.read_text())
    assert found is not None
    text: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return text


def drag(page: Any, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """Over the picture, from a place to another, as shares of its sides (down, across)."""
    box = page.locator(".picture").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for y, x in (begin, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1])
    page.mouse.up()


def test_a_kept_file_opens_from_disk(
    chromium: Any, opened: Opened, R: Measure, tmp_path: Path
) -> None:
    """Every single click is in it; what is not, it says. It loads nothing else."""
    two = replace(opened, inputs=opened.inputs[:2], name="</script><b>Net")
    count = keep(two, tmp_path / "kept.html", top=3)
    flows = 9  # all that are drawn
    assert count == 2 * (1 + 2 * 3 + 16 + flows)
    assert (tmp_path / "kept.html").stat().st_size < 2_000_000
    with from_disk(chromium, tmp_path / "kept.html") as page:
        assert page.locator("h1").inner_text() == "nrm </script><b>Net"
        index = int(R.channels("b")[0].abs().argmax())
        does(page, lambda: node(page, "b", index).click())
        assert total(page) == shown(R(nrm.channels("b", index)))
        does(page, lambda: page.get_by_label("given it").check())
        first = page.locator(".node[data-layer='a']").first
        value = R.channels("a", given=nrm.channels("b", index))[0].abs().max()
        assert abs(float(first.get_attribute("data-value"))) == pytest.approx(float(value))
        does(page, lambda: page.locator(".away-part").click())
        does(page, lambda: node(page, "b", index).click())
        does(page, lambda: page.get_by_label("not", exact=True).click())
        assert "start `nrm explore`" in page.locator(".note").inner_text()


def test_patches_and_flows_are_in_it(
    chromium: Any, opened: Opened, R: Measure, tmp_path: Path
) -> None:
    keep(replace(opened, inputs=opened.inputs[:1]), tmp_path / "kept.html")
    with from_disk(chromium, tmp_path / "kept.html") as page:
        flow = page.locator(".flow").last
        i, j = (int(flow.get_attribute(name)) for name in ("data-from", "data-to"))
        does(page, lambda: flow.dispatch_event("click"))
        right = R(nrm.channels("a", i), nrm.channels("b", j))
        assert total(page) == shown(right)
        assert not page.locator(".note").inner_text()
        does(page, lambda: page.get_by_role("button", name="Clear").click())
        cell = nrm.patch("input", slice(8, 16), slice(16, 24))
        does(page, lambda: drag(page, (0.27, 0.52), (0.49, 0.73)))  # as good as one of the parts
        assert total(page) == shown(R(cell))
        does(page, lambda: page.get_by_label("given it").check())
        heat = page.locator(".input h2").inner_text()
        assert heat.endswith("total 1.0000")
        drag(page, (0.1, 0.1), (0.9, 0.6))  # many parts
        page.locator(".note.error", has_text="start `nrm explore`").wait_for()
        assert total(page) == shown(R(cell))
        does(page, lambda: page.get_by_label("jointly with it").check())
        does(page, lambda: drag(page, (0.8, 0.1), (0.8, 0.1)))  # a click
        assert total(page) == shown(R(nrm.patch("input", slice(24, 32), slice(0, 8))))


def test_its_numbers_are_the_librarys(opened: Opened, R: Measure, tmp_path: Path) -> None:
    """All of one input: of each selection the total, the heatmap, the columns."""
    keep(replace(opened, inputs=opened.inputs[:1]), tmp_path / "kept.html", top=4)
    answers = held(tmp_path / "kept.html")["answers"]
    flows = patches = 0
    for key, answer in answers.items():
        columns = next(part for part in answer if part["kind"] == "columns")
        if key == "0":
            continue
        _, *parts = key.split(" ")
        sets = []
        for layer, *rest in map(json.loads, parts):
            patch = len(rest) == 1
            patches += patch
            y0, y1, x0, x1 = rest[0] if patch else [0] * 4
            sets.append(
                nrm.patch(layer, slice(y0, y1), slice(x0, x1))
                if patch
                else nrm.channels(layer, *rest[-1])
            )
        flows += len(sets) == 2
        known = float(R(*sets))
        assert columns["total"]["value"] == pytest.approx(known, abs=1e-6)
        values = R.channels("a", *sets)[0]
        for column in columns["columns"]:
            for one in column["nodes"] if column["layer"] == "a" else ():
                right = float(values[one["index"]])
                assert one["value"] == pytest.approx(right, abs=1e-6, rel=1e-4)
        found = np.frombuffer(base64.b64decode(columns["heatmap"]["values"]), "<f4")
        right = R.heatmap(*sets)[0].sum(0).flatten()
        assert torch.allclose(torch.tensor(found), right, atol=1e-6)
    assert flows == 16
    assert patches == 16


def test_what_is_given_is_as_the_server_says_it(
    chromium: Any, opened: Opened, tmp_path: Path
) -> None:
    """Divided by the page: every number, how it is written, and the line that gives it."""
    one = replace(opened, inputs=opened.inputs[:1])
    keep(one, tmp_path / "kept.html")
    seen = []
    with running(one) as address:
        for where in (address, f"file://{tmp_path / 'kept.html'}"):
            with looked_at(chromium, where) as page:
                does(page, lambda page=page: node(page, "b", 2).click())
                does(page, lambda page=page: page.get_by_label("given it").check())
                values = "all => all.map((one) => Number(one.dataset.value))"
                numbers = page.locator(".node, .flow, .total[data-value]").evaluate_all(values)
                texts = []
                for one_of in (".node >> nth=3", ".flow >> nth=5", ".head >> nth=0", ".input h2"):
                    page.locator(one_of).dispatch_event("pointerenter")
                    texts.append(page.locator("footer .which").inner_text())
                    texts.append(page.locator("footer code").inner_text())
                page.locator(".picture").hover()
                texts.append(page.locator("footer").inner_text().split("passes")[0][:-4])
                seen.append((numbers, texts))
    (numbers, texts), (kept_numbers, kept_texts) = seen
    assert kept_numbers == pytest.approx(numbers, rel=1e-9, abs=1e-12)
    assert kept_texts == texts
    assert any("given=nrm.channels('b', 2)" in text for text in texts)


def test_words_are_in_it(chromium: Any, tmp_path: Path) -> None:
    """Places of the input, also where they are no column."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(12, 2))
    ids = torch.tensor([[3, 1, 4]])
    one = Input("it", (ids,), "", words=["to", "be", "or"])
    explainer = nrm.Explainer(model.eval())
    keep(Opened("reader", "words", explainer, [one], "", place="0", axis=0), tmp_path / "kept.html")
    with from_disk(chromium, tmp_path / "kept.html") as page:
        does(page, lambda: page.locator(".place[data-place='1']").click())
        assert total(page) == shown(explainer(ids)(nrm.channels("0", 1, axis=0)))
        does(page, lambda: page.get_by_label("given it").check())
        value = float(page.locator(".place[data-place='1']").get_attribute("data-value"))
        assert value == pytest.approx(1, abs=1e-6)
