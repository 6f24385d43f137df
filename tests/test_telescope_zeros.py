"""One answer on every way: by derivatives and by messages, also where values are exactly zero."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nrm
from nrm import composites, rules

pytestmark = pytest.mark.usefixtures("captured_once")

COMPOSITES = {
    "cp": composites.CPLRP(), "attn": composites.AttnLRP(), "all": composites.LRPAll(),
    "zero": composites.Composite([], rules.Zero(), bias="input"),
}  # fmt: skip


def both_ways(
    model: nn.Module, composite: composites.Composite, *inputs: Tensor, target: int = 0
) -> tuple[nrm.Measure, nrm.Measure]:
    """A measure that goes by derivatives where it can, and one that goes by messages alone."""
    explainer = nrm.Explainer(model, composite)
    fast, slow = explainer(*inputs, target=target), explainer(*inputs, target=target)
    assert fast.forward_pass.telescope is not None
    slow.forward_pass.telescope = None
    return fast, slow


# -- a value that cancels to zero ----------------------------------------------------------------


class Cancels(nn.Module):
    """`n = x - relu(x)` is zero where x is positive, and both of its parents are not."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.ReLU()
        self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        self.a.weight.data = torch.tensor([[1.0, 2.0]])
        self.b.weight.data = torch.tensor([[10.0, 20.0]])

    def forward(self, x: Tensor) -> Tensor:
        r = self.r(x)
        return self.a(r) + self.b(x - r)


@cache
def cancels() -> nn.Module:
    """The same object for all composites: it is captured once."""
    return Cancels().double().eval()


X = torch.tensor([[1.0, 1.0], [-1.0, 2.0]]).double()
"""Of the second sample n is (-1, 0): out = 2 * 2 - 10 * 1 = -6."""
AT_R = torch.tensor([[1 / 3, 2 / 3], [0.0, -4 / 6]]).double()
AT_X = torch.tensor([[1 / 3, 2 / 3], [10 / 6, -4 / 6]]).double()


@pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)
@pytest.mark.parametrize("samples", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["0", "1", "both"])
def test_a_sum_that_cancels_passes_nothing_on(
    composite: composites.Composite, samples: slice
) -> None:
    x, at_r, at_x = X[samples], AT_R[samples], AT_X[samples]
    first = nrm.neurons("r", 0)
    for R in both_ways(cancels(), composite, x):
        torch.testing.assert_close(R("r"), at_r.sum(1))
        torch.testing.assert_close(R.marginal("r"), at_r)
        torch.testing.assert_close(R.marginals()["r"], at_r)
        torch.testing.assert_close(R("r", "a"), at_r.sum(1))
        torch.testing.assert_close(R(~nrm.channels("r", 0, 1)), 1 - at_r.sum(1))
        torch.testing.assert_close(R(first), at_r[:, 0])
        torch.testing.assert_close(R(first, given="a"), at_r[:, 0] / at_r.sum(1))
        torch.testing.assert_close(R.heatmap(), at_x)
        torch.testing.assert_close(R.heatmap("b"), torch.relu(-x) * 10 / 6)
        torch.testing.assert_close(R.channels("r"), at_r)
        torch.testing.assert_close(R.heatmaps(["r", first])[0].sum(1), at_r.sum(1))
        assert R.top("a", "r", k=1)[0].sets[1].members[0].layer == "r"
        assert R.diagnostics().worst_cut_deviation < 1e-12
    strict = nrm.Explainer(cancels(), composite, strict=True)(X[:1], target=0)
    torch.testing.assert_close(strict.marginal("r"), AT_R[:1])


def test_relevance_that_is_given_to_a_zero_is_split_by_messages() -> None:
    """Half of it at each of the two parents of the explained zero."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double().eval()
    model[0].weight.data.copy_(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    model[1].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).double()
    for R in both_ways(model, COMPOSITES["cp"], x):
        assert bool((R.output == 0).all())
        torch.testing.assert_close(R.marginal("0"), torch.full((2, 2), 0.5).double())
        expected = torch.tensor([[1 / 3, 2 / 3], [1.0, 0.0]]).double()
        torch.testing.assert_close(R.heatmap(), expected)


def test_a_norm_of_equal_values() -> None:
    """Nothing is left of them once they are centred, and the norm passes nothing on."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(3, bias=False)
            self.plain, self.normed = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x) + self.normed(self.norm(x))

    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.full((1, 3), 0.7).double()
    weight = model.plain.weight.detach()
    for R in both_ways(model, COMPOSITES["cp"], x):
        assert float(R("norm")) == 0
        torch.testing.assert_close(R.heatmap(), weight / weight.sum())


class Attends(nn.Module):
    """Attention whose queries and keys, or whose values, cancel."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which, self.head = which, nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.stack([-x[..., 1], x[..., 0]], -1)
        if self.which == "scores":
            q, k, v = x, turned, 2 * x
        elif self.which == "values":
            q, k, v = 0 * x, x, x - x.roll(1, -2)
        else:  # a third of each of 1, 1 and -2
            q, k, v = 0 * x, x, x * torch.tensor([[1.0], [1.0], [-2.0]]).to(x)
        h = F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in (q, k, v))).squeeze(1)
        return self.head(h + x).sum(1)


@cache
def attends(which: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Attends(which).to(dtype).eval()


@pytest.mark.parametrize("composite", ["cp", "attn", "all"])
@pytest.mark.parametrize("which", ["scores", "values", "thirds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_within_attention_that_cancel(which: str, composite: str, dtype: torch.dtype) -> None:
    """One operator by derivatives, and written out for messages."""
    x = torch.tensor([[[1.0, 2.0]] * 3]).to(dtype)
    fast, slow = both_ways(attends(which, dtype), COMPOSITES[composite], x)
    torch.testing.assert_close(fast.heatmap(), slow.heatmap())
    torch.testing.assert_close(fast.heatmap(), fast.marginals()["input"])
    total = fast.heatmap().sum() + sum(share.sum() for share in fast.biases().values())
    torch.testing.assert_close(total, torch.ones((), dtype=dtype))


def test_dropout_is_a_variable_of_its_own() -> None:
    """In evaluation it returns what it is given; what flows beside it does not visit it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop = nn.Linear(2, 2, bias=False), nn.Dropout()
            self.head = nn.Linear(2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.head(self.drop(h) + 3 * h)

    class Branching(Net):
        """Captured by a trace: its code looks at values."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.detach().sum()) > -9 else x

    torch.manual_seed(0)
    branching = Branching().double().eval()
    R = nrm.Explainer(branching, rules.Zero())(torch.rand(1, 2).double())
    torch.testing.assert_close(R("drop"), torch.full((1,), 0.25).double())
    for R in both_ways(Net().double().eval(), COMPOSITES["cp"], torch.rand(2, 2).double()):
        torch.testing.assert_close(R("drop"), torch.full((2,), 0.25).double())
        torch.testing.assert_close(R("first"), torch.ones(2).double())


# -- numbers at the ends of their types ----------------------------------------------------------


def test_values_that_count_as_zero() -> None:
    """Sums below the smallest normal number are split evenly by messages."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Linear(2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            r = torch.relu(x)
            return self.b(x - r + 1e-310 * x) + r.sum(1, keepdim=True)

    torch.manual_seed(0)
    for R in both_ways(Net().double().eval(), COMPOSITES["cp"], torch.ones(1, 2).double()):
        torch.testing.assert_close(R.heatmap(), torch.full((1, 2), 0.5).double())
        torch.testing.assert_close(R(":relu"), torch.ones(1).double())
    tiny = nn.Linear(2, 1, bias=False).double().eval()
    tiny.weight.data = torch.tensor([[1e-310, 3e-310]]).double()
    for R in both_ways(tiny, COMPOSITES["cp"], torch.ones(1, 2).double()):
        torch.testing.assert_close(R.heatmap(), torch.full((1, 2), 0.5).double())


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e36])
def test_quotients_at_the_ends_of_single_precision(size: float) -> None:
    model = nn.Linear(2, 1, bias=False).eval()
    model.weight.data = torch.tensor([[1.0, 1e-6]])
    fast, slow = both_ways(model, COMPOSITES["cp"], torch.full((1, 2), size))
    expected = torch.tensor([[1.0, 1e-6]]) / (1 + 1e-6)
    torch.testing.assert_close(fast.heatmap(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(slow.heatmap(), expected)


def test_derivatives_that_overflow_are_left_to_messages() -> None:
    """The derivative of the output by the input is 1e40, its relevance is one."""
    layers = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    for layer, weight in zip(layers, (1e20, 1e20, 1e-38), strict=True):
        layer.weight.data.fill_(weight)
    for R in both_ways(nn.Sequential(*layers).eval(), COMPOSITES["cp"], torch.tensor([[1e-10]])):
        torch.testing.assert_close(R.heatmap(), torch.ones(1, 1))


# -- random networks with exact zeros ------------------------------------------------------------

D, ROWS = 4, 3


class Drawn(nn.Module):
    """A random network of small integers, whose values are often exactly zero."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.steps = [
            (draw.choice(sorted(STEPS)), draw.randrange(10), draw.randrange(10))
            for _ in range(draw.randint(3, 7))
        ]
        for place, (kind, _, _) in enumerate(self.steps):
            made = _LAYERS.get(kind)
            if made is not None:
                self.layers[str(place)] = made(draw.random() < 0.5)
        self.head = nn.Linear(D, 3, bias=draw.random() < 0.5)
        for parameter in self.parameters():
            parameter.data = torch.randint(-2, 3, parameter.shape).double()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for place, (kind, a, b) in enumerate(self.steps):
            p, q = values[-1 - a % min(2, len(values))], values[b % len(values)]
            if str(place) in self.layers:
                p = STEPS[kind](self.layers[str(place)], p, q)
            else:
                p = STEPS[kind](nn.Identity(), p, q)
            values.append(p)
        return self.head(values[-1] + values[-2]).sum(1)


def _attention(layer: nn.Module, p: Tensor, q: Tensor) -> Tensor:
    heads = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in layer(p).chunk(3, -1))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


_LAYERS: dict[str, Callable[[bool], nn.Module]] = {
    "linear": lambda bias: nn.Linear(D, D, bias=bias),
    "cat": lambda bias: nn.Linear(2 * D, D, bias=bias),
    "gate": lambda bias: nn.Linear(D, D, bias=bias),
    "norm": lambda bias: nn.LayerNorm(D, bias=bias),
    "attention": lambda bias: nn.Linear(D, 3 * D, bias=bias),
    "conv": lambda bias: nn.Conv1d(D, D, 3, padding=1, bias=bias),
}
STEPS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "linear": lambda m, p, q: m(p),
    "cat": lambda m, p, q: m(torch.cat([p, q], -1)),
    "gate": lambda m, p, q: p * torch.sigmoid(m(q)),
    "norm": lambda m, p, q: m(p),
    "attention": _attention,
    "conv": lambda m, p, q: m(p.transpose(1, 2)).transpose(1, 2),
    "relu": lambda m, p, q: torch.relu(p),
    "gelu": lambda m, p, q: F.gelu(p),
    "sub": lambda m, p, q: p - q,
    "add": lambda m, p, q: p + q,
    "mul": lambda m, p, q: p * q,
    "softmax": lambda m, p, q: p.softmax(-1) - 1 / D,
    "centre": lambda m, p, q: p - p.mean(1, keepdim=True),
    "copy": lambda m, p, q: p - F.dropout(q, training=False),
    "max": lambda m, p, q: torch.maximum(p, q),
    "rest": lambda m, p, q: p - torch.relu(p),
    "pad": lambda m, p, q: F.pad(p[:, :, 1:], (1, 0)),
}


@pytest.mark.parametrize("seed", [1, 2, 5, 12, 14, 24, 30, 54])
def test_both_ways_agree_on_networks_with_exact_zeros(seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn(seed).double().eval()
    x = torch.randint(-1, 3, (2, ROWS, D)).double()
    x[1] += torch.randn(ROWS, D).double() * (seed % 2)  # zeros in one sample, not in the other
    for name, composite in COMPOSITES.items():
        try:
            explainer = nrm.Explainer(model, composite)
            fast, slow = (explainer(x, target=1) for _ in range(2))
        except nrm.NrmError:  # the output is a constant
            continue
        if fast.forward_pass.telescope is None:
            continue
        slow.forward_pass.telescope = None
        layers = [v.name for v in fast.graph.variables if v.node and v.batch_axis == 0]
        by_messages = slow.marginals(layers=layers)
        alone = explainer(x[:1], target=1)
        for layer in layers:
            where = f"seed {seed}, {name}, {layer}: {model.steps}"
            expected = by_messages[layer]
            close = {"rtol": 1e-9, "atol": 1e-9 * max(1.0, float(expected.abs().sum()))}
            torch.testing.assert_close(fast.marginal(layer), expected, msg=where, **close)
            torch.testing.assert_close(slow.marginal(layer), expected, msg=where, **close)
            torch.testing.assert_close(alone.marginal(layer), expected[:1], msg=where, **close)
            torch.testing.assert_close(fast(layer), expected.flatten(1).sum(1), msg=where, **close)
        for layer in layers[1:-1:2]:
            chosen = nrm.channels(layer, 0)
            torch.testing.assert_close(fast.heatmap(chosen), slow.heatmap(chosen))
            torch.testing.assert_close(fast(chosen, layers[-1]), slow(chosen, layers[-1]))


def test_sets_that_no_walk_passes_together():
    """Layers side by side, and what lies below one of them: zero, whichever way is gone."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x))) + torch.relu(self.b(x))

    torch.manual_seed(0)
    R = nrm.Explainer(Beside().double().eval(), composites.CPLRP())(torch.rand(2, 3).double())
    assert R.forward_pass.telescope is not None
    for sets in (("c", "b"), ("a", "b"), ("c", "a", "b")):
        assert R(*sets).tolist() == [0.0, 0.0]
        assert not R.heatmap(*sets).any()
    assert R.joint("a", "b", by="neuron").abs().max() == 0
