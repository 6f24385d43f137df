"""Columns of the explorer by heads, clusters and hidden states."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import architectures
from support import oracle as o
from support.opened import answered, column, opens
from torch import Tensor, nn

import nrm
from nrm.errors import NrmError, QueryError
from nrm.explore import answers
from nrm.explore.columns import chosen_at_first, columns_of
from nrm.explore.opened import Input, Opened
from nrm.explore.session import Sessions
from nrm.formulas import NeuronSet
from nrm.measure import Measure

pytestmark = pytest.mark.usefixtures("captured_once")


# -- against the enumeration of walks --------------------------------------------------------------

Neurons = set[o.Neuron]


def of(layer: str, indices: Sequence[int]) -> Neurons:
    return {(layer, i) for i in indices}


STATES: list[tuple[str, dict[str, Any], list[Neurons]]] = [
    ("rnn:linear", {}, []),
    ("rnn.h_l0[0]", {}, [of("rnn.h_l0[0]", [k]) for k in (0, 1)]),
    ("rnn.h_l0", {"by": "steps"}, [of(f"rnn.h_l0[{t}]", [0, 1]) for t in (0, 1)]),
    ("rnn.h_l0[1]", {}, [of("rnn.h_l0[1]", [k]) for k in (0, 1)]),
]
HEADS: list[tuple[str, dict[str, Any], list[Neurons]]] = [
    ("a:linear", {"axis": 0}, [of("a:linear", range(6 * t, 6 * t + 6)) for t in (0, 1)]),
    ("a:reshape@6", {"by": "heads"}, [of("a:permute", [h, 2 + h]) for h in (0, 1)]),
    ("a:linear@1", {"axis": 0}, [of("a:linear@1", [2 * t, 2 * t + 1]) for t in (0, 1)]),
]
SMALL = {"LSTM": STATES, "GRU": STATES, "Multihead": HEADS}


@pytest.mark.parametrize("mode", ["joint", "given"])
@pytest.mark.parametrize("network", SMALL)
def test_the_numbers_are_those_of_all_walks(network: str, mode: str) -> None:
    """Each part, flow and total of columns that are no cuts, whatever of them is selected."""
    walks = architectures.Walks("gamma", "shares")
    case = architectures.make(network, walks)
    opened, R = opens(
        case.model, [x[:1] for x in case.inputs], "series",
        composite=walks.composite, options={"bias": "drop"}, axis=0,
    )  # fmt: skip
    every = case.oracles[0].walks(1)
    size = 8 if network == "LSTM" else 6
    places = [of("rnn:linear", range(size * t, size * t + size)) for t in (0, 1)]
    columns = [(name, by, parts or places) for name, by, parts in SMALL[network]]
    columns[0] = (columns[0][0], {"axis": 0}, columns[0][2])
    every_part = [(name, by, k, parts[k]) for name, by, parts in columns for k in (0, 1)]
    chosen: list[tuple[Any, Callable[[frozenset[o.Neuron]], bool]]] = [(None, lambda walk: True)]
    for (name, by, k, one), (other, of_other, j, two) in itertools.pairwise(every_part):
        part = {"layer": name, "channels": [k], **by}
        second = {"layer": other, "channels": [j], **of_other}
        chosen.append((part, lambda walk, one=one: bool(walk & one)))
        both = {"op": "and", "parts": [part, {"not": second}]}
        chosen.append((both, lambda w, one=one, two=two: bool(w & one) and not w & two))
        either = {"op": "or", "parts": [part, second]}
        chosen.append((either, lambda w, one=one, two=two: bool(w & one) or bool(w & two)))
    shown = [name for name, _, _ in columns]
    for selection, holds in chosen:
        found, flows, _ = answered(
            R, opened, columns=shown, selection=selection, mode=mode, target=1
        )
        known = sum(r for walk, r in every if holds(walk))
        scale = 1.0
        if mode == "given" and selection is not None:
            scale = 1 / known if abs(known) > 1e-12 else 0.0

        def right(*sets: Neurons, holds: Any = holds, scale: float = scale) -> Any:
            met = (r for w, r in every if holds(w) and all(w & one for one in sets))
            return pytest.approx(scale * sum(met), abs=1e-9)

        assert found.total.value == pytest.approx(known, abs=1e-9)
        assert {one.layer for one in found.columns} == set(shown)
        assert len(flows) == len(shown) - 1
        parts_of = {name: parts for name, _, parts in columns}
        for one in found.columns:
            if one.by == "steps":
                assert (one.total, one.rest, one.others) == (None, 0, 0)
            else:
                assert one.total == right(set().union(*parts_of[one.layer]))
            assert {node.index for node in one.nodes} == {0, 1}
            for node in one.nodes:
                assert node.value == right(parts_of[one.layer][node.index]), (selection, one)
        for flow in flows:
            values = {(i, j): value for i, j, value in flow.links}
            for i, j in itertools.product((0, 1), (0, 1)):
                lower, upper = parts_of[flow.lower][i], parts_of[flow.upper][j]
                assert values.get((i, j), 0.0) == right(lower, upper), (selection, flow)


# -- clusters, and lines of Python -----------------------------------------------------------------


class Small(nn.Module):
    """Three convolutions, their activations columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.a = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU()
        self.conv2, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.conv3, self.c = nn.Conv2d(4, 5, 3), nn.ReLU()
        self.head = nn.Linear(5 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.conv2(self.a(self.conv1(x))))
        logits: Tensor = self.head(self.c(self.conv3(x)).flatten(1))
        return logits


class Interleaved(nn.Module):
    """Two heads of two features, merged so that the features of a head do not lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(3, 12), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 4, 1, 3)  # heads are last
        met = nn.functional.scaled_dot_product_attention(q, k, v)
        merged = met.permute(0, 2, 3, 1).flatten(2)  # [batch, tokens, features * heads]
        logits: Tensor = self.head((x + self.out(merged)).mean(1))
        return logits


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Tensor]:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    torch.manual_seed(3)
    model = Small().double().eval()
    for layer in (model.conv1, model.conv2, model.conv3):
        nn.init.constant_(layer.bias, 0.2)  # type: ignore[arg-type] # no channel is silent
    return model, torch.rand(1, 1, 6, 6).double()


@pytest.fixture
def pictured(small: tuple[nn.Module, Tensor], captured_once: None) -> tuple[Opened, Measure]:
    return opens(small[0], [small[1]], "picture", composite=nrm.composites.GammaFlat(0.25))


MIXED = [
    {"layer": "a", "by": "clusters", "of": 3},
    "b",
    {"layer": "c", "by": "clusters", "of": 2},
]
CLUSTER = {"layer": "c", "channels": [1], "by": "clusters", "of": 2}
TWO = {"layer": "a", "channels": [0, 2], "by": "clusters", "of": 3}
OTHERS = {"layer": "b", "channels": [1, 3], "by": "clusters", "of": 5}  # not as it is shown
SELECTIONS = [
    None, CLUSTER, TWO, OTHERS, {"not": TWO},
    {"op": "and", "parts": [CLUSTER, {"not": TWO}]},
    {"op": "or", "parts": [TWO, {"layer": "b", "channels": [2]}]},
]  # fmt: skip


def sets_of(R: Measure) -> dict[str, list[NeuronSet]]:
    """The parts of the columns above, found apart from the explorer."""
    return {
        "a": nrm.clusters(R, "a", 3).sets,
        "b": [nrm.channels("b", k) for k in range(4)],
        "c": nrm.clusters(R, "c", 2).sets,
    }


def formula_of(chosen: Any, R: Measure) -> Any:
    """A selection as the library's formula, written a second time."""
    if "not" in chosen:
        return ~formula_of(chosen["not"], R)
    if "op" in chosen:
        one, two = (formula_of(part, R) for part in chosen["parts"])
        return one & two if chosen["op"] == "and" else one | two
    if "by" not in chosen:
        return nrm.channels(chosen["layer"], *chosen["channels"])
    found = nrm.clusters(R, chosen["layer"], chosen["of"])
    first, *more = (found[k] for k in chosen["channels"])
    for one in more:
        first = first | one
    return first


@pytest.mark.parametrize("mode", ["joint", "given"])
@pytest.mark.parametrize("chosen", SELECTIONS, ids=lambda chosen: json.dumps(chosen)[:60])
def test_clusters_and_channels_side_by_side(
    pictured: tuple[Opened, Measure], chosen: Any, mode: str
) -> None:
    """Asked one by one of the library, and by the lines that are shown."""
    opened, R = pictured
    found, flows, _ = answered(R, opened, columns=MIXED, selection=chosen, mode=mode, target=2)
    target = R.of(2)
    formula = () if chosen is None else (formula_of(chosen, R),)
    scale = 1 / float(target(*formula)) if mode == "given" and formula else 1.0
    sets = sets_of(R)

    def run(line: str) -> float:
        return float(eval(line, {"nrm": nrm, "R": target}).sum())

    assert found.total.value == pytest.approx(float(target(*formula)) if formula else 1.0)
    assert run(found.total.python) == pytest.approx(found.total.value)
    lines: dict[tuple[str, int], str] = {}
    for one in found.columns:
        assert len(one.nodes) == one.size == len(sets[one.layer])
        assert one.total == pytest.approx(scale * found.total.value if mode == "joint" else 1.0)
        for node in one.nodes:
            right = scale * float(target(sets[one.layer][node.index], *formula))
            assert node.value == pytest.approx(right, abs=1e-12)
            assert run(one.each.replace("#", node.python)) == pytest.approx(node.value, abs=1e-12)
            lines[one.layer, node.index] = node.python
    assert [(flow.lower, flow.upper) for flow in flows] == [("a", "b"), ("b", "c")]
    for flow in flows:
        values = {(i, j): value for i, j, value in flow.links}
        for i, one in enumerate(sets[flow.lower]):
            for j, other in enumerate(sets[flow.upper]):
                right = scale * float(target(one, other, *formula))
                assert values.get((i, j), 0.0) == pytest.approx(right, abs=1e-12)
        (i, j), value = next(iter(values.items()))
        line = flow.python.replace("#", lines[flow.lower, i], 1)
        assert run(line.replace("#", lines[flow.upper, j], 1)) == pytest.approx(value)


def test_notation_and_where_clusters_lie(pictured: tuple[Opened, Measure]) -> None:
    opened, R = pictured
    found, _, _ = answered(R, opened, columns=MIXED, selection=TWO)
    assert found.total.notation.startswith("R(S_{a:cluster 0, 2}, ")
    assert found.total.python == "R((nrm.clusters(R, 'a', 3)[0] | nrm.clusters(R, 'a', 3)[2]))"
    shown = column(found, "a")
    assert (shown.word, shown.positions, column(found, "b").where) == ("cluster ", [6, 6], None)
    where = answers.base64.b64decode(shown.where or "")
    assert list(where) == nrm.clusters(R, "a", 3).labels.flatten().tolist()


def test_a_search_through_columns_divided_in_several_ways(
    pictured: tuple[Opened, Measure],
) -> None:
    """All combinations at once, and the line that gives them."""
    opened, R = pictured
    session = Sessions(opened).new()
    wanted = {"columns": MIXED, "target": 2}
    *_, found = session.search(0, answers.Request.read(wanted), session.turn())
    assert isinstance(found, answers.Found)
    target, sets = R.of(2), sets_of(R)
    every = target.joint(sets["a"], "b", sets["c"])[0]
    assert found.gap == 0
    largest = every.flatten().abs().topk(10).values.tolist()
    assert [abs(value) for _, value in found.flows] == pytest.approx(largest)
    for (i, j, k), value in found.flows:
        assert value == pytest.approx(float(every[i, j, k]))
    run: Any = eval(found.python, {"nrm": nrm, "R": target})
    assert [flow.relevance for flow in run] == pytest.approx([value for _, value in found.flows])


def test_a_script_prints_clusters(
    small: tuple[nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, x = small
    monkeypatch.setattr(nrm, "made_by_hand", (model, x), raising=False)
    made = "model, x = nrm.made_by_hand\nexplainer = nrm.Explainer(model)"
    chosen = Input("it", (x,), "inputs, named = (x,), {}")
    opened = Opened("it", "picture", nrm.Explainer(model), [chosen], made)
    session = Sessions(opened).new()
    request = answers.Request.read({"columns": MIXED, "selection": CLUSTER})
    parts = list(session.answer(0, request, session.turn()))
    (found,) = (part for part in parts if isinstance(part, answers.Columns))
    exec(session.script(0, request), {})
    printed = capsys.readouterr().out.splitlines()
    assert f"R(selection) = {found.total.value:.6f}" in printed
    for one in found.columns:
        for node in one.nodes:
            assert f"{one.layer} {node.index} {node.value:+.6f}".replace("+0.000000", "") in (
                "\n".join(printed)
            )


def test_heads_whose_features_do_not_lie_side_by_side() -> None:
    """They are told by where the model moves them; beside the skip connection they are no cut."""
    torch.manual_seed(0)
    opened, R = opens(Interleaved().double().eval(), [torch.randn(1, 3, 3).double()], "words",
                      axis=0)  # fmt: skip
    (result,) = (v.name for v in R.graph.variables if v.name.endswith(":matmul@1"))
    (merged,) = (one for one in columns_of(R.graph, opened, R) if one.kind == "attention")
    assert [way.by.how for way in merged.ways] == ["heads", "places", "channels", "clusters"]
    found, _, _ = answered(R, opened, columns=[merged.layer], target=0)
    shown = column(found, merged.layer)
    assert {node.index: node.python for node in shown.nodes} == {
        0: f"nrm.channels({merged.layer!r}, 0, 2)", 1: f"nrm.channels({merged.layer!r}, 1, 3)"
    }  # fmt: skip
    for node in shown.nodes:
        head = R.of(0).marginal(result)[0, node.index].sum()
        assert node.value == pytest.approx(float(head))
        assert float(eval(shown.each.replace("#", node.python))) == pytest.approx(node.value)
    branch = float(R.of(0).marginal(merged.layer).sum())
    assert shown.total == pytest.approx(branch)
    assert abs(branch - 1) > 1e-3  # the rest goes past it


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"columns": [{"layer": "b", "by": "heads"}]}, "is divided by channels, clusters, not by"),
    ({"columns": [{"layer": "b", "by": "clusters", "of": 0}]}, "there are 1 to 64 clusters"),
    ({"columns": [{"layer": "b", "by": "clusters", "of": "6"}]}, "there are 1 to 64 clusters"),
    ({"columns": [{"layer": "b", "by": 3}]}, "in a word"),
    ({"columns": [3]}, "name of a layer"),
    ({"columns": [{"layer": "c", "by": "clusters", "of": 60}]}, "different positions"),
    ({"selection": {"layer": "b", "channels": [0], "by": "halves"}}, "is divided by one of"),
    ({"selection": {"layer": "b", "channels": [9], "by": "clusters", "of": 3}}, "no cluster 9"),
    ({"selection": {"layer": "b", "channels": [-1], "by": "clusters", "of": 3}}, "no cluster -1"),
    ({"selection": {"layer": "b", "channels": [0], "by": "heads"}}, "heads of an attention"),
    ({"selection": {"layer": "b", "channels": [0], "by": "steps"}}, "no hidden states"),
    ({"selection": {"layer": "b", "channels": [0], "axis": "0"}}, "an axis is a whole number"),
    ({"selection": {"layer": "b", "channels": [0], "by": "places"}}, "places have an axis"),
    ({"selection": {"layer": "b", "channels": [0], "by": "heads", "axis": 0}}, "have an axis"),
]


@pytest.mark.parametrize(("wanted", "why"), WRONG, ids=lambda value: str(value)[:50])
def test_what_is_no_division_is_refused(
    pictured: tuple[Opened, Measure], wanted: dict[str, Any], why: str
) -> None:
    opened, R = pictured
    with pytest.raises(NrmError) as refused:
        answered(R, opened, **wanted)
    assert why in str(refused.value)


def test_without_scikit_learn_clusters_are_refused(
    pictured: tuple[Opened, Measure], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, _ = pictured
    fresh = opened.explainer(*opened.inputs[0].args)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(QueryError, match="need scikit-learn"):
        answered(fresh, opened, columns=MIXED)


class Mixed(nn.Module):
    """Reads a series, one step at a time, and adds up what it read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.mix(x)).sum(1))
        return found


def test_steps_stand_in_their_order_and_channels_in_that_of_relevance() -> None:
    x = torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(1))
    for kind, in_order in (("series", True), ("words", True), ("graph", False)):
        opened, R = opens(Mixed().eval(), [x], kind, axis=0)
        layers = [one.layer for one in columns_of(R.graph, opened, R)]
        columns, _, _ = answered(R, opened, columns=layers, target=0, top=5)
        kinds = {one.by for one in columns.columns}
        assert kinds == {"places", "channels"}
        for one in columns.columns:
            sizes = [abs(node.value) for node in one.nodes]
            indices = [node.index for node in one.nodes]
            if in_order and one.by == "places":
                assert indices == sorted(indices)
            else:
                assert sizes == sorted(sizes, reverse=True)
            least = min(sizes)  # the five largest, whatever their order
            values = column_values(R, one)
            assert sum(abs(value) > least + 1e-9 for value in values) <= 5


def column_values(R: Measure, one: answers.Shown) -> list[float]:
    axis = 0 if one.by == "places" else None
    return [float(R(nrm.channels(one.layer, k, axis=axis))) for k in range(one.size)]


def test_no_flows_are_searched_through_all_hidden_states() -> None:
    walks = architectures.Walks()
    case = architectures.make("LSTM", walks)
    opened, R = opens(case.model, [x[:1] for x in case.inputs], "series", axis=0)
    assert chosen_at_first(columns_of(R.graph, opened, R)) == ["rnn:linear", "rnn.h_l0"]
    session = Sessions(opened).new()
    request = answers.Request.read({"columns": ["rnn:linear", "rnn.h_l0"]})
    with pytest.raises(QueryError, match="not through the hidden states"):
        list(session.search(0, request, session.turn()))
    request = answers.Request.read({"columns": ["rnn.h_l0[0]", "rnn.h_l0[1]"]})
    *_, found = session.search(0, request, session.turn())
    assert isinstance(found, answers.Found)
    pairs = R.joint("rnn.h_l0[0]", "rnn.h_l0[1]")[0]
    assert abs(found.flows[0][1]) == pytest.approx(float(pairs.abs().max()))
