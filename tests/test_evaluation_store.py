"""Texts that tell settings apart: alike for the same settings, different for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nrm
from nrm import composites
from nrm.evaluation.store import described, digest


@dataclass
class Factor:
    factor: float

    def score(self, x: float) -> float:
        return self.factor * x


def _scored(factor: float) -> Callable[[float], float]:
    return lambda x: factor * x


def _module(weight: float) -> nn.Module:
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(weight)
        layer.bias.zero_()
    return layer


@pytest.mark.parametrize(
    "made",
    [
        lambda number: Factor(number).score,
        lambda number: _scored(number),
        lambda number: partial(Factor(1.0).score, number),
        lambda number: _module(number),
        lambda number: _module(number).forward,
        lambda number: torch.tensor([0.0, number]),
        lambda number: {"layer": [number, None]},
        lambda number: nrm.neurons("layer", int(number)),
    ],
)
def test_the_same_settings_have_one_digest_and_others_another(made):
    assert digest(made(1.0)) == digest(made(1.0))
    assert digest(made(1.0)) != digest(made(2.0))


def test_functions_are_told_apart_by_what_they_enclose():
    def clusters(k):
        return lambda R, layer: nrm.clusters(R, layer, k)

    assert described(clusters(3)) == described(clusters(3))
    assert described(clusters(3)) != described(clusters(4))
    assert described(partial(clusters, 3)) != described(partial(clusters, 4))
    assert described(lambda x: x + 1) != described(lambda x: x + 2)
    chosen = torch.tensor([True, False])

    def given(mask):
        return lambda R, layer: [nrm.mask(layer, mask)]

    assert described(given(chosen)) == described(given(chosen.clone()))
    assert described(given(chosen)) != described(given(~chosen))
    sets = [nrm.mask("1", chosen)], [nrm.mask("1", chosen)], [nrm.mask("1", ~chosen)]
    same, again, other = (digest(lambda R, layer, each=each: each) for each in sets)
    assert same == again != other


class Scaled:
    """Shows nothing of itself."""

    def __init__(self, by: Any) -> None:
        self.by = by

    def __call__(self, x: Any) -> Any:
        return x * self.by


class Slotted:
    __slots__ = ("by",)

    def __init__(self, by: Any) -> None:
        self.by = by


class ScaledModule(nn.Module):
    def __init__(self, by: Any) -> None:
        super().__init__()
        self.by = by


@pytest.mark.parametrize("kind", [Scaled, Slotted, ScaledModule])
def test_objects_are_told_apart_by_what_they_hold(kind: Any) -> None:
    assert described(kind(2)) == described(kind(2))
    assert described(kind(2)) != described(kind(3))
    one, two = torch.zeros(3000), torch.zeros(3000)
    two[1500] = 1
    assert described(kind(one)) == described(kind(one.clone()))
    assert described(kind(one)) != described(kind(two))
    assert described(kind(Scaled(2))) != described(kind(Scaled(3)))
    assert described([kind(2)]) != described([kind(3)])
    if kind is Scaled:
        assert described(kind(2).__call__) != described(kind(3).__call__)
    itself = kind(2)
    itself.by = itself if kind is not ScaledModule else [itself]
    assert "itself" in described(itself)


def test_composites_are_told_apart_by_their_selectors():
    def composite(pattern):
        choice = composites.path(pattern), nrm.rules.Gamma(0.1)
        return composites.Composite([choice], nrm.rules.Zero())

    assert digest(composite("1.*")) == digest(composite("1.*"))
    assert digest(composite("1.*")) != digest(composite("2.*"))
    assert "0x" not in described(composite("1.*"))
    assert digest(torch.zeros(2)) != digest(torch.zeros(2, dtype=torch.float64))
    assert digest([np.zeros(2)]) != digest([np.ones(2)])
    itself = []
    itself.append(itself)
    assert described(itself) == "list(itself)"
