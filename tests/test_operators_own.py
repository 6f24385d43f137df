"""Rows of a user's own: for an operator, a function, a module class; and the fallback."""

import pytest
import torch
from torch import Tensor, nn

import nrm
from nrm import rules
from nrm.errors import CaptureError, UnsupportedOperatorError
from nrm.operators import (
    Call,
    Contribution,
    LocalLinear,
    PassThrough,
    Setting,
    WeightedSum,
    operation,
    register,
    table,
)
from nrm.rules import Activation


@pytest.fixture
def clean_table():
    before = dict(table._TABLE)
    yield
    table._TABLE.clear()
    table._TABLE.update(before)


class Snake(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x):
        return x + torch.sin(self.alpha * x) ** 2 / self.alpha


def test_a_module_class(clean_table):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), Snake(), nn.Linear(3, 2)).double().eval()
    x = torch.randn(2, 2, dtype=torch.float64)
    register(PassThrough("activation"), Snake)
    R = nrm.Explainer(model)(x, target=0)
    assert [v.name for v in R.graph.variables] == ["input", "0", "1", "2"]
    torch.testing.assert_close(R.output, model(x).detach())
    torch.testing.assert_close(R.marginal("1"), R.marginal("0"))
    assert model[1].forward.__func__ is Snake.forward  # the user's class is as it was


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return torch.einsum("bi,oi->bo", x, self.weight) * 2


class DoubledRow(WeightedSum):
    passes = ("input",)

    def contributions(self, call: Call, values: list[Tensor], setting: Setting):
        return [
            Contribution(
                Activation(values[0]),
                setting.weight("weight", call["weight"]),
                apply=lambda factor, weight: 2 * factor @ weight.T,
                uniform=lambda factor: factor.sum(-1, keepdim=True).expand(-1, 2),
            )
        ]


def test_a_module_class_with_a_contribution_rule(clean_table):
    torch.manual_seed(0)
    model = Doubled().double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    register(DoubledRow("linear"), Doubled)
    R = nrm.Explainer(model, rules.Gamma(0.25))(x, target=1)
    assert len(R.graph.operations) == 1
    expected = nn.Linear(3, 2, bias=False).double().eval()
    expected.weight.data = 2 * model.weight.data
    torch.testing.assert_close(
        R.heatmap(), nrm.Explainer(expected, rules.Gamma(0.25))(x, target=1).heatmap()
    )


def test_a_function(clean_table):
    @operation(PassThrough("activation"))
    def cube(x: Tensor) -> Tensor:
        return x**3

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 2)

        def forward(self, x):
            return cube(self.first(x))

    model, x = Net().eval(), torch.randn(1, 2)
    assert len(nrm.Explainer(model).graph(x).operations) == 2
    x.requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(cube(x).sum(), x)[0], 3 * x.detach() ** 2
    )  # still differentiable


def test_an_operator(clean_table):
    model = nn.Sequential(nn.Linear(2, 2), _Calls(torch.lgamma)).eval()
    with pytest.raises(UnsupportedOperatorError, match="lgamma"):
        nrm.Explainer(model)(torch.randn(1, 2), target=0)
    register(PassThrough("activation"), torch.ops.aten.lgamma)
    R = nrm.Explainer(model)(torch.randn(1, 2), target=0)
    torch.testing.assert_close(R.marginal("1"), R.marginal("0"))


def test_modules_that_return_several_tensors_are_refused(clean_table):
    class Two(nn.Module):
        def forward(self, x):
            return x.relu(), x.tanh()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            a, b = self.two(x)
            return a + b

    register(PassThrough("activation"), Two)
    with pytest.raises(CaptureError, match="returns 2"):
        nrm.Explainer(Net().eval())(torch.randn(1, 2))
    with pytest.raises(TypeError, match="decorate"):
        register(PassThrough("activation"), lambda x: x)


class _Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.linalg.cross(x, torch.arange(1, 4).to(x).expand_as(x))[..., :1],
        lambda x: torch.special.i0(x)[..., :1],
        lambda x: torch.logcumsumexp(x, -1)[..., 2:],  # its derivative goes by way of logarithms
    ],
    ids=["cross", "i0", "logcumsumexp"],
)
def test_the_fallback_is_local_linear_and_only_by_request(function):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), _Calls(function)).double().eval()
    x = torch.randn(1, 2, dtype=torch.float64)
    with pytest.raises(UnsupportedOperatorError, match="fallback"):
        nrm.Explainer(model)(x, target=0)
    R = nrm.Explainer(model, fallback=LocalLinear())(x, target=0)
    h = model[0](x).detach()
    contributions = h * torch.autograd.functional.jacobian(function, h)[0, 0]
    torch.testing.assert_close(R.marginal("0"), contributions / contributions.sum())
    assert R.diagnostics().worst_cut_deviation < 1e-12


def test_a_module_of_two_inputs_and_two_layers(clean_table):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, x, y):
            return self.a(x) + 2 * self.b(y)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed = Mixed()

        def forward(self, x, y):
            return self.mixed(torch.relu(x), torch.relu(y))

    seen = []

    class Row(LocalLinear):
        def prepare(self, call, values, setting):
            seen.append(sorted(call.arguments))
            return super().prepare(call, values, setting)

    register(Row(), Mixed)
    net = Net().double().eval()
    x, y = torch.rand(1, 2).double(), torch.rand(1, 2).double()
    R = nrm.Explainer(net)(x, y, target=0)
    torch.testing.assert_close(R.output, net(x, y).detach())
    assert R.diagnostics().worst_cut_deviation < 1e-12
    assert seen[0] == ["a.bias", "a.weight", "b.bias", "b.weight", "input", "input_1"]


def test_a_function_may_be_defined_again(clean_table):
    for power in (2, 3):

        @operation(PassThrough("activation"))
        def raised(x: Tensor) -> Tensor:
            return x**power  # noqa: B023

        assert float(raised(torch.tensor(2.0))) == 2.0**power


def test_a_pull_that_hides_its_derivatives_is_found_out():
    """Forward messages are its transpose: they would be wrong without a word."""
    from nrm.errors import QueryError
    from nrm.operators import PassThrough, Propagation, operation

    class Halved(Propagation):
        def pull(self, message, wanted, normalized=True):
            return [message.detach() / 2 + message / 2]

    class Row(PassThrough):
        def prepare(self, call, values, setting):
            output, _ = super().prepare(call, values, setting)
            return output, Halved()

    @operation(Row("activation"))
    def bend(x: torch.Tensor) -> torch.Tensor:
        return x.tanh()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(bend(self.a(x)))

    torch.manual_seed(0)
    R = nrm.Explainer(Net().eval(), nrm.rules.ZPlus())(torch.rand(1, 3), target=0)
    chosen = nrm.neurons("a")
    torch.testing.assert_close(R(chosen), torch.ones(1))  # messages pass as they should
    with pytest.raises(QueryError, match="derivatives by the message"):
        R.conditionals(chosen)
