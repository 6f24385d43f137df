"""No memory is written that something else can see: whatever comes out may be overwritten."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support.memory import RULES, poison
from torch import Tensor, nn

import nrm
from nrm import rules
from nrm.operators import table

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


class Everything(nn.Module):
    """Every function of two variables: an input, and one with an axis of size one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = 1.0 * x, self.layers.scale * y
        return torch.cat([f(self.layers, x, y).flatten(1) for f in FUNCTIONS.values()], 1)


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
