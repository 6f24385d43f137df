"""Outputs without neurons and joint contributions, against hooks on the model itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.interventions import (
    MODELS,
    as_set,
    expected_joint,
    explainer_of,
    made,
    mlp,
    plain,
    random_sets,
    recorded,
    together,
)
from torch import Tensor, nn
from torch.fx import Node

import nrm
from nrm.capture.run import Interpreter
from nrm.errors import InputError, NeuronSetError, QueryError, TargetError, UnknownLayerError
from nrm.evaluation.intervention import Interventions, joint_contributions

CASES = [
    ("mlp", [["input"], ["1"]]),
    ("mlp", [["1"], ["3"]]),
    ("mlp", [["3"], ["1"]]),
    ("mlp", [["3"]]),
    ("mlp", [["input"], ["1"], ["3"]]),
    ("mlp", [["3"], ["input"], ["4"]]),
    ("mlp", [["1"], ["1"]]),
    ("mlp", [["1", "3"], ["input", "3"]]),
    ("mlp", [["1"], ["5"]]),
    ("residual", [["stem"], ["add"]]),
    ("residual", [["stem"], ["inner"]]),
    ("residual", [["inner"], ["cat"]]),
    ("residual", [["left"], ["right"]]),
    ("residual", [["left", "right"], ["stem"]]),
    ("residual", [["stem", "cat"], ["inner", "right"]]),
    ("residual", [["input"], ["add"], ["cat"]]),
    ("residual", [["left"], ["mix"], ["norm"]]),
    ("two inputs", [["x"], ["y"]]),
    ("two inputs", [["x", "y"], ["add"]]),
    ("two inputs", [["first"], ["mixed"]]),
    ("two inputs", [["second"], ["gate"], ["last"]]),
    ("gated", [["first"], ["value"]]),
    ("gated", [["gate"], ["value"]]),
    ("gated", [["first"], ["gate"], ["value"]]),
    ("branching", [["first"], ["second"]]),
    ("branching", [["input"], ["first", "second"]]),
]


@pytest.mark.parametrize(("name", "layers"), CASES, ids=str)
def test_joint_contributions_are_those_of_the_model_itself(
    name: str, layers: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy at a time, some at a time and all at once, with what is known and without."""
    model, inputs = made(name)
    families = [random_sets(model, inputs, each, 3) for each in layers]
    sets = [[as_set(s) for s in family] for family in families]
    expected = expected_joint(model, inputs, 1, families, {})
    for shortcuts in (True, False):
        recorded(monkeypatch, shortcuts)
        for memory in (1, 3000, 2**28):
            interventions = Interventions(explainer_of(model), *inputs, target=1, memory=memory)
            found = joint_contributions(interventions, *sets)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "layers", "affine", "batched"),
    [
        ("mlp", ["1", "3"], True, True),
        ("mlp", ["3", "1"], True, True),  # whatever the order they are given in
        ("mlp", ["input", "1"], False, True),
        ("residual", ["stem", "cat"], True, True),  # linear, batch norm, pooling, a view
        ("residual", ["stem", "add"], False, True),
        ("two inputs", ["first", "last"], True, True),
        ("two inputs", ["first", "mixed"], False, True),
        ("gated", ["first", "value"], False, True),  # the gate is below too
        ("gated", ["input", "value"], False, True),
        ("branching", ["first", "second"], True, False),
    ],
)
def test_what_is_found_without_runs(
    name: str, layers: list[str], affine: bool, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(name)
    runs = recorded(monkeypatch)
    interventions = Interventions(explainer_of(model), *inputs, target=0)
    interventions.joint(*([nrm.neurons(layer)] for layer in layers))
    assert [(run.affine, run.batched) for run in runs] == [(affine, batched)]


def test_a_single_affine_family_is_not_run_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("gated")
    runs = recorded(monkeypatch)
    interventions = Interventions(explainer_of(model), *inputs, target=0)
    found = interventions.joint([nrm.channels("value", i) for i in range(4)])
    assert runs[0].affine
    assert not runs[0].parts
    families = [[{"value": torch.arange(4) == i} for i in range(4)]]
    torch.testing.assert_close(found, expected_joint(model, inputs, 0, families, {}))


def computed(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """For how many copies each operator is computed from here on."""
    counts: dict[str, int] = {}
    evaluate = Interpreter.run_node

    def counting(run: Interpreter, node: Node) -> Any:
        found = evaluate(run, node)
        name = str(node.target)
        counts[name] = counts.get(name, 0) + len(found)
        return found

    monkeypatch.setattr(Interpreter, "run_node", counting)
    return counts


def test_only_what_lies_downstream_is_computed_and_once_for_each_lower_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = made("mlp")
    recorded(monkeypatch, shortcuts=False)
    interventions = Interventions(explainer_of(model), *inputs, target=0)
    first, second = ([nrm.neurons(layer, i) for i in range(4)] for layer in ("1", "3"))
    counts = computed(monkeypatch)
    interventions.joint(first, second)
    # Up to the second layer five times: without each set, and with all of them.
    assert counts == {
        "aten.linear.default": 5 + 25,
        "aten.relu.default": 5,
        "aten.flatten.using_ints": 25,
    }


def test_sets_that_are_zero_already_change_nothing_and_are_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = made("residual")
    inputs[0][:, 1] = 0
    runs = recorded(monkeypatch)
    done: list[int] = []
    interventions = Interventions(explainer_of(model), *inputs, target=0)
    families = [
        [nrm.channels("input", c) for c in (0, 1)],
        [nrm.neurons("stem"), nrm.mask("stem", torch.ones(3, 4, 4) > 0)],
    ]
    counts = computed(monkeypatch)
    found = interventions.joint(*families, progress=done.append)
    assert (found[1] == 0).all()
    assert (found[0] != 0).all()
    assert sum(done) == runs[0].total == 9
    # As it is and without the first channel; of each, as it is and without either set.
    assert counts["aten.linear.default"] == 2 * 3
    assert counts["aten.tanh.default"] == 2 * 3


@pytest.mark.parametrize("name", MODELS)
def test_outputs_without_sets_of_any_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made(name)
    layers = {
        "mlp": ["input", "1", "3"],
        "residual": ["input", "stem", "inner", "left", "cat", "norm"],
        "two inputs": ["x", "y", "second", "mixed", "last"],
        "gated": ["input", "first", "gate", "value"],
        "branching": ["first", "second"],
    }[name]
    sets = [s for layer in layers for s in random_sets(model, inputs, [layer], 2)]
    entries = [(), *((s,) for s in sets), *itertools.pairwise(sets), tuple(sets)]
    wanted = [plain(model, inputs, together(*entry), {})[1] for entry in entries]
    removed = [[as_set(s) for s in entry] for entry in entries]
    interventions = Interventions(explainer_of(model), *inputs, target=1)
    torch.testing.assert_close(interventions.output, wanted[0])
    for shortcuts in (True, False):
        recorded(monkeypatch, shortcuts)
        done: list[int] = []
        found = interventions.without(removed, progress=done.append)
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-10, atol=1e-12)
        assert sum(done) == len(entries)
    assert interventions.without([]).shape == (0,)


# -- what takes the place of activations ---------------------------------------------------------


@pytest.mark.parametrize("removal", ["number", "mean", "mapping"])
@pytest.mark.parametrize("layers", [["input", "inner"], ["stem", "cat"], ["left", "norm", "head"]])
def test_removal(layers: list[str], removal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("residual")
    values = {layer: outputs_of(model, inputs, layer) for layer in layers}
    given: Any = {"number": 0.7, "mean": "mean"}.get(removal)
    if removal == "number":
        to = dict.fromkeys(layers, torch.tensor(0.7, dtype=torch.float64))
    elif removal == "mean":
        to = {
            layer: v.mean((1, 2), keepdim=True).expand(v.shape) if v.dim() > 1 else v.mean()
            for layer, v in values.items()
        }
    else:
        to = {layers[0]: torch.randn(values[layers[0]].shape).double()}
        given = {layers[0]: to[layers[0]]}
        if len(layers) > 2:
            to[layers[1]] = torch.tensor(-1.0).double()
            given[layers[1]] = -1
    families = [random_sets(model, inputs, [layer], 3) for layer in layers]
    sets = [[as_set(s) for s in family] for family in families]
    interventions = Interventions(explainer_of(model), *inputs, target=2, removal=given)
    wanted = expected_joint(model, inputs, 2, families, to)
    for shortcuts in (True, False):
        recorded(monkeypatch, shortcuts)
        found = interventions.joint(*sets)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def outputs_of(model: nn.Module, inputs: Sequence[Tensor], layer: str) -> Tensor:
    if layer == "input":
        return inputs[0][0]
    found: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _i, o: found.append(o[0]))
    with torch.no_grad():
        model(*inputs)
    handle.remove()
    return found[0]


# -- more ----------------------------------------------------------------------------------------


def test_pairs_of_neurons_as_the_formula_of_two_layers() -> None:
    model, inputs = made("mlp")
    interventions = Interventions(explainer_of(model), *inputs, target=None)
    y = int(model(*inputs).argmax())
    assert interventions.target.tolist() == [y]
    a, b = ([nrm.neurons(layer, i) for i in range(4)] for layer in ("1", "3"))
    f = interventions.without([(), *((s,) for s in a), *((t,) for t in b)])
    both = interventions.without([(s, t) for s in a for t in b]).view(4, 4)
    expected = f[0] - f[1:5, None] - f[5:] + both
    torch.testing.assert_close(joint_contributions(interventions, a, b), expected)
    torch.testing.assert_close(joint_contributions(interventions, b, a), expected.T)
    united = [s | t for s in a for t in b]
    torch.testing.assert_close(interventions.without([(s,) for s in united]).view(4, 4), both)


def test_aliases_and_the_output_itself() -> None:
    model, inputs = made("mlp")
    interventions = Interventions(explainer_of(model), *inputs, target=1)
    outputs = [nrm.neurons("output", i) for i in range(3)]
    f = interventions.output
    torch.testing.assert_close(
        interventions.without([(s,) for s in outputs]), torch.stack([f, f * 0, f])
    )
    alone = [nrm.channels("1", i) for i in range(5)]
    lost = f - interventions.without([(s,) for s in alone])
    found = joint_contributions(interventions, alone, outputs)
    torch.testing.assert_close(found[:, 1], lost)
    assert (found[:, [0, 2]] == 0).all()


def test_what_is_refused() -> None:
    model, inputs = made("mlp")
    explainer = nrm.Explainer(model, bias="input")
    one = [nrm.neurons("1", 2)]
    interventions = Interventions(explainer, *inputs, target=1)
    with pytest.raises(InputError, match="one sample at a time, not from 2"):
        Interventions(explainer, torch.randn(2, 6).double(), target=1)
    with pytest.raises(TargetError, match="out of range"):
        Interventions(explainer, *inputs, target=3)
    with pytest.raises(InputError, match="NaN"):
        Interventions(explainer, inputs[0] * torch.nan, target=1)
    with pytest.raises(InputError, match="training mode"):
        Interventions(nrm.Explainer(mlp()), *inputs, target=1)
    with pytest.raises(QueryError, match="at least one family"):
        joint_contributions(interventions)
    with pytest.raises(QueryError, match="family is empty"):
        joint_contributions(interventions, one, [])
    with pytest.raises(QueryError, match="computed nowhere"):
        joint_contributions(interventions, [nrm.neurons("2.bias", 0)])
    with pytest.raises(QueryError, match="in lists"):
        joint_contributions(interventions, nrm.neurons("1", 2))  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="in lists"):
        joint_contributions(interventions, "1")  # type: ignore[arg-type]
    with pytest.raises(NeuronSetError, match="is empty"):
        interventions.without([[nrm.mask("1", torch.zeros(5) > 0)]])
    with pytest.raises(UnknownLayerError, match="nothing"):
        interventions.without([[nrm.neurons("nothing", 0)]])


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        ("median", "removal is"),
        (float("nan"), "removal is"),
        ({"1": float("nan")}, "NaN or infinite"),
        ({"1": torch.zeros(4)}, "shape"),
        ({"nothing": 1}, "no layer"),
    ],
)
def test_removals_that_are_refused(removal: Any, message: str) -> None:
    model, inputs = made("mlp")
    with pytest.raises((QueryError, UnknownLayerError), match=message):
        Interventions(explainer_of(model), *inputs, target=1, removal=removal)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mlp", [["1", "3", "1"], ["input", "3"]]),
        ("residual", [["left", "right", "stem"], ["norm", "cat"]]),
        ("residual", [["input"], ["left", "right"], ["cat"]]),
        ("two inputs", [["x", "second", "y"], ["mixed", "last"]]),
    ],
    ids=str,
)
def test_families_whose_sets_are_of_different_layers(
    name: str, layers: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(name)
    families = [
        [random_sets(model, inputs, [layer], 2)[0] for layer in family] for family in layers
    ]
    sets = [[as_set(s) for s in family] for family in families]
    interventions = Interventions(explainer_of(model), *inputs, target=2)
    wanted = expected_joint(model, inputs, 2, families, {})
    for shortcuts in (True, False):
        recorded(monkeypatch, shortcuts)
        found = interventions.joint(*sets)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_sets_with_neurons_in_common() -> None:
    model, inputs = made("residual")
    sets = [{"stem": torch.rand(3, 4, 4) < 0.9} for _ in range(9)]
    interventions = Interventions(explainer_of(model), *inputs, target=0)
    lost = interventions.output - interventions.without([[as_set(s)] for s in sets])
    found = interventions.joint([as_set(s) for s in sets])
    torch.testing.assert_close(found, lost)
    torch.testing.assert_close(found, expected_joint(model, inputs, 0, [sets], {}))
    tail = [{"norm": torch.rand(4, 2, 2) < 0.9} for _ in range(9)]
    found = interventions.joint([as_set(s) for s in tail])
    torch.testing.assert_close(found, expected_joint(model, inputs, 0, [tail], {}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_on_a_gpu_as_without_one(name: str) -> None:
    model, inputs = made(name)
    layers = {"mlp": ["input", "1", "3"], "residual": ["stem", "add", "cat"]}[name]
    families = [[as_set(s) for s in random_sets(model, inputs, [layer], 3)] for layer in layers]
    wanted = Interventions(explainer_of(model), *inputs, target=0).joint(*families)
    explainer, there = nrm.Explainer(copy.deepcopy(model).cuda()), [x.cuda() for x in inputs]
    for removal in ("zero", "mean"):
        found = Interventions(explainer, *there, target=0, removal=removal).joint(*families)
        assert found.is_cuda
        if removal == "zero":
            torch.testing.assert_close(found.cpu(), wanted, rtol=1e-9, atol=1e-11)


def test_a_model_that_changed_is_not_asked_on() -> None:
    _, inputs = made("mlp")
    model = mlp().double().eval()
    interventions = Interventions(nrm.Explainer(model), *inputs, target=1)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(QueryError, match="changed"):
        interventions.without([[nrm.neurons("1", 2)]])


def test_removals_by_layer_are_zero_mean_or_numbers() -> None:
    model, inputs = made("mlp")

    def removed(removal: Any) -> Interventions:
        return Interventions(explainer_of(model), *inputs, target=1, removal=removal)

    for value in ("foo", True, 1 + 2j):
        with pytest.raises(QueryError, match="'zero', 'mean', a number or a tensor"):
            removed({"1": value})
    sets = [[nrm.neurons("1", 2)]]
    torch.testing.assert_close(removed({"1": "mean"}).without(sets), removed("mean").without(sets))


def test_a_set_that_a_later_removal_wakes_is_removed_too() -> None:
    """Neuron 3 is silent until neuron 1 of the layer below is gone; then it is the whole output."""
    layers = [nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1)]
    model = nn.Sequential(*layers).double().eval()
    weights = ([[1.0, 0.0], [0.0, 1.0]], [[1.0, -2.0]], [[1.0]])
    for layer, weight in zip(layers[::2], weights, strict=True):
        layer.weight.data = torch.tensor(weight, dtype=torch.float64)
        nn.init.zeros_(layer.bias)
    study = nrm.Interventions(nrm.Explainer(model), torch.ones(1, 2).double(), target=0)
    upper, others = nrm.neurons("1", 1), [nrm.neurons("input", 0), nrm.neurons("3", 0)]
    found = study.joint([upper], others)
    # f - f(without A) - f(without B) + f(without both) = 0 - 1 - 0 + 0
    torch.testing.assert_close(found, torch.tensor([[-1.0, -1.0]]).double())
