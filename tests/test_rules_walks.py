"""Walks by perturbation and by gradients (section 3.5.3) against all walks, and written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from support import dense
from support import oracle as o
from support.networks import NETWORKS, OCCLUSION, make
from support.pairs import in_pairs
from torch import Tensor, nn
from torch.nn import functional as F

import nrm
from nrm import composites, rules
from nrm.errors import InputError, PositiveSumError, QueryError, UnsupportedOperatorError
from nrm.operators import LocalLinear, Propagation, occlusion

pytestmark = pytest.mark.usefixtures("captured_once")

BIAS = ["drop", "input"]
Walks = list[tuple[frozenset[o.Neuron], float]]


def check(found, expected, walks: Walks) -> None:
    size = max(1.0, sum(abs(r) for _, r in walks))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-10 * size, rtol=0)


def check_queries(explainer: nrm.Explainer, inputs, oracles: list[o.Oracle]) -> None:
    """Marginals, joint and conditional relevance of random sets, unnormalised relevance."""
    R = explainer(*inputs, target=1)
    rng = np.random.default_rng(0)
    net = oracles[0]
    names = [name for name in net.values if not name.endswith(".bias")]
    assert {v.name for v in R.graph.variables} == {*net.values, *net.leaves}
    chosen = []
    for _ in range(8):
        masks = {}
        for name in rng.choice(names, rng.integers(2, 4), replace=False):
            mask = rng.random(len(net.values[name])) < 0.6
            mask[rng.integers(len(mask))] = True
            masks[name] = mask
        chosen.append(masks)
    for sample, oracle in enumerate(oracles):
        walks, raw = oracle.walks(1), oracle.walks(1, normalized=False)
        for name in {*net.values, *net.leaves}:
            size = int(np.prod(R.graph.variable(name).shape[1:]))
            expected = o.marginal(walks, name, size)
            check(R.marginal(name)[sample].flatten(), expected, walks)
        check(sum(R(leaf)[sample] for leaf in net.leaves), 1.0, walks)
        for masks in chosen:
            sets = [
                nrm.mask(name, torch.from_numpy(mask).view(R.graph.variable(name).shape[1:]))
                for name, mask in masks.items()
            ]
            picked = [{(n, int(i)) for i in np.flatnonzero(mask)} for n, mask in masks.items()]
            joint = o.relevance(walks, *picked)
            check(R(*sets)[sample], joint, walks)
            check(R(*sets, normalized=False)[sample], o.relevance(raw, *picked), raw)
            known = o.relevance(walks, *picked[1:])
            if abs(known) > 1e-6:
                conditional = R(sets[0], given=sets[1:])[sample]
                check(conditional * known, joint, walks)


# -- occlusion -----------------------------------------------------------------------------------


@in_pairs("network, bias, rule", NETWORKS, BIAS, OCCLUSION)
def test_occlusion_equals_the_sum_over_walks(network, bias, rule):
    case = make(network, rule, bias == "input", seed=1)
    explainer = nrm.Explainer(case.model, case.composite, bias=bias)
    check_queries(explainer, case.inputs, case.oracles)


class Left(nn.Module):
    """A constant matrix on the left."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return self.w @ x


class Addmm(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return torch.addmm(self.b, x, self.w, beta=0.5, alpha=-2.0)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (1, 4)),
    "linear on positions": (lambda: nn.Linear(4, 3), (1, 5, 4)),
    "matrix on the left": (Left, (1, 4, 5)),
    "addmm": (Addmm, (1, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (1, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0)), (1, 2, 6, 5)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (5, 3), padding="same", dilation=2), (1, 2, 5, 5)),
    "conv2d unread rim": (lambda: nn.Conv2d(2, 3, 2, stride=3, padding="valid"), (1, 2, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3), (1, 3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), (1, 2, 3, 4, 3)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (1, 4, 3, 4),
    ),
    "batch norm": (lambda: nn.BatchNorm2d(3), (1, 3, 4, 4)),
}
FUNCTIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda channels: nn.ReLU(),
    "tanh": lambda channels: nn.Tanh(),
    "prelu": lambda channels: nn.PReLU(channels),
}
"""One with kinks, which has a formula of its own, one that is curved, one of several slopes."""


def written_out(linear: Callable[[Tensor], Tensor], z: Tensor, phi, x: Tensor) -> Tensor:
    """`T~`, `[parents, *output]`, parent by parent."""
    found = []
    for i in range(x.numel()):
        alone = torch.zeros_like(x).flatten()
        alone[i] = x.flatten()[i]
        found.append(phi(z) - phi(z - linear(alone.view(x.shape))))
    return torch.stack(found)


@in_pairs("layer, function, chunk", LAYERS, FUNCTIONS, [1, 40, 2**20])
def test_contributions_of_every_layer(layer, function, chunk, monkeypatch):
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    first, x = build(), torch.randn(shape)
    if isinstance(first, nn.BatchNorm2d):
        for tensor in (first.running_mean, first.weight, first.bias):
            nn.init.normal_(tensor)
    phi = FUNCTIONS[function](first.eval()(x).shape[1])
    model, x = nn.Sequential(first, phi).double().eval(), x.double()
    with torch.no_grad():
        z, bias = first(x), first(torch.zeros_like(x))
        lost = written_out(lambda v: first(v) - bias, z, phi, x)
        lost_bias = phi(z) - phi(z - bias)
        message = torch.randn(2, *z.shape).double()
    monkeypatch.setattr(occlusion, "CHUNK", chunk)
    R = nrm.Explainer(model, rules.Occlusion(), bias="input")(x)
    operation = R.graph.variable("0").producer
    propagation = R.forward_pass.propagations[operation]
    wanted = [True] * len(operation.operands)
    below, *late = propagation.pull(message.clone(), wanted, False)
    torch.testing.assert_close(below.flatten(1), torch.einsum("i...,k...->ki", lost, message))
    if operation.late_leaf == "bias":
        torch.testing.assert_close(late[0], lost_bias * message)
    torch.testing.assert_close(dense.column_sums(R, operation), lost.sum(0) + lost_bias)
    torch.testing.assert_close(propagation.magnitude(), lost.abs().sum(0) + lost_bias.abs())
    masses = [torch.randn(2, *x.shape).double(), *(None for _ in late)]
    pushed = propagation.push(masses, z.shape, False)
    torch.testing.assert_close(pushed, torch.einsum("i...,ki->k...", lost, masses[0].flatten(1)))


def test_a_layer_larger_than_a_chunk():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Flatten()).eval()
    x = torch.randn(1, 16, 48, 48)
    explainer = nrm.Explainer(model, composites.Occlusion(rest_to_bias=False))
    R = explainer(x, target=70_000)
    operation = R.graph.variable("0").producer
    whole = model[0](x).numel()
    assert whole * 16 > occlusion.CHUNK  # not even one offset of the kernel at once
    with torch.no_grad():
        z = model[0](x)
        windows = F.unfold(x, 3, padding=1)[0].T  # all connections: positions, parents
        z_ij = torch.einsum("pt,ot->opt", windows, model[0].weight.flatten(1))
        flat = z.flatten(2)[0, :, :, None]
        sums = (flat.clamp(min=0) - (flat - z_ij).clamp(min=0)).sum(-1)
        bias = model[0].bias[:, None]
        sums += flat[..., 0].clamp(min=0) - (flat[..., 0] - bias).clamp(min=0)
    found = dense.column_sums(R, operation).flatten(2)[0]
    torch.testing.assert_close(found, sums, atol=1e-4, rtol=1e-4)


def test_occlusion_by_hand():
    """An active rectified neuron: min(z_ij, z_j), here of -1, 2, 4 and the bias -2; z = 3."""
    layer = nn.Linear(3, 1)
    layer.weight.data = torch.tensor([[-1.0, 2.0, 4.0]])
    layer.bias.data = torch.tensor([-2.0])
    model, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.ones(1, 3)
    R = nrm.Explainer(model, composites.Occlusion(rest_to_bias=False))(x, target=0)
    torch.testing.assert_close(R.heatmap(), torch.tensor([[-1.0, 2.0, 3.0]]) / 2)
    torch.testing.assert_close(R("0.bias"), torch.tensor([-1.0]))
    R = nrm.Explainer(model, rules.Occlusion())(x, target=0)
    torch.testing.assert_close(R.heatmap(), torch.tensor([[-1.0, 2.0, 3.0]]) / 4)
    (met,) = [c for c in R.diagnostics(tolerance=0.9).columns if c.address == "0"]
    assert met.smallest == pytest.approx(4 / 6)
    assert met.nearly_zero == 1.0
    R = nrm.Explainer(model, composites.Occlusion())(x, target=0)
    torch.testing.assert_close(R.heatmap(), torch.tensor([[-1.0, 2.0, 3.0]]) / 3)
    torch.testing.assert_close(R("0.bias"), torch.tensor([-1.0]) / 3)  # 3 - (-1 + 2 + 3)
    heavy = nn.Sequential(nn.Linear(2, 1), nn.ReLU()).eval()
    heavy[0].weight.data, heavy[0].bias.data = torch.tensor([[-5.0, 1.0]]), torch.tensor([6.0])
    strict = nrm.Explainer(heavy, rules.Occlusion(), strict=True)(torch.ones(1, 2), target=0)
    with pytest.raises(PositiveSumError, match="'0'"):
        strict.heatmap()


@pytest.mark.parametrize(
    ("act", "z"), [(nn.GELU(), -5.0), (nn.SiLU(), -10.0), (nn.SiLU(), -14.0), (nn.Softplus(), -9.0)]
)
def test_occlusion_of_neurons_in_the_tail_of_an_activation(act, z):
    """What they take from the next neuron is less than the rounding of its activation."""
    found = []
    for dtype in (torch.float32, torch.float64):
        lower, upper = nn.Linear(1, 1), nn.Linear(1, 1)
        model = nn.Sequential(lower, act, upper, act).to(dtype).eval().requires_grad_(False)
        lower.weight.fill_(-9.0)
        lower.bias.fill_(z + 9)
        upper.weight.fill_(1.0)
        upper.bias.fill_(1.0)
        R = nrm.Explainer(model, composites.Occlusion())(torch.ones(1, 1, dtype=dtype), target=0)
        found.append(float(R.heatmap()))
    assert abs(found[1]) > 0.01
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_only_an_activation_that_alone_reads_the_sum_follows_it():
    class Net(nn.Module):
        def __init__(self, read_twice):
            super().__init__()
            self.lin, self.read_twice = nn.Linear(3, 3), read_twice

        def forward(self, x):
            h = self.lin(x)
            return torch.relu(h) + h if self.read_twice else torch.relu(h)

    x = torch.ones(1, 3).double()
    # Contributions 2, -1 and 0.5 to 1.5: of what is rectified, at most 1.5 can be lost.
    shares = {True: [4 / 3, -2 / 3, 1 / 3], False: [1.5, -1.0, 0.5]}
    for read_twice in (True, False):
        net = Net(read_twice).double().eval()
        with torch.no_grad():
            net.lin.weight.copy_(torch.tensor([2.0, -1.0, 0.5]))
            net.lin.bias.zero_()
        R = nrm.Explainer(net, rules.Occlusion())(x, target=0)
        following = R.graph.activation_after(R.graph.variable("lin").producer)
        assert [op.address for op in following] == ([] if read_twice else [":relu"])
        torch.testing.assert_close(R.heatmap()[0].tolist(), shares[read_twice])
    R = nrm.Explainer(nn.Linear(3, 2).double().eval(), rules.Occlusion())(x, target=0)
    assert R.graph.activation_after(R.graph.variable("output").producer) == ()


def test_batch_norm_between_a_layer_and_its_activation_is_part_of_the_layer():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(tensor)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    model = model.double().eval()
    folded = nn.Sequential(nn.utils.fusion.fuse_conv_bn_eval(model[0], norm), *model[2:]).eval()
    x = torch.randn(2, 2, 4, 4).double()
    for bias in BIAS:
        found, expected = (
            nrm.Explainer(m, rules.Occlusion(), bias=bias)(x, target=1).heatmap()
            for m in (model, folded)
        )
        torch.testing.assert_close(found, expected)


def test_sums_without_known_connections_are_refused_before_an_activation_only():
    pool = nn.Sequential(nn.AvgPool1d(2), nn.ReLU(), nn.Linear(2, 2)).eval()
    x = torch.randn(1, 3, 4)
    with pytest.raises(UnsupportedOperatorError, match=r"avg_pool1d.*'0'.*path"):
        nrm.Explainer(pool, rules.Occlusion())(x, target=(0, 0))
    other = composites.Composite([(composites.path("0"), rules.Zero())], rules.Occlusion())
    R = nrm.Explainer(pool, other)(x, target=(0, 0))
    torch.testing.assert_close(R.heatmap().sum(), torch.tensor(1.0))
    nrm.Explainer(pool[:1].eval(), rules.Occlusion())(x, target=(0, 0)).heatmap()


# -- gradients -----------------------------------------------------------------------------------


@dataclass
class Gradients(o.Oracle):
    """An oracle whose contributions are derivatives, found by complex steps.

    `start` and `steps` say the path; without steps it is the local linearisation.
    """

    start: float = 0.0
    steps: int = 0
    way: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def given(self, name: str, x: np.ndarray) -> None:
        self.input(name, x)
        times = np.arange(self.steps + 1) / self.steps if self.steps else [1.0]
        self.way[name] = [self.start + t * (x.ravel() - self.start) for t in times]

    def elementwise_on(self, name: str, x: str, f: Callable[[np.ndarray], np.ndarray]) -> None:
        self.identity(name, x, f)
        self.way[name] = [f(v) for v in self.way[x]]

    def picked(self, name: str, x: str, indices: list[int]) -> None:
        self.pick(name, [(x, i) for i in indices])
        self.way[name] = [v[indices] for v in self.way[x]]

    def function(
        self,
        name: str,
        f: Callable[..., np.ndarray],
        *operands: str,
        bias: np.ndarray | None = None,
        flat: bool = False,
    ) -> None:
        """`f` of several operands plus a bias; `flat`: columns of zero end in a leaf."""
        shift = 0.0 if bias is None else bias
        points = list(zip(*(self.way[x] for x in operands), strict=True))
        self.way[name] = [f(*point) + shift for point in points]
        self.values[name] = self.way[name][-1]
        if self.steps:
            ends = pairwise(points)
            steps = [
                ([(a + b) / 2 for a, b in zip(p, q, strict=True)],
                 [b - a for a, b in zip(p, q, strict=True)])
                for p, q in ends
            ]  # fmt: skip
        else:
            steps = [(points[0], points[0])]
        size = len(self.values[name])
        found = [np.zeros((len(self.values[x]), size)) for x in operands]
        for middle, move in steps:
            for k, point in enumerate(middle):
                for i in range(len(point)):
                    nudged = [p.astype(complex) for p in middle]
                    nudged[k][i] += 1e-30j
                    found[k][i] += f(*nudged).imag / 1e-30 * move[k][i]
        late = "bias" if bias is not None and self.bias_is_input else "flat" if flat else None
        if late:
            self.leaves.append(f"{name}.{late}")
        for j in range(size):
            column = [
                o.Parent((x, i), 1.0, found[k][i, j])
                for k, x in enumerate(operands)
                for i in range(len(self.values[x]))
                if flat or self.connected(f, operands, k, i, j)
            ]
            if late:
                added = float(bias[j]) if late == "bias" and not self.steps else 0.0
                if flat and abs(sum(p.weight for p in column) + added) <= self.rounding(name, j):
                    column, added = [o.Parent(p.neuron, 1.0, 0.0) for p in column], 1.0
                column.append(o.Parent((f"{name}.{late}", j), 1.0, added))
            self.parents[name, j] = column
        self.rules[name], self.output = o.fixed, name

    def rounding(self, name: str, j: int) -> float:
        return max(4 * 2.0**-52 * abs(float(self.values[name][j])), 1e-150)

    def connected(self, f, operands, k: int, i: int, j: int) -> bool:
        ends = [self.values[x].astype(complex) for x in operands]
        ends[k][i] += 1j
        return f(*ends)[j].imag != 0


def linear(net: Gradients, name: str, layer: nn.Linear, x: str, positions: int = 1) -> None:
    w, b = (t.detach().numpy() for t in (layer.weight, layer.bias))

    def f(v: np.ndarray) -> np.ndarray:
        return (v.reshape(positions, -1) @ w.T).ravel()

    net.function(name, f, x, bias=np.tile(b, positions))


def softmax(v: np.ndarray) -> np.ndarray:
    powers = np.exp(v - v.real.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


class GatedNorm(nn.Module):
    """A gate, a layer norm, a quotient of two variables."""

    inputs = ((3,),)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.norm = nn.LayerNorm(3, eps=0.5)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        gate = torch.sigmoid(self.b(x))
        h = self.norm(self.a(x).tanh() * gate)
        return self.head(h / (gate + 1) + h)

    def describe(self, x: list[np.ndarray], net: Gradients) -> None:
        net.given("input", x[0])
        linear(net, "a", self.a, "input")
        linear(net, "b", self.b, "input")
        net.elementwise_on(":sigmoid", "b", sigmoid)
        net.elementwise_on(":tanh", "a", np.tanh)
        net.function(":mul", lambda a, b: a * b, ":tanh", ":sigmoid", flat=True)
        gain, shift = (t.detach().numpy() for t in (self.norm.weight, self.norm.bias))

        def norm(v: np.ndarray) -> np.ndarray:
            centred = v - v.mean()
            return gain * centred / np.sqrt((centred**2).mean() + 0.5)

        net.function("norm", norm, ":mul", bias=shift, flat=True)
        if net.bias_is_input:
            net.function(":add", lambda v: v, ":sigmoid", bias=np.ones(3))
        else:
            net.elementwise_on(":add", ":sigmoid", lambda v: v + 1)
        net.function(":div", lambda a, b: a / b, "norm", ":add", flat=True)
        net.function(":add@1", lambda a, b: a + b, ":div", "norm")
        linear(net, "head", self.head, ":add@1")


class Attend(nn.Module):
    """One head of attention over two positions; its head is rectified."""

    inputs = ((2, 2),)

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        scores = self.q(x) @ self.k(x).mT
        return self.head(torch.relu((scores.softmax(-1) @ self.v(x)).flatten(1)))

    def describe(self, x: list[np.ndarray], net: Gradients) -> None:
        net.given("input", x[0])
        for name in "qkv":
            linear(net, name, getattr(self, name), "input", 2)
        net.picked(MT, "k", [0, 2, 1, 3])

        def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return (a.reshape(2, 2) @ b.reshape(2, 2)).ravel()

        net.function(":matmul", product, "q", MT, flat=True)
        net.function(":softmax", lambda v: softmax(v.reshape(2, 2)).ravel(), ":matmul", flat=True)
        net.function(":matmul@1", product, ":softmax", "v", flat=True)
        net.picked(":flatten", ":matmul@1", [0, 1, 2, 3])
        net.elementwise_on(":relu", ":flatten", lambda v: np.maximum(v, 0))
        linear(net, "head", self.head, ":relu")


MT = ":mT"


class Pooled(nn.Module):
    """A winner that changes on the way, a norm without centring, a logarithm of a softmax."""

    inputs = ((1, 4),)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 1), nn.RMSNorm(2, eps=0.5)
        self.head = nn.Linear(4, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        h = self.norm(F.max_pool1d(self.conv(x), 2))
        return self.head(h.flatten(1)).log_softmax(-1)

    def describe(self, x: list[np.ndarray], net: Gradients) -> None:
        net.given("input", x[0])
        w, b, gain = (
            t.detach().numpy() for t in (self.conv.weight, self.conv.bias, self.norm.weight)
        )
        bias = np.repeat(b, 4)
        net.function("conv", lambda v: np.outer(w.ravel(), v).ravel(), "input", bias=bias)

        def largest(v: np.ndarray) -> np.ndarray:
            pairs = v.reshape(4, 2)
            return pairs[np.arange(4), pairs.real.argmax(1)]

        if net.steps:
            net.function(":max_pool1d", largest, "conv", flat=True)
        else:
            pairs = net.values["conv"].reshape(4, 2)
            net.picked(":max_pool1d", "conv", (2 * np.arange(4) + pairs.argmax(1)).tolist())

        def norm(v: np.ndarray) -> np.ndarray:
            rows = v.reshape(2, 2)
            return (gain * rows / np.sqrt((rows**2).mean(1, keepdims=True) + 0.5)).ravel()

        net.function("norm", norm, ":max_pool1d", flat=True)
        net.picked(":flatten", "norm", [0, 1, 2, 3])
        linear(net, "head", self.head, ":flatten")
        net.function(":log_softmax", lambda v: np.log(softmax(v)), "head", flat=True)


CURVED = {net.__name__: net for net in (GatedNorm, Attend, Pooled)}
GRADIENTS: dict[str, tuple[rules.Rule, float, int]] = {
    "local": (rules.LocalLinear(), 0.0, 0),
    "path": (rules.PathIntegrated(0.3, 3), 0.3, 3),
    "one step": (rules.PathIntegrated(steps=1), 0.0, 1),
}


@cache
def gradient_model(network: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(3)
    model = CURVED[network]().double().eval()
    return model, [torch.randn(2, *shape).double() for shape in model.inputs]


def gradient_case(network: str, bias_is_input: bool, start: float, steps: int):
    model, inputs = gradient_model(network)
    oracles = []
    for sample in range(2):
        net = Gradients(bias_is_input, start=start, steps=steps)
        model.describe([x[sample].numpy() for x in inputs], net)
        oracles.append(net)
    with torch.no_grad():
        expected = model(*inputs).numpy()
    found = np.stack([net.values[net.output] for net in oracles])
    np.testing.assert_allclose(found, expected, atol=1e-12)  # the description is right
    return model, inputs, oracles


@in_pairs("network, rule, bias", CURVED, GRADIENTS, BIAS)
def test_gradient_walks_equal_the_sum_over_walks(network, rule, bias):
    chosen, start, steps = GRADIENTS[rule]
    model, inputs, oracles = gradient_case(network, bias == "input", start, steps)
    check_queries(nrm.Explainer(model, chosen, bias=bias, head="keep"), inputs, oracles)


@pytest.mark.parametrize("network", CURVED)
def test_contributions_along_a_path_add_up_to_the_change(network):
    """Completeness: column sums converge to `y(x) - y(x')`, as the square of the step."""
    model, inputs, _ = gradient_case(network, False, 0.0, 0)
    moved = nrm.Explainer(model, rules.LocalLinear())(*inputs, target=0).graph
    operators = {op.address for op in moved.operations if isinstance(op.operator, LocalLinear)}
    errors: dict[str, list[float]] = {address: [] for address in operators}
    with torch.no_grad():
        values = [_values(model, moved, x) for x in (inputs[0], torch.zeros_like(inputs[0]))]
    for steps in (16, 32, 64):
        composite = composites.IntegratedGradients(steps=steps)
        R = nrm.Explainer(model, composite)(*inputs, target=0)
        for address in operators:
            operation = R.graph.variable(address).producer
            sums = R.forward_pass.propagations[operation].sums
            change = values[0][address] - values[1][address]
            errors[address].append(float((sums - change).abs().max()))
    for coarse, finer, finest in errors.values():
        assert finest <= max(0.3 * finer, 1e-12)
        assert finer <= max(0.3 * coarse, 1e-12)
    linear = [op for op in R.graph.operations if op.kind in ("linear", "conv")]
    for operation in linear:
        sums = dense.column_sums(R, operation)
        change = values[0][operation.address] - values[1][operation.address]
        torch.testing.assert_close(sums, change)


def _values(model: nn.Module, graph, x: Tensor) -> dict[str, Tensor]:
    """The values of all operations."""
    captured = graph.captured
    values = dict(captured.constants) | {captured.inputs[0]: x}
    for node in captured.graph.nodes:
        if node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return {v.name: values[v.node] for v in graph.variables if v.producer is not None}


def test_rectified_networks_along_a_path_are_lrp_on_differences():
    """`R(i|j) = w_ij (a_i - a'_i) / (z_j - z'_j)`, whatever the steps."""
    case = make("Residual", "zero", False, seed=5)
    (x,) = case.inputs
    baseline = torch.randn(3).double()
    found = [
        nrm.Explainer(case.model, composites.IntegratedGradients(baseline, steps))(x, target=1)
        for steps in (1, 5)
    ]
    torch.testing.assert_close(found[0].heatmap(), found[1].heatmap())
    from_zero = nrm.Explainer(case.model, composites.IntegratedGradients())(x, target=1)
    assert not torch.allclose(from_zero.heatmap(), found[0].heatmap())
    net, w = case.model, case.model.last.weight.detach()
    with torch.no_grad():
        h, start = ({}, {})
        for values, at in ((h, x), (start, baseline.expand_as(x))):
            handle = net.last.register_forward_hook(
                lambda m, i, out, v=values: v.update(a=i[0], z=out)
            )
            net(at)
            handle.remove()
    expected = w[1] * (h["a"] - start["a"]) / (h["z"] - start["z"])[:, 1:]
    torch.testing.assert_close(found[0].marginal(":add@1"), expected)


def test_local_linear_is_lrp_zero_where_there_are_only_sums_and_activations():
    case = make("Conv", "zero", True, seed=1)
    found, expected = (
        nrm.Explainer(case.model, composite)(*case.inputs, target=0)
        for composite in (composites.LocalLinear(), composites.CPLRP())
    )
    torch.testing.assert_close(found.heatmap(), expected.heatmap())
    torch.testing.assert_close(found.heatmap("b"), expected.heatmap("b"))


def test_everywhere_a_gradient_is_the_composite_of_that_name():
    model, inputs, _ = gradient_case("Attend", True, 0.0, 0)
    one = nrm.Explainer(model, rules.LocalLinear(), bias="input")(*inputs, target=0)
    other = nrm.Explainer(model, composites.LocalLinear())(*inputs, target=0)
    torch.testing.assert_close(one.heatmap(), other.heatmap())
    assert {"q", "k"} <= {v.name for v in one.graph.variables}  # no gate is left out


def test_operators_without_a_row_go_along_the_path_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(torch.lgamma(self.lin(x) + 4))

    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.rand(1, 2).double()
    explainer = nrm.Explainer(
        model, composites.IntegratedGradients(steps=200), fallback=LocalLinear()
    )
    R = explainer(x, target=0)
    operation = R.graph.variable(":lgamma").producer
    with torch.no_grad():
        change = torch.lgamma(model.lin(x) + 4) - torch.lgamma(model.lin(0 * x) + 4)
    torch.testing.assert_close(
        R.forward_pass.propagations[operation].sums, change, atol=1e-6, rtol=1e-6
    )


def test_baselines():
    case = make("TwoInputs", "zero", False, seed=1)
    x, y = case.inputs
    same = [
        composites.IntegratedGradients(b)
        for b in (
            0.5,
            np.float32(0.5),
            np.full(1, 0.5),
            {"y": 0.5, "x": torch.tensor(0.5)},
            {"x": torch.full((2,), 0.5), "y": np.full((2, 3), 0.5)[::-1]},
        )
    ]
    heat = [nrm.Explainer(case.model, c)(x, y, target=0).heatmap(at="y") for c in same]
    for other in heat[1:]:
        torch.testing.assert_close(heat[0], other)
    with pytest.raises(InputError, match=r"\(5,\) does not broadcast to 'x'"):
        nrm.Explainer(case.model, composites.IntegratedGradients(torch.ones(5)))(
            x, y, target=0
        ).heatmap(at="x")
    for wrong in ({"x": 0}, {"x": 0, "y": 0, "z": 0}, {"x": 0, "last": 0}, {}):
        given = ", ".join(map(repr, wrong)) or "none"
        with pytest.raises(InputError, match=f"given for {given}, and the inputs are 'x', 'y'"):
            nrm.Explainer(case.model, composites.IntegratedGradients(wrong))(x, y, target=0)
    for values in (float("nan"), np.array([0, np.inf]), {"x": 0, "y": torch.tensor(-np.inf)}):
        with pytest.raises(InputError, match="NaN or infinite"):
            rules.PathIntegrated(values)
    for values in ([0.0, 0.0], "x", None, {"x": {"y": 0}}):
        with pytest.raises(TypeError, match="a mapping from the names"):
            rules.PathIntegrated(values)
    with pytest.raises(ValueError, match="steps"):
        rules.PathIntegrated(steps=0)
    two = composites.Composite(
        [(composites.path("last"), rules.PathIntegrated(1.0))], rules.PathIntegrated()
    )
    with pytest.raises(QueryError, match="2 different paths"):
        nrm.Explainer(case.model, two)(x, y, target=0)
    at_baseline = nrm.Explainer(case.model, composites.IntegratedGradients({"y": y, "x": x}))(
        x, y, target=0
    )
    torch.testing.assert_close(at_baseline("x") + at_baseline("y"), torch.ones(2).double())


def test_equal_paths_are_one():
    def path(size: int = 3, steps: int = 4) -> rules.PathIntegrated:
        return rules.PathIntegrated({"x": 0, "y": np.zeros(size)}, steps)

    assert path() == path()
    assert len({path(), path(), path(4), path(steps=5), rules.PathIntegrated(0.0, 4)}) == 4
    assert rules.PathIntegrated(0, 4) == rules.PathIntegrated(np.float32(0), 4)
    assert rules.PathIntegrated(torch.zeros(2)) == rules.PathIntegrated(torch.zeros(2))
    assert rules.PathIntegrated(torch.zeros(2)) != rules.PathIntegrated(torch.ones(2))
    assert rules.PathIntegrated(torch.zeros(2)) != rules.PathIntegrated(0.0)
    case = make("TwoInputs", "zero", False, seed=1)
    twice = composites.Composite(
        [(composites.path("last"), rules.PathIntegrated(0.5, 4))], rules.PathIntegrated(0.5, 4)
    )
    one = composites.IntegratedGradients(0.5, 4)
    found, expected = (
        nrm.Explainer(case.model, c)(*case.inputs, target=0).heatmap(at="x") for c in (twice, one)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_baselines_by_name_reach_their_inputs(by_keyword):
    """Whatever the order: of the signature, of keywords, with embeddings and ignored inputs."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, ids, ignored, a, b):
            return self.head(self.words(ids).sum(1) + a + 2 * b)

    torch.manual_seed(0)
    model, ids = Net().double().eval(), torch.tensor([[1, 4, 4], [0, 2, 3]])
    ignored, a, b = (torch.randn(2, 3).double() for _ in range(3))
    starts = {"b": 0.3, "words": torch.randn(3).double(), "ignored": 0.0, "a": np.full(3, -0.2)}
    explainer = nrm.Explainer(model, composites.IntegratedGradients(starts))
    R = (
        explainer(ids, b=b, a=a, ignored=ignored, target=1)
        if by_keyword
        else explainer(ids, ignored, a, b, target=1)
    )
    with torch.no_grad():
        w = model.head.weight[1]
        parts = {
            "words": ((model.words(ids) - starts["words"]) * w).sum((1, 2)),
            "a": ((a + 0.2) * w).sum(1),
            "b": 2 * ((b - 0.3) * w).sum(1),
        }
    for name, part in parts.items():
        torch.testing.assert_close(R(name), part / sum(parts.values()))
    del starts["words"]
    with pytest.raises(InputError, match="Give one for each"):
        nrm.Explainer(model, composites.IntegratedGradients(starts))(ids, ignored, a, b)


def test_tokens_come_from_a_baseline_as_embeddings():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, ids):
            h = self.words(ids)
            return self.head((h * h).sum(1))

    torch.manual_seed(0)
    model, ids = Net().double().eval(), torch.tensor([[1, 4, 4], [0, 2, 3]])
    R = nrm.Explainer(model, composites.IntegratedGradients(0.25))(ids, target=1)
    with torch.no_grad():
        parts = (model.words(ids) ** 2 - 0.25**2) * model.head.weight[1]
    torch.testing.assert_close(R.tokens(), parts.sum(-1) / parts.sum((1, 2))[:, None])


@pytest.mark.parametrize("network", CURVED)
@pytest.mark.parametrize("rule", GRADIENTS)
def test_forward_messages_are_the_transpose(network, rule):
    model, inputs, _ = gradient_case(network, False, 0.0, 0)
    R = nrm.Explainer(model, GRADIENTS[rule][0], bias="input")(*inputs, target=0)
    for operation in R.graph.operations:
        propagation = R.forward_pass.propagations[operation]
        shapes = [R.forward_pass.shape(operand) for operand in operation.operands]
        masses = [torch.randn(1, *shape).double() for shape in shapes]
        message = torch.randn(1, *R.forward_pass.shape(operation.output)).double()
        pulled = propagation.pull(message.clone(), [True] * len(masses))
        pushed = propagation.push(masses, message.shape[1:])
        total = sum((p * m).sum() for p, m in zip(pulled, masses, strict=True))
        torch.testing.assert_close((pushed * message).sum(), total)


class OfTwo(nn.Module):
    """A function with a row or without one."""

    def __init__(self, without_row: bool):
        super().__init__()
        self.without_row = without_row

    def forward(self, x, y):
        return torch.lgamma(x + y + 1) if self.without_row else x * y


@pytest.mark.parametrize("along_path", [False, True])
@pytest.mark.parametrize("without_row", [False, True])
def test_strict_holds_for_derivatives(along_path, without_row):
    """Columns below zero: `x y` with factors of opposite sign, and lgamma where it falls."""
    model = OfTwo(without_row).double().eval()
    rule = rules.PathIntegrated(0.0, 4) if along_path else rules.LocalLinear()
    fallback = LocalLinear() if without_row else None
    good = [torch.full((1, 2), v).double() for v in (1.0, 3.0)]
    bad = [torch.full((1, 2), v).double() for v in ((0.1, 0.2) if without_row else (-1.0, 3.0))]
    for given, fails in ((good, False), (bad, True)):
        relevance = torch.ones(1, 2).double()
        explainer = nrm.Explainer(model, rule, strict=True, fallback=fallback)
        R = explainer(*given, output_relevance=relevance)
        if fails:
            with pytest.raises(PositiveSumError, match="2 neurons whose contributions by its"):
                R.heatmap(at="x")
        else:
            torch.testing.assert_close(R("x") + R("y"), torch.ones(1).double())
        loose = nrm.Explainer(model, rule, fallback=fallback)
        loose(*given, output_relevance=relevance).heatmap(at="x")
        operation = R.graph.output.producer
        shapes = [R.forward_pass.shape(operand) for operand in operation.operands]
        propagation = R.forward_pass.propagations[operation]
        propagation.push([torch.ones(1, *s).double() for s in shapes], relevance.shape)


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_occlusion_pushes_the_transpose_of_what_it_pulls(late, normalized, rest):
    """Also at columns that vanish, here those of neurons without input, and of orphans."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 2, stride=2, padding=(0, 2), bias=late)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten()).double().eval()
    x = torch.randn(1, 2, 4, 4).double()
    x[..., :2, :2] = 0.0
    if late:
        nn.init.zeros_(conv.bias)
    bias = "input" if late else "drop"
    R = nrm.Explainer(model, rules.Occlusion(rest), bias=bias)(x, target=0)
    operation = R.graph.variable("0").producer
    propagation = R.forward_pass.propagations[operation]
    assert bool((dense.column_sums(R, operation) == 0).any())
    assert propagation.adopts_orphans != late
    shapes = [R.forward_pass.shape(operand) for operand in operation.operands]
    shape = R.forward_pass.shape(operation.output)
    columns = torch.eye(shape.numel()).double().view(-1, *shape)
    pulled = propagation.pull(columns, [True] * len(shapes), normalized)
    for chosen in (range(len(shapes)), *([k] for k in range(len(shapes)))):
        masses = [
            torch.randn(3, *s).double() if k in chosen else None for k, s in enumerate(shapes)
        ]
        expected = sum(
            torch.einsum("jp,kp->kj", p.flatten(1), m.flatten(1))
            for p, m in zip(pulled, masses, strict=True)
            if m is not None
        )
        found = propagation.push(masses, shape, normalized)
        torch.testing.assert_close(found, expected.view(-1, *shape))


def test_forward_messages_by_derivatives_look_at_columns_once(monkeypatch):
    """However many there are; where an operation pushes by itself, it finds the same."""
    case = make("Residual", "zero", False, seed=5)
    R = nrm.Explainer(case.model, rules.Zero())(*case.inputs, target=1)
    operation = R.graph.variable("last").producer
    propagation = R.forward_pass.propagations[operation]
    calls, pull = [], propagation.pull
    monkeypatch.setattr(propagation, "pull", lambda *a: calls.append(1) or pull(*a))
    shape = R.forward_pass.shape(operation.output)
    masses = [torch.randn(4, *R.forward_pass.shape(v)).double() for v in operation.operands]
    pushed = Propagation.push(propagation, masses, shape)
    assert len(calls) == 1
    rows = [Propagation.push(propagation, [m[k : k + 1] for m in masses], shape) for k in range(4)]
    torch.testing.assert_close(pushed, torch.cat(rows))
    torch.testing.assert_close(pushed, propagation.push(masses, shape))
    assert len(calls) == 5
