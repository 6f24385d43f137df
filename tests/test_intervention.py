"""Outputs without neurons and joint contributions, against hooks on the model itself."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import nrm
from nrm import NeuronSet
from nrm.capture.run import Interpreter
from nrm.errors import InputError, NeuronSetError, QueryError, TargetError, UnknownLayerError
from nrm.evaluation import Families, combinations, intervention
from nrm.evaluation.intervention import Interventions, joint_contributions

Removed = dict[str, Tensor]
"""By layer, a mask of its neurons."""


# -- models, every layer a module ----------------------------------------------------------------


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Cat(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], 1)


class Residual(nn.Module):
    """Convolutions beside a skip, two branches of a concat, pooling, batch norm in the tail."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
        self.add, self.cat = Add(), Cat()
        self.left = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU())
        self.mix = nn.Conv2d(4, 4, 1)
        self.pool = nn.AvgPool2d(2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 3)
        for tensor in (self.norm.running_mean, self.norm.weight, self.norm.bias):
            nn.init.normal_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.add(self.inner(h), h)
        h = self.cat(self.left(h), self.right(h))
        h = self.norm(self.pool(self.mix(h)))
        return self.head(h.view(h.shape[0], -1))


class TwoInputs(nn.Module):
    """Positions that share their axis with the samples, and rows found by number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.add = Add()
        self.mixed = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.gate = nn.Sigmoid()
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # [B, 5, 4] and [B, 5, 3]
        h = self.add(self.first(x), self.second(y))
        flat = self.mixed(h.reshape(-1, 3))
        h = flat.view(x.shape[0], 5, 4)
        rows = torch.arange(x.shape[0])
        h = h * self.gate(h)[rows, torch.zeros_like(rows)].unsqueeze(1)
        return self.last(h).unbind(1)[2] + h.mean((1, 2)).unsqueeze(1)


class Gated(nn.Module):
    """The last layer's slope depends on an earlier layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.value, self.gate = nn.Linear(4, 4), nn.Sigmoid()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(self.value(h) * self.gate(h))


class Branching(nn.Module):
    """Python code that only a trace of one sample captures."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = 2.0 if float(x.sum()) > -1e9 else 1.0
        return self.head(self.second(self.first(x) * scale))


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Flatten())
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "mlp": (mlp, ((6,),)),
    "residual": (Residual, ((2, 4, 4),)),
    "two inputs": (TwoInputs, ((5, 4), (5, 3))),
    "gated": (Gated, ((3,),)),
    "branching": (Branching, ((4,),)),
}


@functools.cache
def built(name: str) -> nn.Module:
    """The one model of a name, which no test changes."""
    torch.manual_seed(0)
    build, _ = MODELS[name]
    return build().double().eval()


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A model and a sample of which no layer is silent; what is drawn next is always the same."""
    model = built(name)
    torch.manual_seed(6)
    return model, [torch.randn(1, *shape).double() for shape in MODELS[name][1]]


@functools.cache
def explainer_of(model: nn.Module) -> nrm.Explainer:
    """The one explainer of a model that no test changes: capturing takes longest."""
    return nrm.Explainer(model, nrm.composites.AttnLRP())


def recorded(
    monkeypatch: pytest.MonkeyPatch, shortcuts: bool = True
) -> list[combinations.Combinations]:
    """The runs that are made from here on.

    Arguments:
        shortcuts: `False`: every combination is run, also where its result is known.
    """
    runs: list[combinations.Combinations] = []

    class Recorded(combinations.Combinations):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args[:6], shortcuts=shortcuts)
            runs.append(self)

    monkeypatch.setattr(intervention, "Combinations", Recorded)
    return runs


# -- the reference -------------------------------------------------------------------------------


def plain(model: nn.Module, inputs: Sequence[Tensor], removed: Removed, to: Removed) -> Tensor:
    """The model's outputs, with masked activations replaced by hooks."""
    inputs = list(inputs)
    names = ["input"] if len(inputs) == 1 else ["x", "y"]
    handles = []
    for layer, mask in removed.items():
        value = to.get(layer, torch.zeros(()).double())
        if layer in names:
            place = names.index(layer)
            inputs[place] = torch.where(mask, value, inputs[place])
            continue
        module = model.get_submodule(layer)
        handles.append(
            module.register_forward_hook(
                lambda _m, _i, out, mask=mask, value=value: torch.where(
                    mask.view(out.shape), value, out
                )
            )
        )
    with torch.no_grad():
        found: Tensor = model(*inputs)
    for handle in handles:
        handle.remove()
    return found[0]


def together(*sets: Removed) -> Removed:
    found: Removed = {}
    for one in sets:
        for layer, mask in one.items():
            found[layer] = found[layer] | mask if layer in found else mask
    return found


def expected_joint(
    model: nn.Module,
    inputs: Sequence[Tensor],
    target: int,
    families: Sequence[Sequence[Removed]],
    to: Removed,
) -> Tensor:
    """Eq. 34, written out."""
    found = torch.zeros([len(family) for family in families]).double()
    for index in itertools.product(*(range(len(family)) for family in families)):
        chosen = [family[i] for family, i in zip(families, index, strict=True)]
        for size in range(len(chosen) + 1):
            for subset in itertools.combinations(chosen, size):
                output = plain(model, inputs, together(*subset), to)[target]
                found[index] += (-1) ** size * output
    return found


def as_set(removed: Removed) -> NeuronSet:
    sets = [nrm.mask(layer, mask) for layer, mask in removed.items()]
    return NeuronSet(tuple(member for one in sets for member in one.members))


def random_sets(
    model: nn.Module, inputs: Sequence[Tensor], layers: Sequence[str], count: int
) -> list[Removed]:
    """Random sets over some layers; the last is a single neuron of each."""
    shapes: dict[str, torch.Size] = {"input": inputs[0].shape[1:]}
    shapes |= dict(zip(("x", "y"), (x.shape[1:] for x in inputs), strict=False))
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _m, _i, out, name=name: shapes.__setitem__(name, out.shape[1:])
        )
    with torch.no_grad():
        model(*inputs)
    for module in model.modules():
        module._forward_hooks.clear()
    if "mixed" in shapes:
        shapes["mixed"] = torch.Size((5, 4))  # one sample's
    found = [{layer: torch.rand(shapes[layer]) < 0.5 for layer in layers} for _ in range(count)]
    for layer in layers:
        mask = torch.zeros(shapes[layer], dtype=torch.bool)
        mask.view(-1)[int(torch.randint(mask.numel(), ()))] = True
        found[-1][layer] = mask
    found[0][layers[0]].view(-1)[0] = True  # none is empty
    for one in found:
        one[layers[0]].view(-1)[1] = True
    return found


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


class Fire(nn.Module):
    """As SqueezeNet ends: branches side by side, and a convolution that mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.Tanh())
        self.mix = nn.Sequential(nn.Dropout(), nn.Conv2d(8, 3, 3, padding=1, stride=2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        h = self.squeeze(x)
        return self.mix(torch.cat([self.left(h), self.right(h)], 1)).mean((2, 3))


def vgg() -> nn.Module:
    """As VGG ends: pooling, and linear layers that read channels position by position."""
    convolutions = (nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
    pooling = (nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout())
    linear = (nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    return nn.Sequential(*convolutions, *pooling, *linear)


BY_CHANNEL = [  # the layers, whether channels of the last one lead on by themselves
    (Fire, ["squeeze", "right"], True),
    (Fire, ["left", "right"], True),
    (Fire, ["right", "left"], True),
    (Fire, ["right"], True),
    (Fire, ["right", "right"], True),
    (Fire, ["input", "squeeze"], False),  # two ways lead on
    (Fire, ["squeeze", "mix.1"], False),  # no weighted sum lies above
    (vgg, ["1", "3"], True),
    (vgg, ["input", "1", "3"], True),
    (vgg, ["3", "1"], True),
    (vgg, ["3", "9"], True),
    (vgg, ["3", "11"], False),  # affine: not run at all
    (Residual, ["input", "stem"], False),
    (Residual, ["stem", "inner"], False),
]


@functools.cache
def by_channel(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    return build().double().eval()


@pytest.mark.parametrize(("build", "layers", "leads"), BY_CHANNEL)
def test_channels_by_what_they_add_to_the_next_weighted_sum(
    build: Callable[[], nn.Module],
    layers: list[str],
    leads: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = by_channel(build)
    torch.manual_seed(5)
    x = torch.randn(1, 2, 8, 8).double()
    if build is Residual:
        x = x[..., :4, :4]
    explainer = explainer_of(model)
    families = Families(explainer(x, target=1), layers).sets

    def joint(removal: str, memory: int) -> Tensor:
        interventions = Interventions(explainer, x, target=1, memory=memory, removal=removal)
        done: list[int] = []
        found = interventions.joint(*families, progress=done.append)
        assert sum(done) == runs[-1].total
        return found

    runs = recorded(monkeypatch, shortcuts=False)
    expected = {removal: joint(removal, 2**28) for removal in ("zero", "mean")}
    assert all(run.channels is None for run in runs)
    runs = recorded(monkeypatch)
    for removal, memory in (("zero", 1), ("mean", 5000), ("zero", 5000), ("mean", 2**28)):
        found = joint(removal, memory)
        torch.testing.assert_close(found, expected[removal], rtol=1e-10, atol=1e-12)
    assert [run.channels is not None for run in runs] == [leads] * 4


class Gated(nn.Module):
    """A branch that is computed after the weighted sum of the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.t = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b, self.o = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.t(self.n(self.a(x).relu()).relu()).relu()
        return self.o(h * self.b(x).relu())


def test_sets_that_also_lie_on_a_branch_beside_the_weighted_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    model, x = Gated().double().eval(), torch.ones(1, 3).double()
    both = nrm.neurons("a", 0) | nrm.neurons("b", 0) | nrm.neurons("b", 1) | nrm.neurons("b", 2)
    families = [[both, nrm.neurons("a", 1)], [nrm.neurons("n", c) for c in range(4)]]
    explainer, found = nrm.Explainer(model), []
    for shortcuts in (True, False):
        recorded(monkeypatch, shortcuts)
        found.append(Interventions(explainer, x, target=0).joint(*families))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert found[0].abs().max() > 0.01


def test_sets_of_some_of_a_channel_and_channels_of_no_activation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(5)
    model, x = vgg().double().eval(), torch.randn(1, 2, 8, 8).double()
    model[2].bias.data[3] = -100  # type: ignore[operator, union-attr]
    parts = [{"3": torch.zeros(5, 6, 6, dtype=torch.bool)} for _ in range(4)]
    for number, part in enumerate(parts):
        part["3"][number, :, number:] = True
    several = {"3": torch.zeros(5, 6, 6, dtype=torch.bool)}
    several["3"][1:3] = True
    first = random_sets(model, [x], ["1"], 3)
    runs = recorded(monkeypatch)
    interventions = Interventions(nrm.Explainer(model), x, target=0)
    for family in (parts, [*parts, several]):
        found = interventions.joint([as_set(s) for s in first], [as_set(s) for s in family])
        expected = expected_joint(model, [x], 0, [first, family], {})
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert (found[:, 3] == 0).all()
    assert [run.channels is not None for run in runs] == [True, False]


def test_infinite_activations_are_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    model, x = Fire().double().eval(), torch.randn(1, 2, 8, 8).double()
    model.right[1] = nn.ReLU().eval()
    model.right[0].bias.data[2] = -torch.inf  # type: ignore[operator, union-attr]
    runs = recorded(monkeypatch)
    interventions = Interventions(nrm.Explainer(model), x, target=0)
    outputs = interventions.without([[nrm.channels("right.0", 2)]])
    assert torch.isfinite(outputs).all()
    assert runs[0].channels is None


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


def test_one_sample_that_has_no_batch_axis() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    nodes = torch.randn(5, 3).double()
    interventions = Interventions(nrm.Explainer(model, batch_axis=None), nodes, target=(2, 1))
    sets = [nrm.neurons("1", (i, slice(None))) for i in range(5)]
    lost = interventions.joint(sets)
    assert lost[[0, 1, 3, 4]].abs().max() == 0
    torch.testing.assert_close(lost[2], model(nodes)[2, 1] - model[2].bias[1])


def test_samples_of_a_batch_axis_that_is_not_the_first() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][-1])

    torch.manual_seed(0)
    model = Recurrent().double().eval()
    x = torch.randn(2, 1, 3).double()
    interventions = Interventions(nrm.Explainer(model, batch_axis=1), x, target=1)
    assert interventions.rerun.copies.possible
    families = [
        [{"input": (torch.arange(2) == t).view(2, 1, 1).expand(2, 1, 3)} for t in range(2)],
        [{"input": (torch.arange(3) == c).expand(2, 1, 3)} for c in range(3)],
    ]
    steps = [nrm.neurons("input", (t, slice(None))) for t in range(2)]
    found = joint_contributions(interventions, steps, [nrm.channels("input", c) for c in range(3)])
    wanted = torch.zeros(2, 3).double()
    with torch.no_grad():
        for (t, a), (c, b) in itertools.product(*(enumerate(family) for family in families)):
            without = [model(x.masked_fill(mask, 0))[0, 1] for mask in (a["input"], b["input"])]
            neither = model(x.masked_fill(a["input"] | b["input"], 0))[0, 1]
            wanted[t, c] = model(x)[0, 1] - sum(without) + neither
    torch.testing.assert_close(found, wanted)


def test_samples_that_would_mix_are_run_one_at_a_time() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return self.head(torch.tanh(h + h.softmax(0)))

    torch.manual_seed(0)
    model = Mixing().double().eval()
    x = torch.randn(1, 3).double()
    interventions = Interventions(nrm.Explainer(model, nrm.composites.AttnLRP()), x, target=0)
    assert interventions.rerun.copies.axis(interventions.graph.captured.output) is None
    found = interventions.without([(nrm.neurons("input", i),) for i in range(3)])
    wanted = [model(x.masked_fill(torch.arange(3) == i, 0))[0, 0] for i in range(3)]
    torch.testing.assert_close(found, torch.stack(wanted).detach())


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


def test_outputs_that_are_not_finite_are_refused() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log().cumsum(1)

    x, explainer = torch.rand(1, 4) + 1, nrm.Explainer(Log().eval())
    interventions = Interventions(explainer, x, target=2)
    with pytest.raises(QueryError, match="NaN or infinite"):
        interventions.without([[nrm.neurons("input", 1)]])
    interventions = Interventions(explainer, x, target=2, removal="mean")
    assert interventions.without([[nrm.neurons("input", 1)]]).isfinite().all()


def test_single_precision_and_what_is_kept_for_further_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    ).eval()
    explainer = nrm.Explainer(model)
    families = [[nrm.channels("1", c) for c in range(8)], [nrm.channels("3", c) for c in range(6)]]
    for _ in range(2):
        x = torch.randn(1, 1, 8, 8)
        interventions = Interventions(explainer, x, target=1)
        found = joint_contributions(interventions, *families)
        masks = [
            [{"1": channel_mask(8, c, 6)} for c in range(8)],
            [{"3": channel_mask(6, c, 4)} for c in range(6)],
        ]
        wanted = expected_joint(model.double(), [x.double()], 1, masks, {})
        model.float()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def channel_mask(count: int, channel: int, side: int) -> Tensor:
    return (torch.arange(count) == channel).view(-1, 1, 1).expand(count, side, side)


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


def test_within_inference_mode_and_in_half_precision() -> None:
    model, inputs = made("mlp")
    sets = [nrm.neurons("1", i) for i in range(5)], [nrm.neurons("3", i) for i in range(4)]
    wanted = Interventions(explainer_of(model), *inputs, target=1).joint(*sets)
    with torch.inference_mode():
        explainer = nrm.Explainer(model)
        removal = {"1": torch.zeros(5)}
        interventions = Interventions(explainer, inputs[0].clone(), target=1, removal=removal)
        torch.testing.assert_close(interventions.joint(*sets), wanted)
        assert interventions.without([(sets[0][0],), (sets[1][0],)]).shape == (2,)
    half = nrm.Explainer(copy.deepcopy(model).bfloat16())
    half = Interventions(half, inputs[0].bfloat16(), target=1)
    found = half.joint(*sets)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0.2, atol=0.02)


def test_inputs_by_name_and_an_output_among_several() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
            self.second = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
            self.last = nn.Sequential(nn.Linear(3, 2), nn.Tanh())

        def forward(self, x: Tensor, y: Tensor, scale: float) -> dict[str, Tensor]:
            return {"a": self.last(self.first(x) + self.second(y)) * scale, "b": x}

    torch.manual_seed(0)
    model = Several().double().eval()
    x, y = torch.randn(1, 4).double(), torch.randn(1, 3).double()
    explainer = nrm.Explainer(model, output="a")
    sets = [nrm.neurons("second")], [nrm.neurons("x")]
    named = Interventions(explainer, x, y=y, scale=2.0, target=1)
    placed = Interventions(explainer, x, y, 2.0, target=1)
    found = named.joint(*sets)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, placed.joint(*sets))
    torch.testing.assert_close(named.output, model(x, y, 2.0)["a"][0, 1])


# -- what a review found ---------------------------------------------------------------------------


class Scaled(nn.Module):
    """Something that all samples of a batch share, or that runs over them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(self.between(torch.relu(self.a(x))))))


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h / (h.max() + 1),
        lambda h: h + h.amax(),
        lambda h: h.cummax(0)[0],
        lambda h: h - h.mean(),
        lambda h: h + 1e-3 * h.mean(),
    ],
)
def test_what_samples_share_is_of_each_copy_alone(between: Any) -> None:
    torch.manual_seed(0)
    model, x = Scaled(between).double().eval(), torch.randn(1, 3).double()
    interventions = Interventions(nrm.Explainer(model, nrm.composites.AttnLRP()), x, target=0)
    sets = [[nrm.channels("a", c)] for c in range(4)]
    alone = torch.cat([interventions.without([one]) for one in sets])
    torch.testing.assert_close(interventions.without(sets), alone)


def test_division_that_rounds_is_not_affine(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.b(self.a(x))
            return self.c(h + torch.div(h, 0.1, rounding_mode="floor"))

    model, x = Rounded().double().eval(), torch.randn(1, 3).double()
    interventions = Interventions(nrm.Explainer(model), x, target=0)
    families = [[nrm.channels(layer, c) for c in range(4)] for layer in ("a", "b")]
    found = interventions.joint(*families)
    recorded(monkeypatch, shortcuts=False)
    torch.testing.assert_close(found, interventions.joint(*families))


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
