"""Checks for those who write a rule or a row: does it keep the laws that relevance rests on?

`check_rule` and `check_operator` are to rules and rows what scikit-learn's `check_estimator` is to
estimators. Each prepares small operations in double precision, lays out every `R(i|j)` by sending
one message from each neuron, and compares with a matrix that is built another way: connection by
connection from the rule's own terms, or from what the function does when one neuron changes.

==============  ===================================================================================
law             what is checked
==============  ===================================================================================
one             `sum_i R(i|j) = 1` over all operands and the late leaf, for every neuron j
linear          a sum of messages passes as the sum of what each passes; many at once as one by one
transpose       `push` is the transpose of `pull`
memory          results may be overwritten, and what was given is not written to
bounds          what `absolute` says is at least `|R(i|j)|`; `nonnegative` is true
values          `R(i|j)` and `T~_ij` are those of the dense matrix
traits          `one_parent`, `elementwise`, `moves`, `mixed_axes`, `adds_up`, `in_place`, ...
telescopes      relevance over value passes by the derivative of `frozen`
channels        `by_channels` adds up what the dense matrix has between channels
explicit zeros  `real` says zero only where the result is zero
==============  ===================================================================================

A check that fails raises an `AssertionError` that says which law, at which neurons, and by how
much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket

from nrm.errors import UnsupportedOperatorError
from nrm.operators import Call, Operator, Slot, lookup
from nrm.rules import (
    Activation,
    Flat,
    Gamma,
    Identity,
    LocalLinear,
    Rule,
    Weight,
    WSquare,
    Zero,
)
from nrm.testing.dense import check_values
from nrm.testing.laws import check_laws, check_telescoping, check_traits
from nrm.testing.prepared import Case, bound, double, prepare, runnable

__all__ = ["check_operator", "check_rule"]


def check_rule(rule: Rule, low: float = -1.0, high: float = 1.0) -> None:
    """Check a contribution rule on a linear layer, a convolution, and a sum of two tensors.

    Among their neurons are such with positive and negative sums, with all contributions zero, and
    with parents that are explicit zeros; biases are dropped, and are inputs.

    Arguments:
        rule: the rule.
        low, high: the values that parents have, for rules that hold for some alone (`ZBox`).

    Raises:
        AssertionError: which law fails, where, and by how much.
        TypeError: it is no rule, or its groups are no lists of terms.

    Example:
        >>> check_rule(Gamma(0.25))
        >>> check_rule(ZBox(0.0, 1.0), low=0.0, high=1.0)
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"what is checked is a rule, such as Gamma(0.25), not {rule!r}")
    _check_terms(rule)
    draw = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=draw, dtype=torch.float64)
        return low + (high - low) * drawn

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    linear, bias, x, aten = weights(5, 4), weights(5), values(2, 4), torch.ops.aten
    linear[0], linear[1], linear[2] = linear[0].abs(), -linear[1].abs(), 0.0
    sums: list[tuple[OpOverload, tuple[Any, ...]]] = [
        (aten.linear.default, (x, linear, bias)),
        (aten.linear.default, (values(2, 4), weights(3, 4))),
        (
            aten.conv2d.default,
            (values(1, 2, 3, 3), weights(2, 2, 2, 2), weights(2), [1, 1], [1, 1]),
        ),
    ]

    def check(target: OpOverload, args: tuple[Any, ...], **more: Any) -> None:
        row = lookup(target)
        assert row is not None
        for bias_is_input in (False, True):
            _check(prepare(row, target, args, rule, bias_is_input, repr(rule), **more))

    for target, args in sums:
        check(target, args)
        if rule.reads_ahead:
            check(target, args, following=(Call(aten.relu.default, {"self": Slot(0)}),))
    check(aten.add.Tensor, (values(2, 3), values(2, 3)))
    if low <= 0 <= high:
        real = torch.ones_like(x)
        real[:, 0] = 0.0
        check(aten.linear.default, (x * real, linear, bias), real=[real])


def _check_terms(rule: Rule) -> None:
    """Whether groups are lists of terms, each a factor like the parents and a weight or `None`."""
    x, weight = torch.ones(2, 4, dtype=torch.float64), torch.ones(5, 4, dtype=torch.float64)
    groups = rule.groups(Activation(x), Weight(weight))
    for group in groups:
        for term in group:
            if not (isinstance(term, tuple) and len(term) == 2 and isinstance(term[0], Tensor)):
                raise TypeError(
                    f"{rule!r}: groups returns a list of groups, each a list of terms (factor, "
                    "weight), as [[(x.value, w.value)]]"
                )


def check_operator(
    function: OpOverload | OpOverloadPacket | Callable[..., Any] | nn.Module,
    *inputs: Any,
    row: Operator | None = None,
    carries: Sequence[str] | None = None,
    rules: Sequence[Rule] = (Zero(), Flat(), WSquare(), Gamma(0.25), LocalLinear()),
    alphas: tuple[float, float] = (0.7, 0.3),
    **options: Any,
) -> None:
    """Check the row of an operator on one call.

    Arguments:
        function: an operator (`torch.ops.aten.relu`, or what `nrm.operators.operation` returned),
            or a module whose class has a row.
        inputs: the call's arguments, small: every neuron is looked at alone. Tensors without ties
            and zeros say the most; real ones are taken in double precision.
        row: its row; by default the one it is registered with.
        carries: the names of the arguments that depend on the model's input; by default all that
            the row lets relevance pass to, of a module its inputs.
        rules: the contribution rules to try, where the row takes one.
        alphas: what the factors of a product take.
        options: further arguments of the call, by name.

    Raises:
        AssertionError: which law fails, where, and by how much.
        TypeError: `function` is something else, as `torch.tanh` is.
        UnsupportedOperatorError: there is no row, or it refuses the call.

    Example:
        >>> silu = nrm.operators.PassThrough("activation", at_zero="zero")
        >>> check_operator(torch.ops.aten.silu, torch.randn(2, 3), row=silu)
        >>> check_operator(MyLayer(3, 2), torch.randn(2, 3))  # a module whose class has a row
    """
    target, args, names = runnable(function, [double(value) for value in inputs])
    if not hasattr(target, "_schema"):
        raise TypeError(
            "what is checked is an operator (torch.ops.aten.tanh, torch.ops.mylib.myop, or what "
            f"nrm.operators.operation returned) or a module, not {function!r}"
        )
    row = row or lookup(target)
    if row is None:
        raise UnsupportedOperatorError(
            f"{target} has no row; register one with nrm.operators.register, or give it as row=."
        )
    options = {name: double(value) for name, value in options.items()}
    row = row.specialize(bound(target, args, options)[0])
    if carries is None and names:
        carries = [name for name in names if row.passes is None or name in row.passes]
    tried = list(rules) if row.adds_up else [*rules[:1]]
    tried += [rule for rule in rules if rule.first_order]
    if row.accepts_identity:
        tried.append(Identity())
    for rule in dict.fromkeys(tried):
        for bias_is_input in (False, True):
            name = f"{type(row).__name__}({row.kind!r}) for {target} under {rule}"
            case = prepare(
                row, target, args, rule, bias_is_input, name,
                options=options, carries=carries, alphas=alphas,
            )  # fmt: skip
            _check(case)
            if rule == rules[0]:
                check_traits(case)


def _check(case: Case) -> None:
    check_laws(case)
    check_values(case)
    check_telescoping(case)
