"""`nrm.testing`: every rule and every row of the library keeps the laws; broken ones are caught."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from support.operator_calls import EXAMPLES, Example, positive, x
from support.torch_release import skip_underived
from torch import Tensor, nn
from torch.nn import functional as F

import nrm
from nrm import operators, rules
from nrm.errors import UnsupportedOperatorError
from nrm.operators import (
    SQUASHED,
    Contribution,
    Function,
    PassThrough,
    Propagation,
    Routing,
    WeightedSum,
    fill,
    register,
    registered,
    unregister,
)
from nrm.operators.layers import Layer
from nrm.rules import Activation, Rule
from nrm.testing import check_operator, check_rule

aten = torch.ops.aten

RULES = [
    rules.AlphaBeta(2.0, 1.0),
    rules.Epsilon(1e-2),
    rules.Flat(),
    rules.FromUniform(),
    rules.Gamma(0.25),
    rules.Gamma(0.0),
    rules.Identity(),
    rules.LocalLinear(),
    rules.Occlusion(),
    rules.Occlusion(rest_to_bias=True),
    rules.PathIntegrated(),
    rules.PlainGamma(0.25),
    rules.WSquare(),
    rules.ZBox(-1.0, 1.0),
    rules.ZPlus(),
    rules.Zero(),
]
ROWS = {name: row for name, row in registered().items() if name.startswith(("aten.", "nrm.comp"))}


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule(rule: Rule) -> None:
    check_rule(rule)


def test_all_rules_are_here() -> None:
    known = {
        kind
        for kind in vars(rules).values()
        if isinstance(kind, type) and issubclass(kind, Rule) and kind is not Rule
    }
    assert known == {type(rule) for rule in RULES}


@pytest.mark.parametrize("name", ROWS)
def test_every_row(name: str) -> None:
    skip_underived(name, "aten.aminmax")
    for example in EXAMPLES[name]:
        check(ROWS[name], example)


def test_every_row_has_an_example() -> None:
    assert set(ROWS) == set(EXAMPLES)


def check(row: operators.Operator, example: Example) -> None:
    check_operator(
        example.target, *example.args, row=row, carries=example.carries, **example.options
    )


# -- Rules that break a law.


@dataclass(frozen=True)
class Negative(rules.Zero):
    nonnegative: ClassVar[bool] = True


@dataclass(frozen=True)
class Reused(rules.Flat):
    reuses_sum: ClassVar[bool] = True


@dataclass(frozen=True)
class Opposed(rules.Gamma):
    def opposed_sum(self, first, own_sum):
        return own_sum - first


@dataclass(frozen=True)
class WrongPlus(rules.ZPlus):
    """Its terms depend on which neurons it is shown together."""

    def groups(self, x, w):
        return [[(x.value - x.value.mean(), w.value)]]


@pytest.mark.parametrize(
    ("rule", "law"),
    [(Negative(), "bounds"), (Reused(), "values"), (Opposed(), "one"), (WrongPlus(), "bounds")],
    ids=lambda value: type(value).__name__ if isinstance(value, Rule) else value,
)
def test_a_broken_rule(rule: Rule, law: str) -> None:
    with pytest.raises(AssertionError, match=f"breaks the law '{law}'"):
        check_rule(rule)


# -- Rows that break a law: an identity whose propagation is broken in one way each.


class Passing(Propagation):
    exclusive = True

    def __init__(self, value: Tensor, output: Tensor) -> None:
        self.value, self.output, self.kept = value, output, torch.zeros_like(output)

    def pull(self, message, wanted, normalized=True):
        return [message]

    def push(self, masses, shape, normalized=True):
        return masses[0]


class Losing(Passing):
    def pull(self, message, wanted, normalized=True):
        return [0.9 * message]


class Bent(Passing):
    def pull(self, message, wanted, normalized=True):
        return [torch.where(message.abs() > 1, 1.0, message)]


class Askew(Passing):
    def push(self, masses, shape, normalized=True):
        return 2 * masses[0]


class Keeping(Passing):
    """It returns what it keeps."""

    exclusive = True

    def pull(self, message, wanted, normalized=True):
        if len(message) > 1:
            return [message]
        if bool(self.kept.isnan().any()):
            return [message + self.kept]
        self.kept.copy_(message[0])
        return [self.kept.unsqueeze(0)]


class Writing(Passing):
    def push(self, masses, shape, normalized=True):
        pushed = masses[0].clone()
        masses[0].zero_()
        return pushed


class Scribbling(Passing):
    def pull(self, message, wanted, normalized=True):
        self.value.add_(1.0)
        return [message]


class Falling(Passing):
    """Its relevance is sent on with the wrong sign, and back: columns still sum to one."""

    nonnegative = True

    def pull(self, message, wanted, normalized=True):
        return [2 * message - message.flip(-1)]

    def push(self, masses, shape, normalized=True):
        return 2 * masses[0] - masses[0].flip(-1)


class Small(Falling):
    nonnegative = False

    def absolute(self):
        return Passing(self.value, self.output)


class Elsewhere(Passing):
    def pull(self, message, wanted, normalized=True):
        return [message.flip(-1)]

    def push(self, masses, shape, normalized=True):
        return masses[0].flip(-1)


class Broken(PassThrough):
    def __init__(self, propagation: type[Passing]) -> None:
        super().__init__("activation")
        self.propagation = propagation

    def prepare(self, call, values, setting):
        output = fill(call, values)()
        return output, self.propagation(values[0], output)


@pytest.mark.parametrize(
    ("propagation", "law"),
    [
        (Losing, "one"),
        (Bent, "linear"),
        (Askew, "transpose"),
        (Keeping, "memory"),
        (Writing, "memory"),
        (Scribbling, "memory"),
        (Falling, "bounds"),
        (Small, "bounds"),
        (Elsewhere, "values"),
    ],
)
def test_a_broken_propagation(propagation: type[Passing], law: str) -> None:
    check_operator(aten.relu, x(2, 3), row=Broken(Passing))
    with pytest.raises(AssertionError, match=f"breaks the law '{law}'"):
        check_operator(aten.relu, x(2, 3), row=Broken(propagation))


class StaysZero(PassThrough):
    def real(self, call, told):
        return told.real(call["self"])


class Halved(PassThrough):
    def frozen(self, call, values, setting):
        return fill(call, values)() / 2


class Neighbours(Layer):
    """It says that its parents lie along no axis."""

    def mixed_axes(self, call, dim):
        return []


class TwiceThrough(Layer):
    def contributions(self, call, values, setting):
        (part,) = super().contributions(call, values, setting)
        channels = part.by_channels
        return [replace(part, by_channels=lambda *given: 2 * channels(*given))]


class OtherWeight(Layer):
    def contributions(self, call, values, setting):
        (part,) = super().contributions(call, values, setting)
        part.w = setting.weight("weight", call["weight"].abs())
        return [part]


class Squaring(WeightedSum):
    passes = ("self",)

    def contributions(self, call, values, setting):
        weight = setting.weight("itself", values[0])
        return [Contribution(Activation(values[0]), weight, torch.mul, lambda factor: factor)]


@pytest.mark.parametrize(
    ("row", "function", "args", "law"),
    [
        (PassThrough("activation"), aten.softmax.int, (x(2, 3), 1), "traits"),
        (PassThrough("activation", at_zero="zero"), aten.cos.default, (x(2, 3) * 0,), "telescopes"),
        (PassThrough("activation", at_zero="ramp"), aten.tanh.default, (x(2, 3),), "telescopes"),
        (Halved("activation", at_zero="zero"), aten.tanh.default, (x(2, 3),), "telescopes"),
        (
            PassThrough("activation", in_place=aten.abs_.default),
            aten.relu.default,
            (x(2, 3),),
            "traits",
        ),
        (
            PassThrough("activation", function=Function(order=1)),
            aten.neg.default,
            (x(2, 3),),
            "traits",
        ),
        (
            PassThrough("activation", function=Function(positive=True)),
            aten.tanh.default,
            (x(2, 3),),
            "traits",
        ),
        (
            PassThrough("activation", function=Function(same=True)),
            aten.tanh.default,
            (x(2, 3),),
            "traits",
        ),
        (StaysZero("activation"), aten.cos.default, (x(2, 3),), "explicit zeros"),
        (Routing("view", ("self",)), aten.tanh.default, (x(2, 3),), "one"),
        (Neighbours("linear"), aten.linear.default, (x(2, 3), x(3, 3)), "traits"),
        (TwiceThrough("linear"), aten.linear.default, (x(2, 3), x(4, 3)), "channels"),
        (OtherWeight("linear"), aten.linear.default, (x(2, 3), x(4, 3)), "one"),
        (Squaring("square"), aten.square.default, (x(2, 3),), "traits"),
    ],
)
def test_a_broken_row(row, function, args, law: str) -> None:
    with pytest.raises(AssertionError, match=f"breaks the law '{law}'"):
        check_operator(function, *args, row=row)


def test_the_message_says_where_and_by_how_much() -> None:
    with pytest.raises(AssertionError, match=r"self\[0, 0\] and the output's \[0, 0\].*off by 1"):
        check_operator(aten.relu, x(2, 3), row=Broken(Elsewhere))


def test_a_module_and_a_function_of_ones_own() -> None:
    class Snake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.full((3,), 2.0))

        def forward(self, given: Tensor) -> Tensor:
            return given + torch.sin(self.alpha * given) ** 2 / self.alpha

    row, model = PassThrough("activation", at_zero="zero"), Snake()
    with pytest.raises(nrm.NrmError, match="has no row"):
        check_operator(model, x(2, 3))
    check_operator(model, x(2, 3), row=row)
    assert model.alpha.dtype is torch.float32  # the module is as it was
    check_operator(operators.operation(row)(cube), x(2, 3))


def cube(given: Tensor) -> Tensor:
    return given**3


# -- A new activation is one entry in one table.


@pytest.fixture
def bessel():
    assert operators.lookup(aten.special_i1.default) is None
    register(PassThrough("activation", at_zero="zero", gate=SQUASHED), "aten.special_i1")
    yield torch.special.i1
    unregister("aten.special_i1")


class Padded(nn.Module):
    """A convolution with its padding before the activation, or in the convolution."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = before
        self.conv = nn.Conv1d(1, 2, 3, padding=0 if before else 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1)) if self.before else x
        return self.conv(torch.special.i1(padded)).flatten(1)


class Gated(nn.Module):
    """An activation times a value, both linear in the input."""

    def __init__(self, activation) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gate, self.value, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.gate(x)) * self.value(x))


def test_a_new_activation_keeps_its_row_s_laws(bessel) -> None:
    check_operator(aten.special_i1, x(2, 3))


def test_a_new_activation_keeps_explicit_zeros(bessel) -> None:
    given = positive(1, 1, 4)
    first, second = (
        nrm.Explainer(Padded(before).double().eval(), rules.Flat())(given, target=0).heatmap()
        for before in (True, False)
    )
    torch.testing.assert_close(first, second)


def test_a_new_activation_is_a_gate(bessel) -> None:
    model, given = Gated(torch.special.i1).double().eval(), x(1, 3)
    R = nrm.Explainer(model, nrm.composites.LRPZero())(given, target=0)
    value, gate = model.value, torch.special.i1(model.gate(given)).detach()
    z = given * value.weight  # [hidden, inputs]: the value takes all
    hidden = model.out.weight[0] * gate[0] * value(given)[0]
    expected = (hidden / hidden.sum())[:, None] * z / z.sum(1, keepdim=True)
    torch.testing.assert_close(R.heatmap()[0], expected.sum(0).detach() * 1.0)


def test_diagnostics_and_first_order_rules_take_a_new_activation(bessel) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), Calls(torch.special.i1), nn.Linear(4, 2))
    model, given = model.double().eval(), x(1, 3)
    for composite in (nrm.composites.LocalLinear(), nrm.composites.LRPZero()):
        R = nrm.Explainer(model, composite, bias="drop")(given, target=1)
        z = given * model[0].weight
        hidden = model[2].weight[1] * torch.special.i1(z.sum(1))
        shares = hidden / hidden.sum()
        expected = (shares[:, None] * z / z.sum(1, keepdim=True)).detach()
        torch.testing.assert_close(R.heatmap()[0], expected.sum(0))
        torch.testing.assert_close(R.marginal("1")[0], shares.detach())
        (variation,) = R.diagnostics().total_variation.tolist()
        assert variation == pytest.approx(float(expected.sum(0).abs().sum()))


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass(frozen=True)
class NoList(Rule):
    def groups(self, x, w):
        return [(x.value, w.value)]


def test_what_is_no_rule() -> None:
    with pytest.raises(TypeError, match=r"as \[\[\(x.value, w.value\)\]\]"):
        check_rule(NoList())
    with pytest.raises(TypeError, match=r"a rule, such as Gamma\(0.25\), not <class"):
        check_rule(rules.Flat)


def test_what_is_no_operator() -> None:
    with pytest.raises(TypeError, match=r"an operator \(torch.ops.aten.tanh, .* not <built-in"):
        check_operator(torch.tanh, x(2, 3))


class Times(nn.Module):
    def forward(self, a, b):
        return a * b


def test_a_row_that_names_no_argument_of_the_call() -> None:
    passed = operators.Product("product")  # to "self" and "other", which a module's call has not
    with pytest.raises(UnsupportedOperatorError, match=r"the call's arguments \(input, input_1\)"):
        check_operator(Times(), x(2, 3), x(2, 3, seed=1), row=passed)


def test_a_function_that_is_not_zero_at_zero() -> None:
    with pytest.raises(AssertionError, match="at_zero='zero' is said of it, but at zero it is 1"):
        check_operator(aten.exp, x(2, 3), row=PassThrough("activation", at_zero="zero"))
