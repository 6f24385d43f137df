"""Every row of the operator table, against the Jacobian of the operator it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import nrm
from nrm import rules
from nrm.composites import Everywhere

WEIGHTED = {
    "conv1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), (2, 6)),
    "conv1d-same": (nn.Conv1d(2, 3, 3, padding="same", dilation=2), (2, 5)),
    "conv2d": (nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 0)), (2, 4, 5)),
    "conv2d-depthwise": (nn.Conv2d(3, 6, 2, groups=3, dilation=2), (3, 4, 4)),
    "conv3d": (nn.Conv3d(2, 2, 2, padding=1, stride=2), (2, 3, 3, 3)),
    "linear": (nn.Linear(4, 3), (4,)),
    "linear-by-position": (nn.Linear(3, 2), (4, 3)),
    "avg_pool1d": (nn.AvgPool1d(2, padding=1), (2, 5)),
    "avg_pool2d": (nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True), (2, 5, 5)),
    "avg_pool3d": (nn.AvgPool3d(2), (1, 4, 4, 2)),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d(3), (2, 5)),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 4)),
    "adaptive_avg_pool3d": (nn.AdaptiveAvgPool3d(1), (2, 2, 2, 3)),
}


@pytest.mark.parametrize("rule", ["zero", "zplus", "flat", "wsquare"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_sums(name, rule):
    """R(i|j) from the dense matrix of the operator, by the rule's formula."""
    layer, shape = WEIGHTED[name]
    layer = layer.double().eval()
    torch.manual_seed(0)
    x = torch.randn(1, *shape).double()
    weights = jacobian(layer, x)[0]
    neurons = weights.dim() - x.dim()
    weights = weights.flatten(0, neurons - 1).flatten(1)  # output neuron, input neuron
    contributions = {
        "zero": weights * x.flatten(),
        "zplus": (weights * x.flatten()).clamp(min=0),
        "flat": (weights != 0).double(),
        "wsquare": weights.square(),
    }[rule]
    shares = contributions / contributions.sum(1, keepdim=True)
    parents = (weights != 0).double()
    uniform = parents / parents.sum(1, keepdim=True)
    shares = torch.where(contributions.sum(1, keepdim=True) == 0, uniform, shares)
    made = {
        "zero": rules.Zero(), "zplus": rules.ZPlus(), "flat": rules.Flat(),
        "wsquare": rules.WSquare(),
    }[rule]  # fmt: skip
    explainer = nrm.Explainer(layer, Everywhere(made))
    output = layer(x).detach()
    for j in range(0, output.numel(), max(1, output.numel() // 5)):
        target = tuple(int(i) for i in torch.unravel_index(torch.tensor(j), output.shape[1:]))
        R = explainer(x, target=target if len(target) > 1 else target[0])
        torch.testing.assert_close(R.heatmap().flatten(), shares[j])
        torch.testing.assert_close(R.output, output)


ELEMENTWISE = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(), nn.SiLU(),
    nn.Mish(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Hardswish(),
    nn.Hardsigmoid(), nn.Hardtanh(), nn.PReLU(), nn.Dropout(), nn.Dropout2d(), nn.Identity(),
    nn.LogSigmoid(), nn.Threshold(0.1, 0.0), nn.BatchNorm2d(3), nn.RReLU(),
]  # fmt: skip


@pytest.mark.parametrize("layer", ELEMENTWISE, ids=lambda layer: type(layer).__name__)
def test_elementwise_operators_pass_relevance_unchanged(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), layer, nn.Flatten(), nn.Linear(12, 2))
    model = model.double().eval()
    x = torch.randn(2, 2, 3, 3).double()
    R = nrm.Explainer(model)(x, target=1)
    torch.testing.assert_close(R.marginal("0"), R.marginal("2").view(2, 3, 2, 2))
    torch.testing.assert_close(R.output, model(x).detach())
    assert R.diagnostics().worst_cut_deviation < 1e-12


POOLS = [
    (nn.MaxPool1d(2), (2, 5)),
    (nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), (2, 5, 5)),
    (nn.MaxPool3d(2), (1, 4, 4, 2)),
    (nn.AdaptiveMaxPool1d(2), (2, 5)),
    (nn.AdaptiveMaxPool2d(2), (2, 5, 5)),
    (nn.AdaptiveMaxPool3d(1), (1, 2, 3, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), POOLS, ids=lambda p: type(p).__name__)
def test_the_winner_of_a_maximum_takes_all(layer, shape):
    torch.manual_seed(0)
    x = torch.randn(1, *shape).double()
    R = nrm.Explainer(layer.eval())(x, target=(0,) * len(shape))
    winner = layer(x)[(0,) * (len(shape) + 1)]
    torch.testing.assert_close(R.heatmap(), (x == winner).double())


def test_scaling_and_broadcast_by_constants():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([[1.0, 2.0, -3.0]]))
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(-(x * self.gain) / 2)

    x = torch.tensor([[2.0]])  # one neuron, broadcast to three
    R = nrm.Explainer(Scaled().eval())(x, target=0)
    torch.testing.assert_close(R.heatmap(), torch.ones(1, 1))
    torch.testing.assert_close(R("input"), torch.ones(1))


def test_a_users_operator_needs_one_row():
    from nrm.errors import UnsupportedOperatorError
    from nrm.operators import register, table
    from nrm.operators.routing import PassThrough

    class Gamma(nn.Module):
        def forward(self, x):
            return torch.lgamma(x)

    model = nn.Sequential(nn.Linear(2, 2), Gamma()).eval()
    x = torch.randn(1, 2)
    with pytest.raises(UnsupportedOperatorError, match="lgamma"):
        nrm.Explainer(model)(x, target=0)
    register(PassThrough("activation"), "aten.lgamma")
    try:
        R = nrm.Explainer(model)(x, target=0)
        torch.testing.assert_close(R.marginal("1"), R.marginal("0"))
    finally:
        del table._TABLE["aten.lgamma"]


def test_batch_statistics_are_refused():
    from nrm.errors import UnsupportedOperatorError

    model = nn.BatchNorm1d(2, track_running_stats=False).eval()
    with pytest.raises(UnsupportedOperatorError, match="statistics"):
        nrm.Explainer(model)(torch.randn(4, 2), target=0)


def test_many_messages_at_once_equal_one_by_one():
    """K messages in one pass, through every kind of operation."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 2, groups=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(5, 3),
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 2, 6, 6).double()
    for bias in ("drop", "input"):
        R = nrm.Explainer(model, bias=bias)(x, target=[0, 2])
        pairs = R.joint("4", "0")
        for c in range(5):
            torch.testing.assert_close(pairs[:, c], R.channels("0", nrm.channels("4", c)))
