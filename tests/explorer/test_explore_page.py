"""The explorer as a person and as a stranger meets it: a real browser, and requests by hand."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fastapi", reason="the explorer's packages are not installed")
pytest.importorskip("uvicorn", reason="the explorer's packages are not installed")

from PIL import Image
from support.explored import (
    SIDE,
    as_input,
    does,
    looked_at,
    node,
    photograph,
    settled,
    shown,
    total,
)

import nrm
from nrm.explore.opened import Input, Opened, Sample
from nrm.explore.serving import running
from nrm.measure import Measure

# -- what a person sees ----------------------------------------------------------------------------


def test_it_loads_with_the_librarys_numbers(page: Any, R: Measure) -> None:
    assert page.locator("h1").inner_text() == "nrm Net"
    assert total(page) == "1.0000"
    for layer in ("a", "b"):
        for index, value in enumerate(R.channels(layer)[0]):
            found = node(page, layer, index)
            assert float(found.get_attribute("data-value")) == pytest.approx(float(value), abs=1e-6)
    label = node(page, "a", 2).get_attribute("aria-label")
    assert label == f"a, channel 2, relevance {shown(R.channels('a')[0, 2])}"
    assert page.locator(".output[aria-pressed='true']").count() == 1
    assert page.locator("footer code").inner_text() == "R()"


def test_a_click_on_a_channel_conditions_everything(page: Any, R: Measure) -> None:
    does(page, lambda: node(page, "b", 2).click())
    chosen = nrm.channels("b", 2)
    assert total(page) == shown(R(chosen))
    for index, value in enumerate(R.channels("a", chosen)[0]):
        found = float(node(page, "a", index).get_attribute("data-value"))
        assert found == pytest.approx(float(value), abs=1e-6)
    page.mouse.move(640, 2)  # away from all numbers
    assert page.locator("footer code").inner_text() == "R(nrm.channels('b', 2))"
    assert "passes" in page.locator("footer .took").inner_text()
    does(page, lambda: page.get_by_label("given it").check())
    value = R.channels("a", given=chosen)[0, 1]
    assert float(node(page, "a", 1).get_attribute("data-value")) == pytest.approx(
        float(value), abs=1e-5
    )
    does(page, lambda: node(page, "b", 2).click())  # and away again
    assert total(page) == "1.0000"


def test_a_click_on_a_flow_selects_both_of_its_ends(page: Any, R: Measure) -> None:
    flow = page.locator(".flow").last  # the most relevant is drawn last, on top
    i, j = (int(flow.get_attribute(name)) for name in ("data-from", "data-to"))
    does(page, lambda: flow.dispatch_event("click"))
    assert total(page) == shown(R(nrm.channels("a", i), nrm.channels("b", j)))


def test_a_patch_of_the_picture_and_a_formula(page: Any, R: Measure) -> None:
    """Dragged; negated; joined with a channel by and, then by or; a part taken away."""
    box = page.locator(".picture").bounding_box()
    unit = box["width"] / SIDE

    def drag() -> None:
        page.mouse.move(box["x"] + 4.5 * unit, box["y"] + 8.5 * unit)
        page.mouse.down()
        page.mouse.move(box["x"] + 19.5 * unit, box["y"] + 15.5 * unit)
        page.mouse.up()

    does(page, drag)
    patch = nrm.patch("input", slice(8, 16), slice(4, 20))
    assert total(page) == shown(R(patch))
    does(page, lambda: page.get_by_label("not", exact=True).click())
    assert total(page) == shown(R(~patch))
    does(page, lambda: node(page, "a", 3).click())
    channel = nrm.channels("a", 3)
    assert total(page) == shown(R(channel & ~patch))
    does(page, lambda: page.get_by_label("parts are joined by and: change").click())
    assert total(page) == shown(R(channel | ~patch))
    does(page, lambda: page.get_by_label("take away").first.click())
    assert total(page) == shown(R(channel))


def test_targets_and_contrasts_by_name(page: Any, R: Measure) -> None:
    does(page, lambda: page.get_by_label("explained output").select_option("<b>dog</b>"))
    assert page.locator("b", has_text="dog").count() == 0  # a name is no markup
    does(page, lambda: page.get_by_label("rather than").select_option("owl"))
    does(page, lambda: node(page, "b", 1).click())
    assert total(page) == shown(R.of(nrm.Contrast(1, 2))(nrm.channels("b", 1)))
    assert "<b>dog</b> − owl" in page.locator(".asked .total").inner_text()


def test_a_search_of_flows(page: Any, R: Measure) -> None:
    page.get_by_role("button", name="Find flows").click()
    row = page.locator(".found tbody tr").first
    row.wait_for()
    every = R.joint("a", "b")[0]
    i, j = divmod(int(every.abs().argmax()), every.shape[1])
    assert row.inner_text().split()[:3] == [str(i), str(j), shown(every[i, j])]
    assert "no other is larger" in page.locator(".found h2").inner_text()
    does(page, lambda: row.get_by_role("button").click())
    assert total(page) == shown(R(nrm.channels("a", i), nrm.channels("b", j)))


def test_undo_and_a_link_that_restores_the_view(page: Any, chromium: Any, R: Measure) -> None:
    does(page, lambda: page.locator("[data-input='1']").click())
    does(page, lambda: node(page, "b", 0).click())
    one = total(page)
    does(page, lambda: node(page, "a", 1).click())
    link, both = page.url, total(page)
    other = chromium.new_page()
    other.goto(link)
    settled(other)
    assert total(other) == both
    other.close()
    does(page, lambda: page.get_by_role("button", name="Undo").click())
    assert total(page) == one
    does(page, lambda: page.keyboard.press("Control+z"))
    assert total(page) == "1.0000"


def test_two_tabs_do_not_mix(page: Any, chromium: Any, address: str, opened: Opened) -> None:
    other = chromium.new_page()
    other.goto(address)
    settled(other)
    does(other, lambda: other.locator("[data-input='2']").click())
    does(page, lambda: node(page, "b", 3).click())
    does(other, lambda: node(other, "a", 0).click())
    first, third = (opened.measure(opened.inputs[k]) for k in (0, 2))
    assert total(page) == shown(first(nrm.channels("b", 3)))
    assert total(other) == shown(third(nrm.channels("a", 0)))
    other.close()


def test_two_views_side_by_side(page: Any, R: Measure, opened: Opened) -> None:
    """Another target and another input beside the first view, each with its own numbers."""
    does(page, lambda: node(page, "b", 2).click())
    page.get_by_role("button", name="Compare").click()
    second = page.locator(".explorer").nth(1)
    second.locator("footer .took", has_text="passes").wait_for()
    assert second.locator(".formula .value").inner_text() == total(page.locator(".explorer").first)
    for view in page.locator(".explorer").all():
        assert view.get_by_label("jointly with it").is_checked()
    second.locator("[data-input='1']").click()
    second.get_by_label("explained output").select_option("owl")
    right = opened.measure(opened.inputs[1]).of(2)(nrm.channels("b", 2))
    second.locator(".formula .value", has_text=shown(right)).wait_for()
    assert total(page.locator(".explorer").first) == shown(R(nrm.channels("b", 2)))
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.get_by_role("button", name="Compare").click()
    assert page.locator(".explorer").count() == 1


def test_pictures_are_exported(page: Any) -> None:
    does(page, lambda: node(page, "b", 2).click())
    page.get_by_text("Export").click()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Picture (SVG)").click()
    drawn = Path(waiting.value.path()).read_text()
    assert drawn.startswith("<svg")
    assert "<image" in drawn
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Picture (PNG)").click()
    with Image.open(waiting.value.path()) as image:
        assert min(image.size) > 400


def test_reference_samples_of_a_channel(chromium: Any, opened: Opened) -> None:
    def references(layer: str, channel: int) -> list[Sample]:
        relevance = np.full((SIDE, SIDE), channel, dtype=np.float32)
        return [Sample(f"<i>{layer}</i>", 0.25, opened.inputs[1].pixels, relevance)]

    with running(replace(opened, references=references, referenced=["b"])) as address:
        page = chromium.new_page()
        page.goto(address)
        settled(page)
        does(page, lambda: node(page, "b", 2).click())
        page.locator(".samples figure").wait_for()
        assert page.locator("figcaption").inner_text() == "0.2500 <i>b</i>"
        does(page, lambda: node(page, "b", 2).click())
        assert page.locator(".samples figure").count() == 0
        page.close()


class Reader(nn.Module):
    """A text of three words, mixed with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(9, 4), nn.Linear(3, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = torch.relu(self.mix(x.transpose(1, 2)).transpose(1, 2))
        logits: Tensor = self.head(y.mean(1))
        return logits


@pytest.mark.parametrize("kind", ["words", "series", "graph"])
def test_a_click_on_a_word_a_step_or_a_node(chromium: Any, kind: Any) -> None:
    torch.manual_seed(2)
    ids = torch.tensor([[3, 1, 4]])
    one = Input("it", (ids,), "", words=["<b>", "or", "be"], edges=[(0, 1), (1, 2)])
    explainer = nrm.Explainer(Reader().eval())
    opened = Opened("reader", kind, explainer, [one], "", place="embedding", axis=0)
    R = explainer(ids)
    word = nrm.channels("embedding", 1, axis=0)
    with running(opened) as address:
        page = chromium.new_page()
        page.goto(address)
        settled(page)
        for place, value in enumerate(R.tokens()[0]):
            found = page.locator(f".place[data-place='{place}']")
            assert float(found.get_attribute("data-value")) == pytest.approx(float(value), abs=1e-6)
            assert found.text_content() == one.words[place]
        does(page, lambda: page.locator(".place[data-place='1']").click())
        assert total(page) == shown(R(word))
        column = page.locator(".node").first.get_attribute("data-layer")
        does(page, lambda: node(page, column, 2).click())
        assert total(page) == shown(R(word, nrm.channels(column, 2, axis=0)))
        page.close()


# -- what there is to know of numbers --------------------------------------------------------------


class Cancelling(nn.Module):
    """The first of two sums is of thousands that cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.a = nn.Linear(4, 2, bias=False), nn.ReLU()
        self.two, self.b = nn.Linear(2, 2, bias=False), nn.ReLU()
        self.head = nn.Linear(2, 2, bias=False)
        weights = ([[8000, -7999, 0, 0], [0, 0, 0.5, 0.5]], [[1, 0.1], [0.1, 1]], [[1, 1], [0, -1]])
        for layer, values in zip((self.one, self.two, self.head), weights, strict=True):
            layer.weight = nn.Parameter(torch.tensor(values, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.b(self.two(self.a(self.one(x.flatten(1))))))
        return logits


def test_cautions_stay_with_the_numbers_that_they_concern(chromium: Any) -> None:
    """In every answer, whatever is clicked or said meanwhile; in a second view too."""
    explainer = nrm.Explainer(Cancelling().eval(), nrm.composites.Everywhere(nrm.rules.Zero()))
    x = torch.ones(1, 1, 2, 2)
    one = Input("ones", (x,), "", pixels=x[0, 0].numpy())
    opened = Opened("Cancelling", "picture", explainer, [one], "", ["yes", "no"])
    with running(opened) as address, looked_at(chromium, address) as page:
        first = page.locator(".explorer").first.locator(".cautions").first
        said = "relevances at 'input' cancel"
        assert said in first.inner_text()
        does(page, lambda: node(page, "a", 0).click())
        assert said in first.inner_text()
        page.get_by_text("Export", exact=True).click()
        page.get_by_role("button", name="Script").click()
        page.locator(".note.error").wait_for()  # it was opened in Python
        assert said in first.inner_text()
        does(page, lambda: node(page, "b", 0).click())
        does(page, lambda: page.get_by_label("given it").check())
        assert said in first.inner_text()
        page.get_by_role("button", name="Compare").click()
        second = page.locator(".explorer").nth(1)
        second.locator("footer .took", has_text="passes").wait_for()
        assert said in second.locator(".cautions").first.inner_text()
        page.get_by_role("button", name="Compare").click()
        does(page, lambda: page.get_by_role("button", name="Clear").click())
        does(page, lambda: node(page, "a", 1).click())
        assert not first.is_visible()  # nothing cancels there
        does(page, lambda: page.get_by_label("explained output").select_option("no"))
        assert "rounding" not in first.inner_text()
        does(page, lambda: page.get_by_role("button", name="Clear").click())
        assert said in first.inner_text()
        page.get_by_role("button", name="Find flows").click()
        page.locator(".found tbody tr").first.wait_for()


def test_every_answer_says_what_there_is_to_know_of_it() -> None:
    """Though a measure warns of each kind once; and afterwards it still does not warn twice."""
    from nrm.explore.answers import Columns, Request
    from nrm.explore.session import Sessions

    explainer = nrm.Explainer(Cancelling().eval(), nrm.composites.Everywhere(nrm.rules.Zero()))
    one = Input("ones", (torch.ones(1, 1, 2, 2),), "", pixels=np.ones((2, 2), np.float32))
    session = Sessions(Opened("Cancelling", "picture", explainer, [one], "")).new()
    request = Request.read({"columns": ["a", "b"]})
    for _ in range(3):
        (columns,) = (
            part for part in session.answer(0, request, session.turn()) if isinstance(part, Columns)
        )
        assert len(columns.cautions) == 1
        assert "cancel" in columns.cautions[0]
        assert "simplefilter" not in columns.cautions[0]
    assert session.measure(0).forward_pass.cautions.said == {"cancels"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.measure(0).heatmap()


# -- files that are sent ---------------------------------------------------------------------------


def png(image: Image.Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of so many pixels a side in few bytes: its header says so."""
    row = zlib.compress(bytes(side + 1))
    parts = [(b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])), (b"IDAT", row)]
    found = b"\x89PNG\r\n\x1a\n"
    for kind, data in [*parts, (b"IEND", b"")]:
        found += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4)
    return found


def test_a_picture_is_sent_and_looked_at(page: Any, opened: Opened, tmp_path: Path) -> None:
    image = photograph(7)
    file = tmp_path / "mine.png"
    file.write_bytes(png(image))
    does(page, lambda: page.locator("input[type=file]").set_input_files(file))
    does(page, lambda: node(page, "b", 2).click())
    own = opened.measure(as_input(image, "mine"))
    assert total(page) == shown(own(nrm.channels("b", 2)))


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("no.png", b"this is no picture", "no picture"),
        ("cut.png", png(photograph(1))[:200], "cannot be read"),
        ("bomb.png", bomb(60_000), "pixels are too many"),
        ("wide.png", bomb(8_000), "8000 x 8000 pixels are too many"),
        ("large.png", bytes(2**24 + 1), "At most 16 MB"),
    ],
    ids=["text", "cut", "bomb", "wide", "large"],
)
def test_wrong_files_are_refused_with_a_sentence(
    page: Any, tmp_path: Path, name: str, data: bytes, why: str
) -> None:
    (tmp_path / name).write_bytes(data)
    page.locator("input[type=file]").set_input_files(tmp_path / name)
    page.locator(".note", has_text=why).wait_for()
    assert total(page) == "1.0000"  # what was seen stays


# -- in a notebook ---------------------------------------------------------------------------------

NOTEBOOK = """<!DOCTYPE html><div id="cell"></div><script type="module">
{module}
const listeners = [];
window.model = {{
  on: (name, hear) => listeners.push(hear),
  send: (content) => window.kernel(JSON.stringify(content)),
}};
window.hear = (message) => listeners.forEach((hear) => hear(message));
const widget = {{ render }};
widget.render({{ model: window.model, el: document.getElementById("cell") }});
</script>"""


def test_the_widget_shows_the_same_page(
    chromium: Any, opened: Opened, R: Measure, tmp_path: Path
) -> None:
    """The module that notebooks get, with the kernel's answers; the notebook itself is played."""
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    from nrm.explore.session import Sessions
    from nrm.explore.widget import Explorer, answers

    session = Sessions(opened).new()
    page = chromium.new_page()
    heard: list[dict[str, Any]] = []
    page.expose_function("kernel", lambda text: heard.append(json.loads(text)))
    file = tmp_path / "notebook.html"
    module = Explorer._esm.replace("export default { render };", "")
    file.write_text(NOTEBOOK.format(module=module))
    page.goto(f"file://{file}")

    def answer_all() -> None:
        for _ in range(200):
            page.wait_for_timeout(10)
            while heard:
                content = heard.pop(0)
                for part in answers(opened, session, content):
                    page.evaluate("(m) => window.hear(m)", {"id": content["id"], **part})
            if page.locator("footer .took", has_text="passes").count() and not heard:
                return

    answer_all()
    assert total(page) == "1.0000"
    node(page, "b", 2).click()
    page.wait_for_timeout(50)
    answer_all()
    assert total(page) == shown(R(nrm.channels("b", 2)))
    page.get_by_role("button", name="Undo").click()
    page.wait_for_timeout(50)
    answer_all()
    assert total(page) == "1.0000"
    assert "#" not in page.url
    page.close()


def test_the_widget_refuses_with_a_sentence(opened: Opened) -> None:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    from nrm.explore.session import Sessions
    from nrm.explore.widget import answers

    session = Sessions(opened).new()
    for content in ({"what": "view", "request": 3}, {"what": "script", "request": {}}):
        *_, wrong, over = answers(opened, session, content)
        assert set(wrong) == {"error"}
        assert over == {"over": True}


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Opened:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from nrm.cli import opening

    return opening.digits(lambda text: None, epochs=1)


def test_an_exported_script_gives_the_number_when_it_is_run(chromium: Any, digits: Opened) -> None:
    with running(digits) as address:
        page = chromium.new_page()
        page.goto(address)
        settled(page)
        does(page, lambda: node(page, "relu2", 3).click())
        page.get_by_text("Export").click()
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Script (Python)").click()
        script = Path(waiting.value.path()).read_text()
        seen = total(page)
        columns = page.locator(".node[data-layer='relu1']").evaluate_all(
            "nodes => nodes.map((node) => [node.dataset.index, Number(node.dataset.value)])"
        )
        page.close()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"R\(selection\) = (\S+)", done.stdout)
    assert found is not None
    assert f"{float(found[1]):.4f}" == seen
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("relu1 ")]
    assert [row[0] for row in rows] == [index for index, _ in columns]
    for (_, value), (_, number) in zip(rows, columns, strict=True):
        assert float(value) == pytest.approx(number, abs=2e-6)
