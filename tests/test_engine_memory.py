"""No memory is written that something else can see: whatever comes out may be overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from types import CellType, FunctionType, MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nrm
from nrm import composites, rules
from nrm.operators import Contribution, Operator, Propagation, WeightedSum, register, table
from nrm.operators.routing import Routing
from nrm.rules import Activation

# -- every row, every rule: poison what comes out ------------------------------------------------


def picked(x: Tensor) -> Tensor:
    return torch.tensor([[2, 0, 2, 1]], device=x.device).expand(x.shape[0], 3, 4)


def put(x: Tensor, y: Tensor, accumulate: bool) -> Tensor:
    rows = torch.arange(x.shape[0])[:, None]
    return x.index_put((rows, torch.tensor([[0, 2]])), torch.cat([y, y], 1), accumulate)


class Layers(nn.Module):
    """Layers that functions use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bare = nn.Linear(4, 5), nn.Linear(4, 1, bias=False)
        self.conv = nn.Conv1d(3, 2, 3, padding=1)
        self.uneven = nn.Conv1d(3, 2, 2, padding="same", bias=False)
        self.up = nn.ConvTranspose1d(3, 2, 2, stride=3)
        self.batch, self.group = nn.BatchNorm1d(3), nn.GroupNorm(3, 3)
        self.layer, self.instance = nn.LayerNorm(4), nn.InstanceNorm1d(3)
        self.lone = nn.Linear(1, 1, bias=False)
        self.constant, self.scale = nn.Parameter(torch.rand(1, 3, 4)), nn.Parameter(torch.rand(4))
        self.register_buffer("grid", 1.6 * torch.rand(1, 2, 3, 2) - 0.8)


Function = Callable[[Layers, Tensor, Tensor], Tensor]
FUNCTIONS: dict[str, Function] = {
    "linear and relu": lambda m, x, y: torch.relu(m.linear(x)),
    "conv and relu": lambda m, x, y: torch.relu(m.conv(x)),
    "sum and gelu": lambda m, x, y: F.gelu(x + y),
    "transposed conv and tanh": lambda m, x, y: torch.tanh(m.up(x)),
    "relu": lambda m, x, y: torch.relu(x) + y,
    "tanh": lambda m, x, y: torch.tanh(x),
    "view": lambda m, x, y: x.flatten(1).unflatten(1, (2, 6)),
    "permute": lambda m, x, y: x.permute(0, 2, 1),
    "slice": lambda m, x, y: x[:, 1:, ::2],
    "select": lambda m, x, y: x[:, 1],
    "power": lambda m, x, y: x.abs() ** 1.5,
    "flip": lambda m, x, y: x.flip(1),
    "log-softmax": lambda m, x, y: torch.log_softmax(x, -1) + y,
    "Fourier transform": lambda m, x, y: torch.fft.fft(x).real + y,
    "roll": lambda m, x, y: x.roll(1, 2),
    "expand": lambda m, x, y: y.expand(-1, 3, -1),
    "expand to itself": lambda m, x, y: x.expand(-1, 3, -1),
    "repeat": lambda m, x, y: y.repeat(1, 2, 2),
    "unfold": lambda m, x, y: x.unfold(2, 3, 1),
    "diagonal": lambda m, x, y: x.diagonal(0, 1, 2),
    "index": lambda m, x, y: x[:, [0, 0, 2]],
    "gather": lambda m, x, y: x.gather(1, picked(x)),
    "cat": lambda m, x, y: torch.cat([x, y], 1),
    "cat of slices of one": lambda m, x, y: torch.cat([y[..., :1], y[..., 1:2]], -1),
    "cat twice": lambda m, x, y: torch.cat([x, x], 2),
    "stack": lambda m, x, y: torch.stack([x, x * 2], 1),
    "stack of rows": lambda m, x, y: torch.stack([y[:, 0], x[:, 0], y[:, 0]]).transpose(0, 1),
    "unbind": lambda m, x, y: x.unbind(1)[1],
    "split": lambda m, x, y: x.split(2, 2)[0] * x.split(2, 2)[1],
    "chunk": lambda m, x, y: torch.cat(x.chunk(2, 2)[::-1], 2),
    "select scatter": lambda m, x, y: x.select_scatter(y[:, 0], 1, 1),
    "slice scatter": lambda m, x, y: x.slice_scatter(y, 1, 0, 1),
    "scatter": lambda m, x, y: x.scatter(1, picked(x), x * 2),
    "index put": lambda m, x, y: put(x, y, False),
    "index put adding": lambda m, x, y: put(x, y, True),
    "scatter add": lambda m, x, y: x.scatter_add(1, picked(x), x),
    "scatter maximum": lambda m, x, y: x.scatter_reduce(1, picked(x), x, "amax"),
    "index add": lambda m, x, y: x.index_add(1, torch.tensor([0, 0, 1]), x, alpha=2.0),
    "where": lambda m, x, y: torch.where(x > 0, x, y),
    "masked fill": lambda m, x, y: x.masked_fill(torch.ones(3, 4).tril() == 0, 2.0),
    "tril": lambda m, x, y: x.tril(),
    "pad": lambda m, x, y: F.pad(x, (1, 1), value=1.0),
    "pad reflecting": lambda m, x, y: F.pad(x, (1, 1), mode="reflect"),
    "max pool": lambda m, x, y: F.max_pool1d(x, 2),
    "maximum": lambda m, x, y: torch.maximum(x, y),
    "maximum of itself": lambda m, x, y: torch.maximum(x, x),
    "sort": lambda m, x, y: x.sort(-1)[0],
    "amax": lambda m, x, y: x.amax(1),
    "nearest": lambda m, x, y: F.interpolate(x, scale_factor=2.0),
    "interpolated": lambda m, x, y: F.interpolate(x, size=6, mode="linear"),
    "conv": lambda m, x, y: m.conv(x),
    "conv, uneven": lambda m, x, y: m.uneven(x),
    "transposed conv": lambda m, x, y: m.up(x),
    "linear": lambda m, x, y: m.linear(x),
    "linear of one output": lambda m, x, y: m.bare(x),
    "linear of one input": lambda m, x, y: m.lone(m.bare(x)),
    "average pool": lambda m, x, y: F.avg_pool1d(x, 2),
    "mean": lambda m, x, y: x.mean(1, keepdim=True),
    "sum to one": lambda m, x, y: x.sum((1, 2), keepdim=True) + y,
    "sum of one": lambda m, x, y: y.sum(1),
    "cumsum": lambda m, x, y: x.cumsum(2),
    "batch norm": lambda m, x, y: m.batch(x),
    "layer norm": lambda m, x, y: m.layer(x),
    "group norm": lambda m, x, y: m.group(x),
    "instance norm": lambda m, x, y: m.instance(x),
    "rms norm": lambda m, x, y: F.rms_norm(x, (4,)),
    "softmax": lambda m, x, y: x.softmax(-1),
    "logsumexp": lambda m, x, y: x.logsumexp(-1),
    "vector norm": lambda m, x, y: x.norm(dim=-1),
    "product of all": lambda m, x, y: x.prod(-1),
    "grid sample": lambda m, x, y: F.grid_sample(
        x[:, None], m.grid.expand(x.shape[0], -1, -1, -1), align_corners=False
    ),
    "add": lambda m, x, y: x + y,
    "add itself": lambda m, x, y: x + x,
    "add a constant": lambda m, x, y: x + m.constant,
    "sub": lambda m, x, y: x - 2 * y,
    "rsub": lambda m, x, y: 1 - x,
    "mul": lambda m, x, y: x * y,
    "mul itself": lambda m, x, y: x * x,
    "scale": lambda m, x, y: y * m.constant,
    "divide": lambda m, x, y: x / (1 + y.abs()),
    "matmul": lambda m, x, y: x @ y.mT,
    "matmul by itself": lambda m, x, y: x @ x.mT,
    "einsum": lambda m, x, y: torch.einsum("bij,bkj->bik", x, y),
    "attention": lambda m, x, y: F.scaled_dot_product_attention(x, x, x),
}
RULES = {
    "zero": rules.Zero(), "gamma": rules.Gamma(0.25), "zplus": rules.ZPlus(),
    "alphabeta": rules.AlphaBeta(2.0, 1.0), "flat": rules.Flat(), "wsquare": rules.WSquare(),
    "plain": rules.PlainGamma(0.5), "box": rules.ZBox(-9.0, 9.0),
    "occlusion": rules.Occlusion(), "gradients": rules.LocalLinear(),
}  # fmt: skip


class Everything(nn.Module):
    """Every function of two variables: an input, and one with an axis of size one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = 1.0 * x, self.layers.scale * y
        return torch.cat([f(self.layers, x, y).flatten(1) for f in FUNCTIONS.values()], 1)


def tensors_in(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that can be reached from something, closures included."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, int, float, type, torch.dtype)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    inner: list[Any] = []
    if isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, (list, tuple, set, frozenset)):
        inner = list(thing)
    elif isinstance(thing, FunctionType):
        inner = [*(thing.__closure__ or ()), *(thing.__defaults__ or ())]
    elif isinstance(thing, CellType):
        inner = [thing.cell_contents]
    elif isinstance(thing, MethodType):
        inner = [thing.__self__]
    elif isinstance(thing, partial):
        inner = [thing.func, *thing.args, *thing.keywords.values()]
    elif type(thing).__module__.startswith(("nrm", "tests", "test_")):
        inner = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    for part in inner:
        yield from tensors_in(part, seen)


class Watched:
    """Tensors as they were."""

    def __init__(self, *things: Any) -> None:
        self.tensors = list(tensors_in(list(things)))
        self.before = [tensor.detach().clone() for tensor in self.tensors]

    def check(self, what: str) -> None:
        for tensor, before in zip(self.tensors, self.before, strict=True):
            assert torch.equal(tensor.detach().nan_to_num(), before.nan_to_num()), what
            assert torch.equal(tensor.isnan(), before.isnan()), what


def poison_pull(propagation: Propagation, message: Tensor, count: int, where: str) -> None:
    wanted = [True] * count
    kept = [
        part.clone() for part in propagation.send_on(message.clone(), wanted) if part is not None
    ]
    watched = Watched(propagation)  # what is computed when it is first asked for is there now
    pulled = propagation.send_on(message.clone(), wanted)
    parts = [part for part in pulled if part is not None]
    watched.check(f"{where}: pull wrote to what it was prepared with")
    for part, before in zip(parts, kept, strict=True):
        torch.testing.assert_close(part, before, msg=f"{where}: a sibling was overwritten")
        part.fill_(torch.nan)
    watched.check(f"{where}: what pull returned is seen by its state")
    again = propagation.send_on(message.clone(), wanted)
    torch.testing.assert_close(again, kept, msg=f"{where}: another answer the second time")
    for alone in range(count if count > 1 else 0):  # what is not wanted changes nothing
        only = propagation.send_on(message.clone(), [place == alone for place in range(count)])
        torch.testing.assert_close(only[alone], kept[alone])


def poison_push(
    propagation: Propagation, masses: list[Tensor], shape: torch.Size, where: str
) -> None:
    first = propagation.send_up(masses, shape).clone()
    watched = Watched(propagation, masses)
    torch.testing.assert_close(propagation.send_up(masses, shape), first, msg=where)
    watched.check(f"{where}: push wrote to what it was given, or prepared with")


def poison(R: nrm.Measure, only_sums: bool = False) -> None:
    """Poison what comes out of every operation of a measure (or every one that a rule decides)."""
    forward = R.forward_pass
    torch.manual_seed(1)
    with torch.no_grad():
        for operation in R.graph.operations:
            if only_sums and not isinstance(operation.operator, WeightedSum):
                continue
            propagation = forward.propagations[operation]
            shape = forward.shape(operation.output)
            for many, laid_out in ((1, False), (1, True), (3, False)):
                message = torch.randn(many, *shape).double()
                if laid_out:  # as channels last lie
                    message = message.transpose(1, -1).contiguous().transpose(1, -1)
                poison_pull(propagation, message, len(operation.operands), operation.address)
            masses = [
                torch.randn(3, *forward.shape(operand)).double() for operand in operation.operands
            ]
            poison_push(propagation, masses, shape, operation.address)


@cache
def everything() -> nn.Module:
    torch.manual_seed(0)
    return Everything().double().eval()


@pytest.mark.usefixtures("captured_once")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nothing_that_is_seen_is_overwritten(rule: rules.Rule) -> None:
    model = everything()
    torch.manual_seed(0)
    alone = rule not in (RULES["zero"], RULES["gamma"])
    batch = 1 if alone else 2
    x, y = torch.rand(batch, 3, 4).double() + 0.1, torch.randn(batch, 1, 4).double()
    bias = "input" if alone else "drop"
    R = nrm.Explainer(model, rule, bias=bias, head="keep")(x, y, target=0)
    poison(R, rule is not RULES["flat"])
    rows = {type(operation.operator) for operation in R.graph.operations}
    if rule is RULES["zero"]:  # every row of the table is there
        missed = {type(row) for row in table._TABLE.values()} - rows
        assert {row.__name__ for row in missed if row.__module__.startswith("nrm.")} <= {
            "OneOf", "Copy", "GroupedProduct"  # see test_capture_kinds_of_models
        }  # fmt: skip


# -- dense blocks: slices of one gradient --------------------------------------------------------


class Dense(nn.Module):
    """A dense block whose layers grow by some channels each."""

    def __init__(self, growth: int, inputs: int = 1) -> None:
        super().__init__()
        self.a = nn.Linear(inputs, growth, bias=False)
        self.b = nn.Linear(inputs + growth, growth, bias=False)
        self.c = nn.Linear(inputs + 2 * growth, growth, bias=False)
        self.head = nn.Linear(inputs + 3 * growth, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(torch.cat([x, a], 1))
        c = self.c(torch.cat([x, a, b], 1))
        return self.head(torch.cat([x, a, b, c], 1))


@cache
def dense_block(growth: int) -> nn.Module:
    torch.manual_seed(0)
    model = Dense(growth).double().eval()
    for parameter in model.parameters():
        parameter.data.abs_()
    return model


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("growth", [1, 2])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_dense_blocks_lose_nothing(growth: int, rule: rules.Rule) -> None:
    model = dense_block(growth)
    torch.manual_seed(0)
    R = nrm.Explainer(model, rule)(torch.rand(2, 1).double(), target=0)
    torch.testing.assert_close(R.heatmap(), torch.ones(2, 1).double())


def test_flat_shares_of_a_dense_block() -> None:
    """Of the head's three parents each takes a third, and what `b` has is halved."""
    R = nrm.Explainer(Small().double().eval(), rules.Flat())(torch.rand(1, 1).double(), target=0)
    found = R.marginals(layers=["a", "b"])
    torch.testing.assert_close(found["a"], torch.tensor([[1 / 3 + 1 / 6]]).double())
    torch.testing.assert_close(found["b"], torch.tensor([[1 / 3]]).double())
    torch.testing.assert_close(R.heatmap(), torch.ones(1, 1).double())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = (nn.Linear(size, 1, bias=False) for size in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(torch.cat([x, a], 1))
        return self.h(torch.cat([x, a, b], 1))


def test_slices_of_an_average() -> None:
    """The derivative of a mean is one number for all, and slices of it are operands' messages."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            b = self.b(a)
            return torch.cat([a, b, a + b], 1).mean(1, keepdim=True)

    for rule in (rules.Flat(), rules.WSquare()):
        R = nrm.Explainer(Net().double().eval(), rule)(torch.rand(1, 2).double(), target=0)
        torch.testing.assert_close(R.heatmap().sum(), torch.tensor(1.0).double())
        torch.testing.assert_close(R("b"), torch.tensor([0.5]).double())  # 1/3 and half of 1/3


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
