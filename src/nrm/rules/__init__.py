"""Walk specification (section 3.3): the rules that say how much each parent contributes."""

from nrm.rules.base import Activation, Gate, Rule, Term, Weight
from nrm.rules.contributions import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    PlainGamma,
    WSquare,
    ZBox,
    Zero,
    ZPlus,
)

__all__ = [
    "Activation",
    "AlphaBeta",
    "Epsilon",
    "Flat",
    "Gamma",
    "Gate",
    "PlainGamma",
    "Rule",
    "Term",
    "WSquare",
    "Weight",
    "ZBox",
    "ZPlus",
    "Zero",
]
