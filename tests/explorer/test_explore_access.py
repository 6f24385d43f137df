"""The explorer for everybody: by keyboard, with contrast, on small screens, with many channels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("fastapi", reason="the explorer's packages are not installed")
pytest.importorskip("uvicorn", reason="the explorer's packages are not installed")

from support.explored import does, looked_at, looks, node, settled, shown, total

import nrm
from nrm.explore.answers import Request
from nrm.explore.opened import Input, Opened
from nrm.explore.serving import running
from nrm.measure import Measure


def words() -> Opened:
    """A text of three words."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(12, 2))
    ids = torch.tensor([[3, 1, 4]])
    one = Input("it", (ids,), "", words=["to", "be", "or"])
    explainer = nrm.Explainer(model.eval())
    return Opened("reader", "words", explainer, [one], "", ["no", "yes"], place="0", axis=0)


def everything(page: Any) -> None:
    """A view with all there is: a formula, what is searched, open menus, and an error."""
    does(page, lambda: page.locator(".node").nth(1).click())
    does(page, lambda: page.locator(".node").last.click())
    does(page, lambda: page.get_by_label("not", exact=True).first.click())
    page.get_by_role("button", name="Find flows").click()
    page.locator(".found tbody tr, .note.error").first.wait_for()
    page.get_by_text("Columns", exact=True).click()
    page.get_by_text("Export", exact=True).click()
    page.mouse.move(640, 2)


def test_the_keyboard_is_enough(page: Any, R: Measure) -> None:
    order = R.channels("a")[0].abs().argsort(descending=True).tolist()
    node(page, "a", order[0]).focus()
    page.keyboard.press("ArrowDown")
    does(page, lambda: page.keyboard.press("Enter"))
    assert total(page) == shown(R(nrm.channels("a", order[1])))
    focused = page.evaluate("document.activeElement.dataset.index")
    assert focused == str(order[1])  # it stays where it was
    page.locator(".picture").focus()
    page.keyboard.press("ArrowRight")
    does(page, lambda: page.keyboard.press("Enter"))
    assert "input:[" in page.locator(".formula").inner_text()


def test_everything_is_reached_by_tab_and_seen_when_it_is(page: Any) -> None:
    everything(page)
    unseen, ends = [], 0  # from where it is to the end of the page, and all of it once more
    while ends < 2:
        page.keyboard.press("Tab")
        found = looks(page, "reached")
        ends += found is None
        if found:
            unseen.append(found)
    assert unseen == []
    assert looks(page, "missed") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_contrast_of_texts(chromium: Any, address: str, width: int) -> None:
    """Every text stands out from what it is drawn on by 4.5 at least (WCAG 2.1, AA)."""
    with looked_at(chromium, address, width) as page:
        everything(page)
        found = looks(page, "contrasts")
        assert len(found) > 40
        assert [one for one in found if one[0] < 4.5] == []


def test_contrast_of_words(chromium: Any) -> None:
    """Dark on pale relevance, white on strong one."""
    with running(words()) as address, looked_at(chromium, address) as page:
        found = {text: ratio for ratio, text in looks(page, "contrasts")}
        assert {"to", "be", "or"} <= set(found)
        assert [text for text, ratio in found.items() if ratio < 4.5] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(chromium: Any, address: str, width: int) -> None:
    """The checks of axe-core, of pictures and of words."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )
    with looked_at(chromium, address, width) as page:
        everything(page)
        results = axe.Axe().run(page)
        assert results.violations_count == 0, results.generate_report()
    with running(words()) as other, looked_at(chromium, other, width) as page:
        results = axe.Axe().run(page)
        assert results.violations_count == 0, results.generate_report()


def test_a_small_screen_needs_no_scrolling_sideways(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


# -- many channels ---------------------------------------------------------------------------------

CHANNELS = 512


@pytest.fixture(scope="module")
def wide() -> Opened:
    """Five layers of 512 channels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for k in range(5):
        layers += [nn.Conv2d(CHANNELS if k else 3, CHANNELS, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 3))
    x = torch.rand(1, 3, 2, 2)
    one = Input("colours", (x,), "", pixels=x[0].permute(1, 2, 0).numpy())
    return Opened("Wide", "picture", nrm.Explainer(model.eval()), [one], "", ["a", "b", "c"])


def test_all_of_512_channels_are_drawn_and_the_page_goes_on(chromium: Any, wide: Opened) -> None:
    """Of one answer, in six parts, the columns are drawn once, and not all in one go."""
    R = wide.measure(wide.inputs[0])
    with running(wide) as address, looked_at(chromium, address) as page:
        page.get_by_text("Columns", exact=True).click()
        page.get_by_label("channels of a column").fill(str(CHANNELS))
        does(page, lambda: page.get_by_label("channels of a column").press("Enter"))
        page.get_by_text("Columns", exact=True).click()  # and the menu closes
        columns = page.locator(".head").count()
        assert columns == 4
        drawn(page, columns * CHANNELS)
        layer = page.locator(".head .total").last.get_attribute("data-layer")
        values = R.channels(layer)[0]
        looks(page, "watch")
        chosen = int(values.abs().argmax())
        before = int(page.locator("#explorer").get_attribute("data-ready"))
        node(page, layer, chosen).click()
        settled(page, before + 1, 120)
        assert total(page) == shown(R(nrm.channels(layer, chosen)))
        drawn(page, columns * CHANNELS)
        assert page.locator(f".node[data-layer='{layer}']").count() == CHANNELS
        assert page.evaluate("drawings") == 1
        assert page.locator(".flow").count() <= (columns - 1) * 48
        frames = page.evaluate("frames")
        frames = frames[frames.index(min(frames)) :]
        steps = [b - a for a, b in itertools.pairwise(frames)]
        assert max(steps) <= columns * CHANNELS / 4  # the page had other frames in between
        assert frames[-1] == columns * CHANNELS


def drawn(page: Any, count: int) -> None:
    """Wait until so many nodes are there."""
    for _ in range(3000):
        if page.locator(".node").count() == count:
            return
        page.wait_for_timeout(10)
    raise AssertionError(f"{page.locator('.node').count()} nodes, not {count}")


def test_a_column_shows_no_more_than_it_can(opened: Opened) -> None:
    with pytest.raises(nrm.errors.QueryError, match="1 to 512 parts"):
        Request.read({"top": CHANNELS + 1})
