"""Whole networks against values that no message passing found: closed forms by derivatives.

LRP-0 with biases as inputs is gradient times input on piecewise linear networks, and AttnLRP is
gradient times input of the network whose backward pass its authors wrote out (Achtibat et al.,
2024): an activation passes its secant, a product halves, a norm's scale is held constant.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support import dense
from support.networks import RULES, make
from torch import Tensor, nn

import nrm
from nrm import composites, rules
from nrm.composites import Everywhere

pytestmark = pytest.mark.usefixtures("captured_once")

LRP_0 = Everywhere(rules.Epsilon(1e-30))  # by messages; rules.Zero() goes by derivatives too


class Pooled(nn.Module):
    """Strided, grouped, transposed convolutions, poolings, a batch norm and a skip connection."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.head = nn.Linear(2 * 8 * 8 + 3 * 4 * 4, 3)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.a(x)))
        h = F.max_pool2d(h + F.leaky_relu(self.b(h), 0.2), 2)
        rest = F.avg_pool2d(x, 2) - 0.3
        return self.head(torch.cat([torch.relu(self.up(h)).flatten(1), rest.flatten(1)], 1))


class Recurrent(nn.Module):
    shape = (4, 3)

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.RNN(3, 5, nonlinearity="relu", batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


PIECEWISE_LINEAR = {"pooled": Pooled, "recurrent": Recurrent}


@cache
def piecewise_linear(network: str) -> nn.Module:
    torch.manual_seed(0)
    return PIECEWISE_LINEAR[network]().double().eval()


@pytest.mark.parametrize("rule", ["messages", "derivatives"])
@pytest.mark.parametrize("network", PIECEWISE_LINEAR)
def test_lrp_0_with_biases_is_gradient_times_input(network: str, rule: str) -> None:
    model = piecewise_linear(network)
    torch.manual_seed(0)
    x = torch.randn(2, *model.shape).double().requires_grad_()
    output = model(x)[:, 1]
    parameters = dict(model.named_parameters())
    gradient, *others = torch.autograd.grad(output.sum(), [x, *parameters.values()])
    composite = LRP_0 if rule == "messages" else Everywhere(rules.Zero())
    R = nrm.Explainer(model, composite, bias="input")(x.detach(), target=1)
    torch.testing.assert_close(R.scale, output.detach())
    found = R.heatmap() * R.scale.view(2, *[1] * len(model.shape))
    torch.testing.assert_close(found, (x * gradient).detach(), atol=1e-9, rtol=1e-7)
    # What all biases take together is the rest of the output.
    rest = output.detach() - (x * gradient).detach().flatten(1).sum(1)
    torch.testing.assert_close(sum(R.biases().values()) * R.scale, rest, atol=1e-9, rtol=1e-7)
    # Both samples together: a layer's bias takes bias times its gradient.
    if network == "pooled":
        by_name = dict(zip(parameters, others, strict=True))
        for name in ("b.bias", "head.bias"):
            expected = (by_name[name] * parameters[name]).sum().detach()
            torch.testing.assert_close((R(name) * R.scale).sum(), expected)


class Block(nn.Module):
    """A block of a transformer with a gated perceptron; `lxt`: as AttnLRP's backward pass is."""

    def __init__(self, norm: type[nn.Module], causal: bool, lxt: bool = False) -> None:
        super().__init__()
        self.first, self.second = norm(4), norm(4)
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head, self.causal, self.lxt = nn.Linear(4, 3), causal, lxt
        for one in (self.first, self.second):
            for parameter in one.parameters():
                nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = self.normed(self.first, x)
        q, k, v = (
            layer(h).unflatten(2, (2, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        scores = self.half(torch.matmul, q, k.transpose(2, 3)) * 0.7
        if self.causal:
            above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(above, -torch.inf)
        h = self.half(torch.matmul, scores.softmax(-1), v)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.normed(self.second, x)
        h = self.half(torch.mul, self.secant(F.silu, self.gate(h)), self.up(h))
        return self.head(self.secant(F.gelu, (x + self.down(h)).mean(1)))

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        if not self.lxt:
            return norm(x)
        if isinstance(norm, nn.RMSNorm):
            eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
            scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            return x * scale.detach() * norm.weight
        x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return x * scale.detach() * norm.weight + norm.bias

    def secant(self, function, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x * (function(x) / x).detach() if self.lxt else function(x)

    def half(self, product, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        if not self.lxt:
            return product(a, b)
        return (product(a, b.detach()) + product(a.detach(), b)) / 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_attnlrp_is_what_its_authors_wrote_out(norm: type[nn.Module], causal: bool) -> None:
    torch.manual_seed(0)
    model = Block(norm, causal).double().eval()
    written = Block(norm, causal, lxt=True).double().eval()
    written.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 4).double().requires_grad_()
    output = written(x)[:, 1]
    torch.testing.assert_close(output, model(x)[:, 1])
    (gradient,) = torch.autograd.grad(output.sum(), x)
    fast, slow = (
        nrm.Explainer(model, composite)(x.detach(), target=1)
        for composite in (composites.AttnLRP(), composites.AttnLRP())
    )
    slow.forward_pass.telescope = None
    for R in (fast, slow):
        found = R.heatmap() * R.scale[:, None, None]
        torch.testing.assert_close(found, (x * gradient).detach(), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("composite", ["cp", "attn"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_norm_written_out_is_a_norm(norm: str, composite: str) -> None:
    """Its scale takes nothing, also where the factors of products share (`Uniform`)."""

    class Net(nn.Module):
        def __init__(self, written: bool) -> None:
            super().__init__()
            self.first, self.head, self.written = nn.Linear(3, 4), nn.Linear(4, 2), written
            self.norm = nn.RMSNorm(4, eps=1e-5) if norm == "rms" else nn.LayerNorm(4)
            for parameter in self.norm.parameters():
                nn.init.normal_(parameter)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if not self.written:
                return self.head(self.norm(h))
            if norm == "layer":
                h = h - h.mean(-1, keepdim=True)
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
            h = h * self.norm.weight
            return self.head(h + self.norm.bias if norm == "layer" else h)

    chosen = {"cp": composites.CPLRP(), "attn": composites.AttnLRP()}[composite]
    torch.manual_seed(0)
    one = Net(written=False).double().eval()
    other = Net(written=True).double().eval()
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3).double()
    expected = nrm.Explainer(one, chosen)(x, target=1)
    R = nrm.Explainer(other, chosen)(x, target=1)
    torch.testing.assert_close(R.output, expected.output)
    torch.testing.assert_close(R.heatmap(), expected.heatmap())
    torch.testing.assert_close(R.biases()["first.bias"], expected.biases()["first.bias"])
    torch.testing.assert_close(R.biases()["head.bias"], expected.biases()["head.bias"])


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"flat", "wsquare", "zbox"}))
@pytest.mark.parametrize("network", ["Conv", "Residual"])
def test_columns_and_walks_of_small_networks(network: str, rule: str, bias: str) -> None:
    """What is drawn of every operation, by the rule's formula; and products along all paths."""
    case = make(network, rule, bias == "input", seed=7)
    R = nrm.Explainer(case.model, case.composite, bias=bias)(*case.inputs, target=0)
    checked = dense.check_columns(R, each=4)
    assert {"conv" if network == "Conv" else "sum", "linear", "activation"} <= checked.keys()
    dense.check_walks(R)


def test_the_second_engine_would_notice() -> None:
    """A share that is a little off is found, though all columns still sum to one."""
    case = make("MLP", "gamma", False, seed=7)
    R = nrm.Explainer(case.model, Everywhere(rules.Gamma(0.25)))(*case.inputs, target=0)
    other = nrm.Explainer(case.model, Everywhere(rules.Gamma(0.26)))(*case.inputs, target=0)
    for mine, theirs in zip(R.graph.operations, other.graph.operations, strict=True):
        mine.rule = theirs.rule  # so that the formula is of another rule than the messages
    with pytest.raises(AssertionError, match="layers"):
        dense.check_columns(R)
