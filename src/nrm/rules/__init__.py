"""Walk specification (section 3.3): the rules that say how much each parent contributes."""

from nrm.rules.alphas import Alpha, InOrder, Shares, Uniform, ValueTakesAll
from nrm.rules.base import Activation, Gate, Rule, Term, Weight
from nrm.rules.contributions import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Identity,
    LocalLinear,
    Occlusion,
    PathIntegrated,
    PlainGamma,
    WSquare,
    ZBox,
    Zero,
    ZPlus,
)

__all__ = [
    "Activation",
    "Alpha",
    "AlphaBeta",
    "Epsilon",
    "Flat",
    "Gamma",
    "Gate",
    "Identity",
    "InOrder",
    "LocalLinear",
    "Occlusion",
    "PathIntegrated",
    "PlainGamma",
    "Rule",
    "Shares",
    "Term",
    "Uniform",
    "ValueTakesAll",
    "WSquare",
    "Weight",
    "ZBox",
    "ZPlus",
    "Zero",
]
