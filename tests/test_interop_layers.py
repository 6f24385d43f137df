"""captum's own LayerLRP beside ours: outputs and inputs of layers, several layers, the delta."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import rules
from nrm.composites import Everywhere
from nrm.errors import QueryError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(6, 5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.first(x))


class Two(nn.Module):
    """A module that reads two tensors, beside a skip."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * 2.0 + y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Linear(4, 6), nn.ReLU()
        self.block, self.head = Block(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.relu(self.stem(x))))


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.two, self.head = (
            nn.Linear(4, 4), nn.Linear(4, 4), Two(), nn.Linear(4, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        return self.head(self.two(torch.relu(self.side(h)), h) + h)


@pytest.fixture(scope="module")
def captum(torchvision_models):
    pytest.importorskip("captum", reason="needs captum")
    return importlib.import_module("nrm.interop.captum")


@pytest.fixture(scope="module")
def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().double().eval(), torch.randn(3, 4, dtype=torch.float64)


@pytest.mark.parametrize("of_input", [False, True])
def test_layers_are_captums_own(captum, net, of_input) -> None:
    from captum.attr import LayerLRP
    from captum.attr._utils.lrp_rules import EpsilonRule

    model, x = net
    names = ["stem", "block.first", "head"]  # it has no rule for activations
    modules = [model.get_submodule(name) for name in names]
    one = captum.LayerLRP(
        model, modules, Everywhere(rules.Epsilon(0.1)), bias="input", scale="original"
    )
    found, deltas = one.attribute(
        x, 1, return_convergence_delta=True, attribute_to_layer_input=of_input
    )
    for module in (model.stem, model.block.first, model.head):
        module.rule = EpsilonRule(0.1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs, their_deltas = LayerLRP(model, modules).attribute(
                x, 1, attribute_to_layer_input=of_input, return_convergence_delta=True
            )
    finally:
        for module in (model.stem, model.block.first, model.head):
            if hasattr(module, "rule"):
                del module.rule
    for name, mine, its, delta, its_delta in zip(
        names, found, theirs, deltas, their_deltas, strict=True
    ):
        torch.testing.assert_close(mine, its.detach(), atol=1e-8, rtol=1e-8, msg=name)
        torch.testing.assert_close(delta, its_delta.detach(), atol=1e-8, rtol=1e-8, msg=name)


def test_what_a_layer_reads_is_what_comes_through_it(captum) -> None:
    torch.manual_seed(1)
    model, x = Skip().double().eval(), torch.randn(2, 4, dtype=torch.float64)
    composite = nrm.composites.LRPZero()
    R = nrm.Explainer(model, composite)(x, target=1)
    one = captum.LayerLRP(model, model.two, composite, scale="normalized")
    found, delta = one.attribute(x, 1, return_convergence_delta=True, attribute_to_layer_input=True)
    assert len(found) == 2  # two tensors, one of which also flows past the module
    through = R("two")
    torch.testing.assert_close(sum(part.sum(1) for part in found), through)
    torch.testing.assert_close(delta, 1 - through)
    with pytest.raises(QueryError, match="list is empty"):
        captum.LayerLRP(model, [])


def test_the_original_heatmap_is_captums(captum, net) -> None:
    model, x = net
    lrp = captum.LRP(model, Everywhere(rules.Epsilon(0.1)), bias="input", scale="original")
    found, delta = lrp.attribute(x, 1, return_convergence_delta=True)
    R = nrm.Explainer(model, Everywhere(rules.Epsilon(0.1)), bias="input")(x, target=1)
    torch.testing.assert_close(found, R.heatmap(normalized="original"))
    torch.testing.assert_close(delta, R.scale - found.sum(1))
    a = nrm.neurons("block.first", 1, 3)
    for method, query in (
        (nrm.methods.lrp(R, scale="original"), found),
        (nrm.methods.crp(R, a, scale="original"), R.heatmap(a, normalized="original")),
        (nrm.methods.conrel(R, "stem", scale="original"),
         R.marginal("stem", normalized="original")),
        (nrm.methods.conrel(R, a, scale="original"), R(a, normalized="original")),
        (nrm.methods.subgraph(R, a, "stem", scale="original"),
         R(a, "stem", normalized="original")),
    ):  # fmt: skip
        torch.testing.assert_close(method, query)
    with pytest.raises(QueryError, match="under the original LRP"):
        nrm.methods.harsanyi(R, a, scale="original")
    with pytest.raises(QueryError, match="'normalized', 'logit' or 'original'"):
        nrm.methods.lrp(R, scale="captum")
