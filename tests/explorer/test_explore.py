"""The explorer's answers: each number is that of the library, whatever is selected."""

from __future__ import annotations

import itertools
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm.errors import NrmError, QueryError
from nrm.explore import answers, selection, view
from nrm.explore.columns import chosen_at_first, columns_of
from nrm.explore.opened import Input, Opened
from nrm.explore.session import MOST_SESSIONS, Sessions, SupersededError
from nrm.measure import Measure

LAYERS = ["a", "b", "c"]


class Small(nn.Module):
    """Convolutions, between which one or several sums lie, a skip connection, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.a = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU()
        self.conv2, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.conv3, self.conv4, self.c = nn.Conv2d(4, 5, 3), nn.Conv2d(5, 5, 1), nn.ReLU()
        self.head = nn.Linear(5 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(self.b(self.conv2(self.a(self.conv1(x)))))
        return self.head(self.c(self.conv4(x) + x).flatten(1))


def make_opened(composite: nrm.composites.Composite) -> Opened:
    torch.manual_seed(3)
    model = Small().double().eval()
    for layer in (model.conv1, model.conv2, model.conv3, model.conv4):
        nn.init.constant_(layer.bias, 0.2)  # type: ignore[arg-type] # no channel is silent
    inputs = [
        Input(f"input {k}", (torch.rand(1, 1, 6, 6).double(),), "", pixels=torch.rand(6, 6).numpy())
        for k in range(2)
    ]
    explainer = nrm.Explainer(model, composite)
    return Opened("Small", "picture", explainer, inputs, "", ["nought", "one", "two"])


@pytest.fixture(scope="module")
def opened() -> Opened:
    return make_opened(nrm.composites.GammaFlat(0.25))


@pytest.fixture(scope="module")
def with_biases() -> tuple[Opened, Measure]:
    """Walks end at biases, so that not all of them cross every column."""
    found = make_opened(nrm.composites.CPLRP())
    return found, found.measure(found.inputs[0])


def answered(R: Measure, opened: Opened, **wanted: Any) -> dict[str, list[Any]]:
    """The parts of an answer by kind."""
    request = answers.Request.read({"columns": LAYERS, "target": 1, **wanted})
    found: dict[str, list[Any]] = {}
    for part in view.answer(R, request, opened, lambda: None):
        found.setdefault(part.kind, []).append(part)
    return found


A, B, C = ({"layer": name, "channels": [k]} for name, k in (("a", 1), ("b", 2), ("c", 3)))
SEVERAL = {"layer": "b", "channels": [0, 2]}
PATCH = {"patch": [1, 4, 0, 3]}
SELECTIONS = [
    None,
    A,
    B,
    C,
    SEVERAL,
    PATCH,
    {"not": B},
    {"op": "and", "parts": [A, C]},
    {"op": "and", "parts": [C, {"not": PATCH}]},
    {"op": "or", "parts": [A, C]},
    {"op": "and", "parts": [{"op": "or", "parts": [A, C]}, SEVERAL]},
    {"op": "or", "parts": [{"not": A}, {"op": "and", "parts": [SEVERAL, {"not": PATCH}]}]},
]


@pytest.mark.parametrize("mode", ["joint", "given"])
@pytest.mark.parametrize("chosen", SELECTIONS, ids=lambda chosen: json.dumps(chosen)[:60])
def test_every_number_is_the_librarys(R: Measure, opened: Opened, chosen: Any, mode: str) -> None:
    """Asked one by one: totals, each channel, each flow and each pixel."""
    check_numbers(R, opened, chosen, mode, 1.0)


@pytest.mark.parametrize("chosen", SELECTIONS, ids=lambda chosen: json.dumps(chosen)[:60])
def test_so_it_is_where_walks_end_at_biases(
    with_biases: tuple[Opened, Measure], chosen: Any
) -> None:
    opened, R = with_biases
    assert R.graph.bias_is_input
    check_numbers(R, opened, chosen, "joint", None)


def check_numbers(
    R: Measure, opened: Opened, chosen: Any, mode: str, crossing: float | None
) -> None:
    """Compare an answer with queries of single numbers.

    Arguments:
        crossing: the share of the walks that crosses each column, if it is known.
    """
    found = answered(R, opened, selection=chosen, mode=mode)
    target = R.of(1)
    selected = selection.parse(chosen, R)
    formula = () if selected is None else (selected.formula,)
    known = float(target(*formula)) if formula else 1.0
    scale = 1 / known if mode == "given" and formula else 1.0
    (columns,) = found["columns"]
    assert columns.total.value == pytest.approx(known, abs=1e-12)
    for column in columns.columns:
        if crossing is not None:
            assert column.total == pytest.approx(known * scale * crossing, abs=1e-12)
        whole = float(target.marginal(column.layer, *formula).sum())
        assert column.total == pytest.approx(whole * scale, abs=1e-12)
        for node in column.nodes:
            joint = float(target(nrm.channels(column.layer, node.index), *formula))
            assert node.value == pytest.approx(joint * scale, abs=1e-12)
        assert len(column.nodes) == column.size
    heatmap = target.heatmap(*formula)[0, 0] * scale
    assert torch.allclose(torch.tensor(answers.numbers(columns.heatmap)), heatmap.float())
    assert len(found["flows"]) == 2
    for flows in found["flows"]:
        sizes = [next(c.size for c in columns.columns if c.layer == name)
                 for name in (flows.lower, flows.upper)]  # fmt: skip
        values = {(i, j): value for i, j, value in flows.links}
        for i, j in itertools.product(*map(range, sizes)):
            sets = nrm.channels(flows.lower, i), nrm.channels(flows.upper, j)
            joint = float(target(*sets, *formula)) * scale
            assert values.get((i, j), 0.0) == pytest.approx(joint, abs=1e-12)


def test_given_what_has_no_relevance_all_is_zero(R: Measure, opened: Opened) -> None:
    """Equation 11: the two channels of one layer are never visited by one walk."""
    chosen = {"op": "and", "parts": [B, {"layer": "b", "channels": [1]}]}
    (columns,) = answered(R, opened, selection=chosen, mode="given")["columns"]
    assert columns.total.value == columns.heatmap.total == 0
    assert {node.value for column in columns.columns for node in column.nodes} == {0.0}


def test_both_ways_to_flows_are_taken(R: Measure, opened: Opened) -> None:
    """Contraction where one sum lies between two layers and nothing below is selected."""
    how = [flows.how[:3] for flows in answered(R, opened, selection=C)["flows"]]
    assert how == ["one", "a m"]
    how = [flows.how[:3] for flows in answered(R, opened, selection=A)["flows"]]
    assert how == ["a m", "a m"]


@pytest.mark.parametrize("mode", ["joint", "given"])
def test_the_line_of_python_gives_the_number(R: Measure, opened: Opened, mode: str) -> None:
    """Every line that an answer shows, run as it stands."""
    chosen = {"op": "and", "parts": [C, {"not": PATCH}]}
    found = answered(R, opened, selection=chosen, mode=mode, against=2)
    target = R.of(nrm.Contrast(1, 2))

    def run(line: str) -> Tensor:
        value = eval(line, {"nrm": nrm, "R": target})
        assert isinstance(value, Tensor)
        return value

    (columns,) = found["columns"]
    assert float(run(columns.total.python)) == pytest.approx(columns.total.value)
    assert float(run(columns.heatmap.python).sum()) == pytest.approx(columns.heatmap.total)
    for column in columns.columns:
        values = run(column.python)[0]
        for node in column.nodes:
            assert float(values[node.index]) == pytest.approx(node.value)
            assert float(run(column.each.replace("#", node.python))) == pytest.approx(node.value)
    for flows in found["flows"]:
        i, j, value = flows.links[0]
        sets = {(c.layer, node.index): node.python for c in columns.columns for node in c.nodes}
        line = flows.python.replace("#", sets[flows.lower, i], 1)
        line = line.replace("#", sets[flows.upper, j], 1)
        assert float(run(line)) == pytest.approx(value)


@pytest.mark.parametrize("mode", ["joint", "given"])
def test_a_search_finds_the_most_relevant_flows(R: Measure, opened: Opened, mode: str) -> None:
    """All of them at once, and the gap is told until it is closed."""
    wanted = {"columns": LAYERS, "target": 1, "selection": C, "mode": mode}
    session, parts = Sessions(opened).new(), []
    parts = list(session.search(0, answers.Request.read(wanted), session.turn()))
    found = parts[-1]
    assert isinstance(found, answers.Found)
    assert {part.kind for part in parts[:-1]} <= {"searching"}
    chosen = nrm.channels("c", 3)
    every = R.of(1).joint("a", "b", chosen)[0]
    every = every / float(R.of(1)(chosen)) if mode == "given" else every
    largest = every.flatten().abs().topk(10)
    assert found.gap == 0
    assert [abs(value) for _, value in found.flows] == pytest.approx(largest.values.tolist())
    for (i, j, k), value in found.flows:
        assert k == 3
        assert value == pytest.approx(float(every[i, j]))
    run: Any = eval(found.python, {"nrm": nrm, "R": R.of(1)})
    assert [flow.relevance for flow in run] == pytest.approx([value for _, value in found.flows])


@pytest.mark.parametrize("mode", ["joint", "given"])
@pytest.mark.parametrize("chosen", SELECTIONS[1:], ids=lambda chosen: json.dumps(chosen)[:60])
def test_a_search_takes_any_selection(R: Measure, opened: Opened, chosen: Any, mode: str) -> None:
    """Above the columns, between and below them, in them: every flow asked by itself."""
    wanted = {"columns": LAYERS, "target": 1, "selection": chosen, "mode": mode}
    session = Sessions(opened).new()
    found = list(session.search(0, answers.Request.read(wanted), session.turn()))[-1]
    assert isinstance(found, answers.Found)
    selected = selection.parse(chosen, R)
    assert selected is not None
    target = R.of(1)
    every = {
        (i, j, k): nrm.channels("a", i) & nrm.channels("b", j) & nrm.channels("c", k)
        for i, j, k in itertools.product(range(3), range(4), range(5))
    }
    values = target.relevances(*(sets & selected.formula for sets in every.values()))[:, 0]
    values = values / float(target(selected.formula)) if mode == "given" else values
    right = dict(zip(every, values.tolist(), strict=True))
    assert found.gap == 0
    for parts, value in found.flows:
        assert value == pytest.approx(right[tuple(parts)], abs=1e-12)
    best = values.abs().topk(10).values.tolist()
    assert [abs(value) for _, value in found.flows] == pytest.approx(best, abs=1e-12)
    run: Any = eval(found.python, {"nrm": nrm, "R": target})
    assert [flow.relevance for flow in run] == pytest.approx([value for _, value in found.flows])


def test_a_search_refuses_a_single_column(opened: Opened) -> None:
    session = Sessions(opened).new()
    with pytest.raises(QueryError, match="two columns or more"):
        list(session.search(0, answers.Request.read({"columns": ["a"]}), session.turn()))


def test_only_the_most_relevant_are_shown_and_the_rest_is_added_up(
    R: Measure, opened: Opened
) -> None:
    (columns,) = answered(R, opened, selection=C, top=2)["columns"]
    values = R.of(1).channels("b", nrm.channels("c", 3))[0]
    column = columns.columns[1]
    assert [node.index for node in column.nodes] == values.abs().topk(2).indices.tolist()
    assert column.others == 2
    assert sum(node.value for node in column.nodes) + column.rest == pytest.approx(column.total)
    (columns,) = answered(R, opened, selection={"not": C}, top=1)["columns"]
    assert 3 in [node.index for node in columns.columns[2].nodes]  # shown, because it is selected


def test_notation_is_the_papers(R: Measure, opened: Opened) -> None:
    chosen = {"op": "and", "parts": [SEVERAL, {"not": {"op": "or", "parts": [A, PATCH]}}]}
    (columns,) = answered(R, opened, selection=chosen)["columns"]
    names = "S_{b:0, 2} ∧ ¬(S_{a:1} ∨ S_{x:[1–3, 0–2]})".replace("x", R.graph.inputs[0].name)
    assert columns.total.notation == f"R({names}, 1)"
    assert columns.columns[0].notation == f"R(S_{{a}}, {names}, 1)"
    (columns,) = answered(R, opened, selection=chosen, mode="given", against=0)["columns"]
    assert columns.columns[0].notation == f"R(S_{{a}} | {names}, 1 − 0)"


WRONG: list[tuple[Any, str]] = [
    ([], "an object"),
    ({}, "names channels"),
    ({"layer": "nowhere", "channels": [0]}, "no layer is called"),
    ({"layer": "a", "channels": []}, "list of whole numbers"),
    ({"layer": "a", "channels": [True]}, "list of whole numbers"),
    ({"layer": "a", "channels": [99]}, "out of range"),
    ({"layer": "a", "channels": ["__import__('os')"]}, "list of whole numbers"),
    ({"layer": 3, "channels": [0]}, "named by a text"),
    ({"patch": [3, 1, 0, 2]}, "ends after it"),
    ({"patch": [0, 1, 2]}, "beginning and an end"),
    ({"op": "xor", "parts": [A]}, "'and' or 'or'"),
    ({"op": "and", "parts": []}, "at least one"),
    ({"op": "and", "parts": [A] * 25}, "at most 24"),
]


@pytest.mark.parametrize(("chosen", "why"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_no_selection_is_refused(R: Measure, opened: Opened, chosen: Any, why: str) -> None:
    with pytest.raises(NrmError) as refused:
        answered(R, opened, selection=chosen)
    assert why in str(refused.value)


def test_nesting_is_bounded(R: Measure, opened: Opened) -> None:
    chosen: Any = A
    for _ in range(20):
        chosen = {"not": chosen}
    with pytest.raises(QueryError, match="at most 8 deep"):
        answered(R, opened, selection=chosen)


@pytest.mark.parametrize(
    "wanted",
    [
        {"target": 9}, {"target": "1"}, {"target": True}, {"against": 1}, {"columns": "a"},
        {"columns": ["flat"]}, {"columns": ["head"]}, {"top": 0}, {"top": 1e9}, {"mode": "both"},
        {"columns": ["a"] * 17},
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(R: Measure, opened: Opened, wanted: Any) -> None:
    with pytest.raises(NrmError):
        answered(R, opened, **wanted)


def test_columns_are_cuts_spread_over_the_depth(R: Measure, opened: Opened) -> None:
    found = columns_of(R.graph, opened, R)
    assert [column.layer for column in found if column.kind == "activation"] == LAYERS
    assert chosen_at_first(found, 2) == ["a", "c"]


def test_what_the_page_of_the_docs_opens() -> None:
    """A text, whose columns are divided into its words."""
    page = Path(__file__).parents[2] / "docs" / "explorer.md"
    told: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(block, told)
    opened = told["opened"]
    R = opened.measure(opened.inputs[0])
    found = columns_of(R.graph, opened, R)
    assert {(column.size, column.axis) for column in found if column.axis is not None} == {(3, 0)}
    layers = [column.layer for column in found if column.axis == 0]
    part = {"layer": "embedding", "channels": [1], "axis": 0}
    answer = answered(R, opened, columns=layers, selection=part, target=0)
    (columns,) = answer["columns"]
    word = nrm.channels("embedding", 1, axis=0)
    assert columns.total.value == pytest.approx(float(R.of(0)(word)), abs=1e-6)
    assert answers.numbers(columns.heatmap) == pytest.approx([0, float(R.of(0)(word)), 0], abs=1e-6)
    for column in columns.columns:  # a word stays where it is in this network
        assert {node.index: node.value for node in column.nodes if node.value != 0} == {
            1: pytest.approx(float(R.of(0)(word)), abs=1e-6)
        }


@pytest.mark.parametrize("mode", ["joint", "given"])
def test_a_script_prints_the_numbers_of_places_too(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Whatever its inputs are called."""
    linear = nn.Sequential(
        nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.Flatten(), nn.Linear(12, 2)
    )
    x = torch.rand(1, 3, 2)
    monkeypatch.setattr(nrm, "made_by_hand", (linear.eval(), x), raising=False)
    made = "model, x = nrm.made_by_hand\nexplainer = nrm.Explainer(model)"
    chosen = Input('"""\\', (x,), "inputs, named = (x,), {}")
    opened = Opened("a\nb", "series", nrm.Explainer(linear), [chosen], made, axis=0)
    session = Sessions(opened).new()
    part = {"layer": "2", "channels": [1], "axis": 0}
    request = answers.Request.read({"columns": ["1"], "selection": part, "mode": mode})
    parts = list(session.answer(0, request, session.turn()))
    (columns,) = (one for one in parts if isinstance(one, answers.Columns))
    exec(session.script(0, request), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"R(selection) = {columns.total.value:.6f}"
    found = {int(line.split()[1]): float(line.split()[2]) for line in printed[1:]}
    right = {node.index: node.value for node in columns.columns[0].nodes}
    assert found == pytest.approx(right, abs=2e-6)


# -- sessions --------------------------------------------------------------------------------------


def test_a_newer_request_ends_an_older_one(opened: Opened) -> None:
    session = Sessions(opened).new()
    request = answers.Request.read({"columns": LAYERS})
    older = session.answer(0, request, session.turn())
    next(older)
    newer = session.answer(0, request, session.turn())
    with pytest.raises(SupersededError):
        next(older)
    assert [part.kind for part in newer][-1] == "done"


def test_sessions_do_not_mix(opened: Opened) -> None:
    """Two tabs that ask at once, of other inputs and targets, each get their own numbers."""
    sessions = Sessions(opened)
    found: dict[int, list[float]] = {0: [], 1: []}

    def ask(number: int) -> None:
        session = sessions.new()
        for _ in range(4):
            request = answers.Request.read({"columns": LAYERS, "target": number, "selection": A})
            for part in session.answer(number, request, session.turn()):
                if isinstance(part, answers.Columns):
                    found[number].append(part.total.value)

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        right = float(opened.measure(opened.inputs[number]).of(number)(nrm.channels("a", 1)))
        assert found[number] == pytest.approx([right] * 4)


def test_sessions_are_bounded_and_the_least_used_ends(opened: Opened) -> None:
    sessions = Sessions(opened)
    first, *_ = [sessions.new() for _ in range(MOST_SESSIONS)]
    assert sessions[first.id] is first
    second_oldest = next(iter(sessions._open))
    sessions.new()
    assert sessions[first.id] is first
    for name in (second_oldest, "", None, ["x"]):
        with pytest.raises(QueryError, match="has ended"):
            sessions[name]
