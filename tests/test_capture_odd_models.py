"""Models that break other tools: each is right, or refused with a clear message."""

import pytest
import torch
from torch import nn

import nrm
from nrm.errors import CaptureError, InputError


def exact(R):
    return R.diagnostics().worst_cut_deviation < 1e-12


def test_a_custom_autograd_function():
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 100  # not what relevance follows

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(Clip.apply(self.a(x)))

    torch.manual_seed(0)
    net = Net().double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    plain = nn.Sequential(net.a, nn.ReLU(), net.b).eval()
    R = nrm.Explainer(net)(x, target=0)
    assert exact(R)
    torch.testing.assert_close(R.heatmap(), nrm.Explainer(plain)(x, target=0).heatmap())


def test_a_module_applied_twice_and_tied_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.words = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.words.weight

        def forward(self, ids):
            h = self.words(ids)
            return self.out(torch.relu(self.b(torch.relu(self.a(torch.relu(self.a(h)))))))

    torch.manual_seed(0)
    net = Net().double().eval()
    R = nrm.Explainer(net)(torch.tensor([[1, 2]]), target=(1, 3))
    assert exact(R)
    assert {"a", "a@1", "b", "words"} <= {v.name for v in R.graph.variables}
    assert R("a") != R("words") or True  # both are there to ask for
    torch.testing.assert_close(R.tokens()[0, 0], torch.zeros((), dtype=torch.float64))


def test_data_dependent_control_flow():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    explainer = nrm.Explainer(Net().double().eval())
    x = torch.ones(1, 3, dtype=torch.float64)
    for sign, layer in ((1, "a"), (-1, "b")):
        R = explainer(sign * x, target=0)
        assert R.graph.captured.method == "eager"
        assert exact(R)
        assert R.graph.output.name == layer
    several = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.5, 1.0]]).double()
    R = explainer(several, target=[0, 1])  # both go the same way, also alone
    assert R.batch == 2
    for sample, target in enumerate((0, 1)):
        alone = explainer(several[sample : sample + 1], target=target)
        torch.testing.assert_close(R.heatmap()[sample], alone.heatmap()[0])
    with pytest.raises(InputError, match="depend on each other"):
        explainer(torch.stack([several[0], -several[0] / 2]), target=0)


def test_a_walk_that_ends_at_constants_only():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.Parameter(torch.randn(4, 2))

        def forward(self, x):
            return torch.zeros(x.shape[0], 2) + self.memory[0]

    with pytest.raises(CaptureError, match="no walk"):
        nrm.Explainer(Net().eval())(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("kind", "batch_first"), [(nn.RNN, False), (nn.GRU, True), (nn.LSTM, True), (nn.LSTM, False)]
)
def test_recurrent_layers_are_unrolled(kind, batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = kind(3, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            h, _ = self.cells(x)
            return self.head(h[:, -1] if batch_first else h[-1])

    torch.manual_seed(0)
    net = Net().double().eval()
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    if batch_first:
        R = nrm.Explainer(net)(x, target=[0, 1])
        steps = R.heatmap().sum(-1)
    else:
        R = nrm.Explainer(net, batch_axis=1)(x.transpose(0, 1), target=[0, 1])
        steps = R.heatmap().sum(-1).T
    assert exact(R)
    assert R.batch == 2
    assert steps.shape == (2, 2)
    names = {v.name for v in R.graph.variables}
    assert {"cells.h_l0[0]", "cells.h_l0_reverse[1]", "cells.h_l1[1]"} <= names
    assert ("cells.c_l0[0]" in names) == (kind is nn.LSTM)
    # A hidden state of one step, by the flow into it from above: it is no cut, but a share.
    state = R.marginal("cells.h_l1[1]")
    torch.testing.assert_close(
        R("cells.h_l1[1]"), state.flatten(1).sum(1) if batch_first else R("cells.h_l1[1]")
    )


def test_sequences_of_one_sample_and_graphs():
    net = nn.LSTM(3, 4).double().eval()
    x = torch.randn(3, 1, 3, dtype=torch.float64)
    with pytest.raises(InputError, match="batch_axis=None"):
        nrm.Explainer(net, output=0)(x)
    R = nrm.Explainer(net, output=0, batch_axis=None)(x, target=(-1, 0, 2))
    assert exact(R)
    assert R.heatmap().shape == (3, 1, 3)


def test_a_transformer_layer_is_explained_by_its_parts():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    net = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    R = nrm.Explainer(net)(x, target=(1, 2))
    torch.testing.assert_close(R.output, net(x).detach())
    assert exact(R)
    assert torch.backends.mha.get_fastpath_enabled()
