"""Texts that tell settings apart: alike for the same settings, different for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

import nrm
from nrm.evaluation.store import digest


@dataclass
class Scaled:
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
        lambda number: Scaled(number).score,
        lambda number: _scored(number),
        lambda number: partial(Scaled(1.0).score, number),
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
