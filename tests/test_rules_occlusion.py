"""Walks by perturbation (section 3.5.3) against all walks, and written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import dense
from support.networks import NETWORKS, OCCLUSION, make
from support.pairs import in_pairs
from support.queries import check_queries
from torch import Tensor, nn
from torch.nn import functional as F

import nrm
from nrm import composites, rules
from nrm.errors import PositiveSumError, UnsupportedOperatorError
from nrm.operators import occlusion

pytestmark = pytest.mark.usefixtures("captured_once")

BIAS = ["drop", "input"]


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
