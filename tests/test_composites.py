"""Composites by name, and shown as they apply to a model."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import nrm
from nrm import composites
from nrm.composites import Composite, GammaFlat, by_name, composite, first, kind, module, path
from nrm.rules import Epsilon, Flat, Gamma, Zero


class Attention(nn.Module):
    """One linear layer, attention between its rows, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        shares = torch.softmax(x @ x.transpose(1, 2), -1)
        return self.head((shares @ x).mean(1))


def test_every_composite_of_the_module_has_a_name() -> None:
    made = {
        name
        for name, value in vars(composites).items()
        if inspect.isfunction(value) and value.__annotations__.get("return") == "Composite"
    }
    assert set(composites.names()) == made - {"by_name", "suggested", "Everywhere"}


@pytest.mark.parametrize("name", composites.names())
def test_by_name(name: str) -> None:
    bounds = (-1.0, 1.0) if name == "EpsilonGammaBox" else ()
    found = by_name(name.upper(), *bounds)
    assert repr(found).startswith(name)
    assert found == getattr(composites, name)(*bounds) or name == "EpsilonGammaBox"


def test_an_unknown_name_says_which_is_near() -> None:
    with pytest.raises(nrm.NrmError, match=r"did you mean GammaFlat\? there are GammaFlat, "):
        by_name("gamaflat")


def test_a_composite_of_ones_own_has_a_name() -> None:
    @composite("Mine")
    def mine(gamma: float = 0.1) -> Composite:
        return Composite([(first, Flat())], Gamma(gamma), name=f"Mine({gamma})")

    assert repr(by_name("mine", gamma=0.5)) == "Mine(0.5)"
    assert "Mine" in composites.names()


def test_a_name_is_given_once() -> None:
    with pytest.raises(TypeError, match=r'give the composite a name: @composite\("Mine"\)'):
        composite(lambda: GammaFlat())
    with pytest.raises(ValueError, match="a composite is called 'GammaFlat' already"):
        composite("gammaflat")(lambda: GammaFlat())
    for gamma in (0.5, 0.75):  # defined again, as in a notebook

        @composite("Again")
        def again(gamma: float = gamma) -> Composite:
            return Composite([], Gamma(gamma), name=f"Again({gamma})")

    assert repr(by_name("again")) == "Again(0.75)"


def test_what_a_composite_chooses_is_shown_line_by_line() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.rand(1, 3)
    chosen = GammaFlat(0.1)
    graph = nrm.Explainer(model, chosen).graph(x)
    applied = chosen.applied(graph)
    assert applied.lines == (
        ("2", "linear", "Gamma(gamma=0.0)", "head"),
        ("1", "activation", "passes unchanged", ""),
        ("0", "linear", "Flat()", "first"),
    )
    assert str(applied).splitlines() == [
        "GammaFlat(0.1) (biases: dropped)",
        "operation  kind        rule              chosen by",
        "2          linear      Gamma(gamma=0.0)  head",
        "1          activation  passes unchanged",
        "0          linear      Flat()            first",
    ]
    assert "<td>Gamma(gamma=0.0)</td><td>head</td>" in applied._repr_html_()


def test_a_matrix_product_has_a_line_for_its_alpha_and_one_for_its_rule() -> None:
    model, x = Attention().eval(), torch.rand(1, 4, 3)
    chosen = Composite([(kind("product"), Epsilon(1e-3)), (module("Linear"), Flat())], Zero())
    graph = nrm.Explainer(model, chosen).graph(x)
    lines = chosen.applied(graph).lines
    assert [line[2:] for line in lines if line[1] == "product"] == [
        ("ValueTakesAll(): :relu 1", "default"),
        ("Epsilon(stabilizer=0.001)", "kind('product')"),
    ]
    assert {line[0]: line[2:] for line in lines}["head"] == ("Flat()", "module('Linear')")


def test_selectors_say_what_they_select() -> None:
    assert repr(kind("conv", "linear")) == "kind('conv', 'linear')"
    assert repr(path("layer4.*")) == "path('layer4.*')"
    assert repr(module(nn.Conv2d)) == "module('torch.nn.modules.conv.Conv2d')"
    assert kind("conv") == kind("conv") != path("conv")
