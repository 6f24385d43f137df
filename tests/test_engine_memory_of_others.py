"""Memory that is not the engine's: rows of a user's own, and what callers gave and hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from support.memory import RULES, Watched, poison, tensors_in
from torch import Tensor, nn

import nrm
from nrm import composites, rules
from nrm.operators import Contribution, Operator, Propagation, WeightedSum, register, table
from nrm.operators.routing import Routing
from nrm.rules import Activation

# -- rows of a user's own ------------------------------------------------------------------------


@pytest.fixture
def clean_table() -> Iterator[None]:
    before = dict(table._TABLE)
    yield
    table._TABLE.clear()
    table._TABLE.update(before)


class Both(nn.Module):
    """The sum of two tensors, or what a row says of it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Halves(Propagation):
    """Half for each of two operands, handed out carelessly."""

    def __init__(self, careless: str) -> None:
        self.careless, self.kept = careless, torch.zeros(())

    def pull(self, message: Tensor, wanted: Any, normalized: bool = True) -> list[Tensor | None]:
        half = message.div_(2)
        if self.careless == "keeps":
            if self.kept.shape != half.shape:
                self.kept = torch.empty_like(half)
            self.kept.copy_(half)
            return [self.kept, self.kept]
        if self.careless == "expands":
            whole = half.sum(-1, keepdim=True) / half.shape[-1]
            return [whole.expand(half.shape), whole.expand(half.shape)]
        return [half, half.view(half.shape)] if self.careless == "views" else [half, half]

    def push(self, masses: Any, shape: torch.Size, normalized: bool = True) -> Tensor:
        known = [mass for mass in masses if mass is not None]
        for mass in known:
            mass.div_(2)  # it is told only to read
        return sum(known[1:], known[0])


class HalvesRow(Operator):
    def __init__(self, careless: str) -> None:
        super().__init__("sum")
        self.careless = careless

    def prepare(self, call: Any, values: Any, setting: Any) -> tuple[Tensor, Propagation]:
        return values[0] + values[1], Halves(self.careless)


class Twice(nn.Module):
    """Two branches that meet in a module with a row of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.both, self.head = Both(), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.both(self.left(x), self.right(x))))


@pytest.mark.parametrize("careless", ["same", "views", "keeps", "expands"])
def test_rows_of_a_users_own_may_return_anything(clean_table: None, careless: str) -> None:
    torch.manual_seed(0)
    model = Twice().double().eval()
    model.right.weight.data.copy_(model.left.weight)  # both branches are alike
    register(HalvesRow(careless), Both)
    x = torch.rand(2, 3).double()
    R = nrm.Explainer(model, rules.Gamma(0.25))(x, target=1)
    first = R.heatmap()
    torch.testing.assert_close(first.sum(1), torch.ones(2).double())
    torch.testing.assert_close(R("left"), torch.full((2,), 0.5).double())
    torch.testing.assert_close(R.marginal("left"), R.marginal("right"))
    left = nrm.neurons("left", 0)
    torch.testing.assert_close(R.conditionals(left)["both"], R.conditionals(left)["both"])
    torch.testing.assert_close(R.joint("head", "left"), R.joint("head", "left", method="backward"))
    torch.testing.assert_close(R.heatmap(), first)
    torch.testing.assert_close(R(left, "head"), R.marginal("left")[:, 0])


def test_contributions_of_a_users_own_may_keep_what_they_return(clean_table: None) -> None:
    class Row(WeightedSum):
        passes = ("input",)

        def contributions(self, call: Any, values: Any, setting: Any) -> list[Contribution]:
            kept: dict[torch.Size, Tensor] = {}

            def transpose(message: Tensor, weight: Tensor) -> Tensor:
                if message.shape not in kept:
                    kept[message.shape] = message @ weight
                return kept[message.shape].copy_(message @ weight)

            return [
                Contribution(
                    Activation(values[0]),
                    setting.weight("weight", call["weight"]),
                    apply=lambda factor, weight: factor @ weight.T,
                    uniform=lambda factor: factor.sum(-1, keepdim=True).expand(-1, 3),
                    transpose=transpose,
                )
            ]

    class Own(nn.Linear):
        pass

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Own(3, 3, bias=False), nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(x)) + x

    register(Row("linear"), Own)
    torch.manual_seed(0)
    model, x = Sums().double().eval(), torch.rand(2, 3).double()
    plain = nn.Linear(3, 3, bias=False).double().eval()
    plain.weight = model.a.weight
    for rule in RULES.values():
        if rule is RULES["occlusion"]:
            continue
        R = nrm.Explainer(model, rule)(x, target=0)
        poison(R)
        first = R.heatmap()
        model.a, own = plain, model.a
        expected = nrm.Explainer(model, rule)(x, target=0).heatmap()
        model.a = own
        torch.testing.assert_close(first, expected)


def test_a_users_function_that_returns_its_operand_is_not_overwritten(clean_table: None) -> None:
    """The activation after it writes in place where nothing else reads; here the skip does."""

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape)

    class Row(WeightedSum):
        passes = ("input",)

        def contributions(self, call: Any, values: Any, setting: Any) -> list[Contribution]:
            one = torch.ones((), dtype=values[0].dtype)
            weight = setting.weight("one", one)
            return [Contribution(Activation(values[0]), weight, torch.mul, lambda factor: factor)]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same = nn.Linear(2, 2, bias=False), Same()

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return torch.relu(self.same(h)) + 2 * h

    register(Row("sum"), Same)
    model = Net().double().eval()
    model.first.weight.data = torch.tensor([[1.0, -2.0], [3.0, 1.0]]).double()
    x = torch.ones(1, 2).double()
    R = nrm.Explainer(model, rules.Flat())(x, target=0)
    torch.testing.assert_close(R.output, model(x).detach())  # relu(-1) - 2
    torch.testing.assert_close(R.activations("first"), torch.tensor([[-1.0, 4.0]]).double())


def test_a_users_routing_may_give_all_operands_one_derivative(clean_table: None) -> None:
    register(Routing("where", ("input", "input_1")), Both)  # a poor row: each takes all
    torch.manual_seed(0)
    R = nrm.Explainer(Twice().double().eval(), rules.Flat())(torch.rand(1, 3).double(), target=0)
    poison(R)
    torch.testing.assert_close(R("left"), R("right"))


# -- what callers do -----------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)
        self.act, self.head = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        return self.head(torch.dropout(h, 0.5, False) + self.second(h))


QUERIES: dict[str, Callable[[nrm.Measure], Any]] = {
    "heatmap": lambda R: R.heatmap(),
    "heatmap with a set": lambda R: R.heatmap(nrm.neurons("act", 0)),
    "heatmap given": lambda R: R.heatmap(given=nrm.neurons("act", 0, 1)),
    "of the output": lambda R: R.marginal("output"),
    "of a middle layer": lambda R: R.marginal("act"),
    "marginals": lambda R: R.marginals(),
    "marginals with a set": lambda R: R.marginals(nrm.neurons("act", 0)),
    "nothing comes there": lambda R: R.marginals(nrm.neurons("second", 0), ~nrm.neurons("head", 0)),
    "conditionals": lambda R: R.conditionals(nrm.neurons("input", 1)),
    "joint": lambda R: R.joint("act", "first"),
    "combinations": lambda R: R.joint("head", "act", "first"),
    "heatmaps": lambda R: R.heatmaps([nrm.neurons("act", 0), nrm.neurons("act", 1)]),
    "activations": lambda R: R.activations("act"),
    "relevance": lambda R: R("second"),
    "relevances": lambda R: R.relevances("second", "act"),
    "outcomes": lambda R: R.outcomes("second", nrm.neurons("act", 1)),
    "unnormalised": lambda R: R.heatmap(normalized=False),
    "within": lambda R: R(within=nrm.neurons("act", 0, 1)),
    "biases": lambda R: R.biases(),
    "additive": lambda R: R.additive("act"),
    "channels": lambda R: R.channels("act"),
    "output": lambda R: R.output,
    "scale": lambda R: R.scale,
    "target": lambda R: R.target,
    "the layer's own sum": lambda R: nrm.methods.lrp(R),
}


@cache
def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().double().eval(), torch.rand(2, 3).double()


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    "composite", [composites.CPLRP(), rules.Gamma(0.25), rules.Flat()], ids=str
)
def test_answers_are_the_callers_own(composite: Any) -> None:
    model, x = net()
    R = nrm.Explainer(model, composite)(x, target=[0, 1])
    untouched = nrm.Explainer(model, composite)(x.clone(), target=[0, 1])
    expected = {name: query(untouched) for name, query in QUERIES.items()}
    held = Watched(expected)
    for name, query in QUERIES.items():
        answers = [a for a in tensors_in(query(R)) if a is not None]
        kept = [answer.clone() for answer in answers]
        for place, answer in enumerate(answers):
            torch.testing.assert_close(answer, kept[place], msg=f"{name}: one answer is another's")
            answer.fill_(7 if not answer.is_floating_point() else torch.nan)
        for other, asked in QUERIES.items():
            again, known = list(tensors_in(asked(R))), list(tensors_in(expected[other]))
            torch.testing.assert_close(again, known, msg=f"{other} after {name} was overwritten")
    held.check("an answer was overwritten")


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("composite", [composites.CPLRP(), rules.Gamma(0.25)], ids=str)
def test_what_callers_gave_may_be_overwritten(composite: Any) -> None:
    model, x = net()
    given, mask = torch.rand(2, 2).double(), torch.tensor([True, False, True, False])
    target, weights = torch.tensor([1, 0]), torch.rand(4).double()

    def answers(explained: nrm.Measure, chosen: nrm.NeuronSet) -> list[Tensor]:
        return [explained.heatmap(), explained(chosen), explained.heatmap(chosen), explained.scale]

    explainer = nrm.Explainer(model, composite)
    expected = [
        *answers(explainer(x, output_relevance=given), nrm.mask("act", mask)),
        *answers(explainer(x, target=target), nrm.mask("act", mask)),
        explainer(x, target=target).weighted({"act": weights}),
    ]
    inputs, relevance, chosen, wanted = x.clone(), given.clone(), mask.clone(), target.clone()
    one, two = explainer(inputs, output_relevance=relevance), explainer(inputs, target=wanted)
    drawn = nrm.mask("act", chosen)
    weighed = weights.clone()
    first = two.weighted({"act": weighed})
    for tensor in (inputs, relevance, weighed):
        tensor.fill_(torch.nan)
    chosen.fill_(True)
    wanted.fill_(0)
    torch.testing.assert_close([*answers(one, drawn), *answers(two, drawn), first], expected)


@pytest.mark.usefixtures("captured_once")
def test_bounds_and_baselines_may_be_overwritten() -> None:
    model, x = net()

    def with_bounds(bound: Tensor) -> composites.Composite:
        box = rules.ZBox(bound, bound + 2)
        return composites.Composite([(composites.path("first"), box)], rules.Gamma(0.25))

    for made in (with_bounds, lambda bound: rules.PathIntegrated(bound, steps=4)):
        bound = -torch.rand(3).double()
        composite = made(bound)
        expected = nrm.Explainer(model, made(bound.clone()))(x, target=0).heatmap()
        R = nrm.Explainer(model, composite)(x, target=0)
        bound.fill_(-0.5)
        torch.testing.assert_close(R.heatmap(), expected)
        torch.testing.assert_close(nrm.Explainer(model, composite)(x, target=0).heatmap(), expected)
