"""What a person sees of every public object: short at a prompt, escaped in a page, with units."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import nrm
from nrm.display import Table

EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """The tags of a page that are closed, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.opened

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.opened.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.fixture(scope="module")
def explainer() -> nrm.Explainer:
    torch.manual_seed(0)
    model = nn.Sequential()
    for k in range(40):
        model.add_module(f"conv{k}", nn.Conv2d(3, 3, 3, padding=1))
        model.add_module(f"relu{k}", nn.ReLU())
    model.add_module("flat", nn.Flatten())
    model.add_module("last", nn.Linear(108, 4))
    return nrm.Explainer(model.eval())


@pytest.fixture(scope="module")
def R(explainer: nrm.Explainer) -> nrm.Measure:
    return explainer(torch.rand(2, 3, 6, 6), target=[1, 3])


@pytest.fixture(scope="module")
def shown(explainer: nrm.Explainer, R: nrm.Measure) -> dict[str, object]:
    a, b = nrm.channels("conv3", 1), nrm.neurons(EVIL)
    return {
        "explainer": explainer,
        "measure": R,
        "listing": explainer.layers(torch.rand(2, 3, 6, 6)),
        "flows": R.top("conv39", "conv38", k=50),
        "diagnostics": R.diagnostics(),
        "proper form": R.proper_form(),
        "plan": R.plan(a ^ nrm.channels("relu20", 0)),
        "clusters": nrm.clusters(R, "conv3", 3),
        "set": a | b,
        "formula": ~a & b,
        "condition": nrm.Condition(a, b, given=~a, within="conv5", normalized=False),
    }


def test_everything_is_short_at_a_prompt_and_escaped_in_a_page(shown: dict[str, object]) -> None:
    for name, thing in shown.items():
        text = repr(thing)
        assert len(text.splitlines()) <= 20, name
        assert " object at 0x" not in text, name
        page = Page(thing._repr_html_())  # type: ignore[attr-defined]
        assert "script" not in page.tags, name
        assert page.text.strip(), name


def test_what_is_said_of_each(shown: dict[str, object]) -> None:
    said = {name: repr(thing) for name, thing in shown.items()}
    assert said["set"] == f"channels('conv3', 1) | neurons({EVIL!r})"
    assert said["condition"].startswith("Condition(channels('conv3', 1), neurons(")
    assert "within=neurons('conv5'), normalized=False" in said["condition"]
    assert said["measure"] == "Measure(target [1, 3], 83 variables, batch 2)"
    assert "R.scale" in str(shown["measure"])
    assert "2 x 3 x 6 x 6" in str(shown["measure"])
    assert "GammaFlat" in str(shown["measure"])
    assert "Sequential" in said["explainer"]
    assert "suggested composite" in said["explainer"]
    assert "what suits the model" in str(shown["explainer"])
    assert "83 layers, 83 of them cuts" in said["listing"]
    assert "3 x 6 x 6" in said["listing"]
    assert "73 rows are not shown" in said["listing"]
    assert str(shown["listing"]).count("\n") == 84
    assert said["flows"].splitlines()[1].split() == ["conv39", "conv38", "relevance", "share"]
    assert "nothing beyond them" in said["flows"]
    assert "3 clusters of 'conv3', 6 x 6 positions in each of 2 samples" in said["clusters"]
    assert said["plan"].startswith("Plan(2 sets in 2 channels (of 4), ")
    assert "worst cut" in said["diagnostics"]
    assert said["proper form"].startswith("layer 82: total 1.000000")


def test_figures_in_tables_are_those_of_the_objects(shown: dict[str, object]) -> None:
    flows = shown["flows"]
    first = flows.table().rows[0]  # type: ignore[attr-defined]
    (one, *_) = flows  # type: ignore[misc]
    assert first[1:3] == tuple(str(part) for part in one.parts.values())
    assert float(first[3]) == pytest.approx(one.relevance, rel=1e-3)
    assert float(first[4].rstrip("%")) == pytest.approx(100 * one.share, abs=1e-2)
    clusters = shown["clusters"]
    counts = [int(row[1]) for row in clusters.table().rows]  # type: ignore[attr-defined]
    assert sum(counts) == clusters.labels.numel()  # type: ignore[attr-defined]
    plan = shown["plan"]
    rows = plan.table().rows  # type: ignore[attr-defined]
    assert {name: int(count) for name, count in rows} == plan.messages  # type: ignore[attr-defined]


def test_tables_as_text_pages_and_for_rich() -> None:
    rows = [(f"row {k}", "[bold]&<b>") for k in range(100)]
    table = Table("Title <i>", ("name", "what"), rows, ["A note & more."])
    lines = table.text(10).splitlines()
    assert lines[:3] == ["Title <i>", "name    what", "row 0   [bold]&<b>"]
    assert lines[7] == "…"
    assert lines[8] == "row 95  [bold]&<b>"
    assert lines[-2:] == ["(90 rows are not shown: print it)", "A note & more."]
    assert len(table.text().splitlines()) == 103
    page = Page(table.html())
    assert page.tags == {"div", "p", "b", "table", "thead", "tr", "th", "tbody", "td"}
    assert "[bold]&<b>" in page.text
    assert "Title <i>" in page.text
    console = pytest.importorskip("rich.console").Console(record=True, width=80)
    with console.capture() as captured:
        console.print(table.rich())
    assert "[bold]&<b>" in captured.get()
    assert "A note & more." in captured.get()
    assert Table("Nothing").text() == "Nothing"
    assert "<table" not in Table("Nothing").html()


def test_rich_prints_what_is_shown(shown: dict[str, object]) -> None:
    console = pytest.importorskip("rich.console").Console(width=200)
    with console.capture() as captured:
        console.print(shown["listing"])
    assert "conv39" in captured.get()
