"""Softmax and its logarithm, where relevance reaches them.

A softmax is an identity, or linearised at its input (Taylor); a log-softmax is a logit less one
number.

Most attention gives it none: against a softmax, the value takes all (`rules.ValueTakesAll`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from nrm.operators.base import Setting, fill
from nrm.operators.call import Call
from nrm.operators.connections import OneParent
from nrm.operators.contribution import Contribution
from nrm.operators.layers import Elementwise
from nrm.operators.normalization import Centring
from nrm.rules import Activation, Identity, Rule


class Softmax(Centring):
    """`s_j ~ sum_i s_j (delta_ij - s_i) x_i + b_j`: any contribution rule on that is a Taylor rule.

    Without a choice by the composite it is an identity: each neuron has the logit it stands at
    for its only parent.
    """

    passes = ("self",)
    default_rule: ClassVar[Rule | None] = Identity()

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        # What is beyond the expansion is no constant: only the expansion has it.
        return not isinstance(rule, Identity) and not rule.first_order

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        output: Tensor = fill(call, values)()  # its derivative is the Taylor expansion
        return output

    def values(self, x: Tensor) -> Tensor:
        # Logits masked with -inf have no share, whatever they are.
        return x.masked_fill(x == -torch.inf, 0.0)

    def coefficients(self, call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        share = call(self=x)
        return share, -share, share

    def add_up(self, call: Call, x: Tensor) -> Tensor:
        return x.sum(call["dim"], keepdim=True)

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        """What the softmax is beyond its linear part."""
        share, x = call(self=values[0]), self.values(values[0])
        rest: Tensor = share * (1 - x + (share * x).sum(call["dim"], keepdim=True))
        return rest


class LogSoftmax(Elementwise):
    """`y_j = x_j - log sum_i exp x_i`: a logit, less one number that is a bias in all but name.

    The number depends on all logits, and no walk leads on from there: where biases are inputs it
    ends in a leaf.
    """

    passes = ("self",)

    def has_bias(self, call: Call, operands: Sequence[tuple[str, Node]], rule: Rule) -> bool:
        return not rule.first_order

    def curves(self, operands: Sequence[tuple[str, Node]], along_path: bool) -> bool:
        return True

    def contributions(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> list[Contribution]:
        x = values[0]
        one = torch.ones((), dtype=x.dtype, device=x.device)
        return [
            Contribution(
                Activation(x),
                setting.weight("one", one),
                torch.mul,
                lambda factor: factor,
                keeps_sign=True,
                connections=partial(OneParent, one, x.shape),
            )
        ]

    def bias(self, call: Call, values: Sequence[Tensor], dim: int) -> Tensor | None:
        return -values[0].detach().logsumexp(call["dim"], keepdim=True)

    def frozen(self, call: Call, values: Sequence[Tensor], setting: Setting) -> Tensor:
        shift = self.bias(call, values, setting.output_dim)
        assert shift is not None
        return values[0] + shift
