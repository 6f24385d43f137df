"""What an operator computes, however it is spelled, to those who read a captured graph.

Rows say how relevance passes an operator. Beside that, the model's last softmax is looked through,
a sigmoid in a product is a gate, and a mean of squares under a root tells a norm. All of these ask
what an operator *is*, and find it here: on its row (`Operator.function`), or, for operators that
no row covers, in the table of `nrm.operators.table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nrm.rules.alphas import SCALE

SQUASHED = 1
"""The rank as a gate of squashing and smooth functions: a gate against a linear value (SwiGLU). A
rectified value is a value, whatever it is multiplied with."""

GATE = 2
"""The rank of a sigmoid: it says how much of a value passes."""

WEIGHTS = 3
"""The rank of what is normalised to sum to one, attention weights above all, also by hand."""


@dataclass(frozen=True)
class Function:
    """What a function is, as far as it is known; by default nothing is.

    Attributes:
        role: what mathematics calls it: `"softmax"`, `"sigmoid"`, `"exp"`, `"log"`, `"times"`,
            `"over"`, `"plus"`, `"minus"`, `"sum"`, `"mean"`, `"root"`, `"lookup"`, ...
        gate: how much of a gate its result is as a factor of a product; 0: it is a value
            (`nrm.rules.Alpha` decides what gates take).
        hides_sign: as a model's last function, it has another sign than its argument, the logit.
        positive: its results are positive numbers, probabilities and the like.
        keeps_positive: of positive numbers it makes positive ones.
        order: 1: the larger what it is given, the larger its result, -1: the smaller; 0: neither,
            or it is not known.
        among_positive: `order` holds for positive arguments alone.
        same: its result is what it is given.
        chooses: it returns what it chose along an axis, and beside it where that was.
        carries_none: its result says nothing of its operand's values (`zeros_like`).
        fills: it makes a constant tensor, of this value or of that in the argument of this name.
    """

    role: str = ""
    gate: int = 0
    hides_sign: bool = False
    positive: bool = False
    keeps_positive: bool = False
    order: int = 0
    among_positive: bool = False
    same: bool = False
    chooses: bool = False
    carries_none: bool = False
    fills: float | str | None = None


UNKNOWN = Function()

ROOT = Function("root", gate=SCALE, order=1, keeps_positive=True)
INVERSE_ROOT = Function("inverse root", gate=SCALE)
INVERSE = Function("inverse", gate=SCALE, order=-1)
SAME = Function("same", order=1, keeps_positive=True, same=True)
VIEW = Function("view", keeps_positive=True)


@dataclass(frozen=True)
class Order:
    """How results lie to each other if one operand changes and all else is constant.

    Attributes:
        falls: the other way round than the operand's values.
        by: a constant by whose sign that is turned in its turn (a number or a node).
        among_positive: so it is for positive values of the operand alone.
    """

    falls: bool = False
    by: Any = 1.0
    among_positive: bool = False


# -- Operators for those who write into a captured graph.

NEGATIVE = torch.ops.aten.neg.default
SIGN = torch.ops.aten.sign.default
TIMES = torch.ops.aten.mul.Tensor
GATHER = torch.ops.aten.gather.default
WITH_AXIS = torch.ops.aten.unsqueeze.default
WITHOUT_AXIS = torch.ops.aten.squeeze.dim
