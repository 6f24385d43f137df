"""Columns by clusters and hidden states, and outputs at places, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fastapi", reason="the explorer's packages are not installed")
pytest.importorskip("uvicorn", reason="the explorer's packages are not installed")

from support.explored import does, make_opened, node, settled, shown, total

import nrm
from nrm.explore.kept import keep
from nrm.explore.opened import Input, Opened
from nrm.explore.serving import running


def test_a_column_of_clusters(chromium: Any) -> None:
    """Chosen in the menu, as many as wanted; clicked, searched through, and in the link."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    opened = make_opened()
    R = opened.measure(opened.inputs[0])
    with running(opened) as address:
        page = chromium.new_page()
        page.goto(address)
        settled(page)
        page.get_by_text("Columns", exact=True).click()
        does(page, lambda: page.get_by_label("b is divided into").select_option("clusters"))
        does(
            page,
            lambda: page.get_by_label("clusters of b").fill("3") or page.keyboard.press("Enter"),
        )
        page.get_by_text("Columns", exact=True).click()
        found = nrm.clusters(R, "b", 3)
        for k in range(3):
            value = float(node(page, "b", k).get_attribute("data-value"))
            assert value == pytest.approx(float(R(found[k])), abs=1e-6)
        node(page, "b", 2).hover()
        assert page.locator("canvas.where").get_attribute("width") == "8"  # where it lies
        does(page, lambda: node(page, "b", 2).click())
        page.mouse.move(640, 2)
        assert page.locator("canvas.where").count() == 0
        assert total(page) == shown(R(found[2]))
        assert page.locator("footer code").inner_text() == "R(nrm.clusters(R, 'b', 3)[2])"
        does(page, lambda: node(page, "a", 4).click())
        assert total(page) == shown(R(found[2], nrm.channels("a", 4)))
        other = chromium.new_page()
        other.goto(page.url)
        settled(other)
        assert total(other) == total(page)
        assert other.locator(".formula sub", has_text="b:cluster 2").count() == 1
        other.close()
        does(page, lambda: page.get_by_role("button", name="Clear").click())
        page.get_by_role("button", name="Find flows").click()
        row = page.locator(".found tbody tr").first
        row.wait_for()
        every = R.joint("a", found.sets)[0]
        i, j = divmod(int(every.abs().argmax()), every.shape[1])
        assert row.inner_text().split()[:4] == [str(i), "cluster", str(j), shown(every[i, j])]
        does(page, lambda: row.get_by_role("button").click())
        assert total(page) == shown(R(nrm.channels("a", i), found[j]))
        page.close()


class Remembers(nn.Module):
    """A series of three steps, read by a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


def test_hidden_states_also_in_a_kept_file(chromium: Any, tmp_path: Path) -> None:
    """They have no sum, and it is said; the units of single ones are a column of their own."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 2)
    explainer = nrm.Explainer(Remembers().eval())
    opened = Opened("GRU", "series", explainer, [Input("it", (x,), "")], "", axis=0)
    R = explainer(x)
    state = nrm.neurons("rnn.h_l0[1]")

    def look(page: Any) -> None:
        settled(page)
        head = page.locator(".total[data-layer='rnn.h_l0']")
        assert head.text_content() == "3 steps · walks visit several"
        for step in range(3):
            value = float(node(page, "rnn.h_l0", step).get_attribute("data-value"))
            assert value == pytest.approx(float(R(f"rnn.h_l0[{step}]")), abs=1e-6)
        does(page, lambda: node(page, "rnn.h_l0", 1).click())
        assert total(page) == shown(R(state))

    with running(opened) as address:
        page = chromium.new_page()
        page.goto(address)
        look(page)
        page.get_by_text("Columns", exact=True).click()
        page.get_by_text("single states").click()
        does(page, lambda: page.locator("input[value='rnn.h_l0[0]']").check())
        page.get_by_text("Columns", exact=True).click()
        does(page, lambda: node(page, "rnn.h_l0[0]", 2).click())
        assert total(page) == shown(R(state, nrm.channels("rnn.h_l0[0]", 2)))
        page.close()
    keep(opened, tmp_path / "kept.html")
    page = chromium.new_page()
    page.goto(f"file://{tmp_path / 'kept.html'}")
    look(page)
    page.close()


class Speaker(nn.Module):
    """Logits of many words at each of three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = (
            nn.Embedding(9, 4),
            nn.Linear(3, 3),
            nn.Linear(4, 1200),
        )

    def forward(self, ids: Tensor) -> Tensor:
        y = torch.relu(self.mix(self.embedding(ids).transpose(1, 2)).transpose(1, 2))
        logits: Tensor = self.head(y)
        return logits


def test_a_word_of_many_at_a_position(chromium: Any) -> None:
    """The position by its word, the output by name out of more than fit a list."""
    torch.manual_seed(2)
    ids = torch.tensor([[3, 1, 4]])
    one = Input("it", (ids,), "", words=["to", "be", "or"])
    labels = [f"word {k}" for k in range(1200)]
    explainer = nrm.Explainer(Speaker().eval())
    opened = Opened("it", "words", explainer, [one], "", labels, place="embedding", axis=0)
    word = nrm.channels("embedding", 2, axis=0)
    with running(opened) as address:
        page = chromium.new_page()
        page.goto(address)
        settled(page)
        does(page, lambda: page.get_by_label("explained place").select_option("be 1"))
        R = explainer(ids)
        assert "at 1" in page.locator(".asked .total").inner_text()
        best = int(R.output[0, 1].argmax())
        assert page.get_by_label("explained output").input_value() == str(best)
        assert page.locator("option").count() < 100
        field = page.get_by_label("another output by name or number")
        field.fill("ord 107")
        offered = page.locator("datalist").first.locator("option")
        values = [option.get_attribute("value") for option in offered.all()]
        assert values[:2] == ["word 107 · 107", "word 1070 · 1070"]
        does(page, lambda: field.fill("word 1070 · 1070") or page.keyboard.press("Enter"))
        does(page, lambda: page.locator(".place[data-place='2']").click())
        assert total(page) == shown(explainer(ids, target=(1, 1070))(word))
        other = page.get_by_label("rather than, by name or number")
        does(page, lambda: other.fill("7") or page.keyboard.press("Enter"))
        contrast = nrm.Contrast((1, 1070), (1, 7))
        assert total(page) == shown(explainer(ids, target=contrast)(word))
        page.close()
