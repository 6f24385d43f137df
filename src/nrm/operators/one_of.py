"""Operators whose arguments decide which kind they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nrm.errors import UnsupportedOperatorError
from nrm.operators.base import Operator, Propagation, Setting
from nrm.operators.call import Call


class OneOf(Operator):
    """An operator that is one kind or another, as its arguments say: `scatter_reduce`, `pad`.

    Arguments:
        choices: `(condition on the call, row)`, the first that applies counts.
    """

    def __init__(self, *choices: tuple[Callable[[Call], bool], Operator]) -> None:
        super().__init__("")
        self.choices = choices

    def specialize(self, call: Call) -> Operator:
        for applies, operator in self.choices:
            if applies(call):
                return operator
        chosen = {
            name: value for name, value in call.arguments.items() if isinstance(value, str | bool)
        }
        raise UnsupportedOperatorError(f"no rule covers {call.target} with {chosen}.")

    def prepare(
        self, call: Call, values: Sequence[Tensor], setting: Setting
    ) -> tuple[Tensor, Propagation]:
        return self.specialize(call).prepare(call, values, setting)
