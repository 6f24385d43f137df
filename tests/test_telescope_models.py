"""Odd but legal things that models do: totals are exact, and derivatives agree with messages."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support import dense
from torch import nn

import nrm
from nrm import composites
from nrm.composites import Composite
from nrm.errors import InputError, QueryError
from nrm.rules import Alpha, Flat, InOrder, Zero


class Between(nn.Module):
    """A function of a linear layer's output, and another linear layer on top."""

    def __init__(self, function):
        super().__init__()
        self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 3)
        self.other = nn.Parameter(torch.rand(4) + 0.5)
        self.function = function

    def forward(self, x):
        return self.above(self.function(self.below(x), self.other))


def written(h, c):
    y = torch.zeros_like(h)
    y[:, 0] = h[:, 0]
    y[:, 1:3] += h[:, 2:]
    return y


def attend(h):
    return F.scaled_dot_product_attention(h, h, h)[..., 0]


def rows(h):
    return torch.arange(len(h))[:, None]


FUNCTIONS = {
    "constant over variable": lambda h, c: c / h,
    "variable over itself": lambda h, c: h / h,
    "rounded quotient": lambda h, c: torch.div(h, 2.0, rounding_mode="floor") + h,
    "square": lambda h, c: h * h,
    "matrix square": lambda h, c: (h[:, :, None] @ h[:, None, :]).sum(-1),
    "attention to itself": lambda h, c: F.scaled_dot_product_attention(*[h[:, :, None]] * 3)[
        ..., 0
    ],
    "masked softmax": lambda h, c: h.softmax(-1) * (torch.arange(4) > 1),
    "softmax times positions": lambda h, c: h.softmax(-1) * torch.arange(4.0),
    "slices written": written,
    "written twice": lambda h, c: h.scatter(
        1, torch.tensor([[0, 1, 1, 2]]).expand(len(h), -1), h * 2
    ),
    "put twice": lambda h, c: h.index_put((rows(h), torch.tensor([[0, 0]])), h[:, 1:3] * 2),
    "clipped above zero": lambda h, c: F.hardtanh(h, 0.5, 1.0) + h,
    "no numbers": lambda h, c: (h / (h > 0)).nan_to_num(0.0, 0.0, 0.0) + h,
    "constant seen twice": lambda h, c: torch.cat([h, c.expand(1, -1)], 0)[: len(h)] * c,
    "squeeze": lambda h, c: h * torch.sigmoid(h.mean(-1, keepdim=True)).expand_as(h),
}
ALPHAS = {
    "cp": composites.CPLRP(),
    "attn": composites.AttnLRP(),
    "order": Composite([], Zero(), alpha_default=InOrder(0.8, 0.2), bias="input"),
    "first": Composite([], Zero(), alpha_default=InOrder(1.0, 0.0), bias="input"),
}


@cache
def between(function):
    """The network around a function, captured once for all composites, and an input."""
    torch.manual_seed(0)
    return Between(FUNCTIONS[function]).double().eval(), torch.randn(1, 4, dtype=torch.float64)


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("composite", ALPHAS.values(), ids=ALPHAS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_relevance_is_exact_both_ways(function, composite):
    model, x = between(function)
    explainer = nrm.Explainer(model, composite)
    fast, slow = explainer(x, target=1), explainer(x, target=1)
    slow.forward_pass.telescope = None
    torch.testing.assert_close(fast.output, model(x).detach())
    leaves = [leaf.name for leaf in fast.graph.leaves]
    total = sum(slow(name) for name in leaves)
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(fast.heatmap(), slow.heatmap())
    assert fast.diagnostics().worst_cut_deviation < 1e-9
    assert dense.check_columns(slow)["linear"] >= 2
    dense.check_walks(fast)
    dense.check_walks(slow, seed=1)


def test_a_constant_mask_on_attention_takes_nothing():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, positions):
            weights = (self.q(x) @ x.mT).softmax(-1) * (positions != 0).to(x)[:, None]
            return (weights @ self.v(x)).mean(1)

    torch.manual_seed(0)
    model = Masked().double().eval()
    x, positions = torch.randn(2, 5, 3).double(), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    R = nrm.Explainer(model, composites.CPLRP())(x, positions, target=0)
    torch.testing.assert_close(R("v"), torch.ones(2).double())
    assert set(R.biases()) == {"v.bias"}


@pytest.mark.parametrize("expand", [True, False])
def test_a_learned_state_is_a_value_however_it_is_given(expand):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.LSTM(3, 4, batch_first=True)
            self.h, self.c = (nn.Parameter(torch.randn(1, 1, 4)) for _ in range(2))

        def forward(self, x):
            state = (self.h, self.c)
            if expand:
                state = tuple(s.expand(-1, len(x), -1).contiguous() for s in state)
            return self.cells(x, state)[0][:, -1]

    torch.manual_seed(0)
    x = torch.randn(1, 3, 3).double()
    R = nrm.Explainer(Net().double().eval())(x, target=0)
    shares = R.biases()
    torch.testing.assert_close(R("input") + sum(shares.values()), torch.ones(1).double())
    states = [share for name, share in shares.items() if "bias" not in name]
    assert len(states) == 1  # of the cell; the hidden state's part is one of the sums' biases
    assert states[0].abs() > 1e-6


def test_a_fully_masked_row_is_zero_and_not_nan():
    class Net(nn.Module):
        def forward(self, x, mask):
            return F.scaled_dot_product_attention(x, x * 2, x * 3, mask).sum(1)

    x = torch.rand(1, 3, 2).double()
    masks = torch.tensor([[[True, False, True], [False] * 3, [True] * 3]])
    for composite in (composites.CPLRP(), composites.AttnLRP(), composites.GammaFlat()):
        R = nrm.Explainer(Net().eval(), composite)(x, masks, target=0)
        torch.testing.assert_close(R.output, Net()(x, masks))
        assert R.diagnostics().worst_cut_deviation < 1e-9
        assert torch.isfinite(R.marginal(":matmul@1")).all()


def test_arguments_that_only_their_values_tell_apart_are_not_mixed_up():
    class Weights:  # what stands in it is not looked at
        def __init__(self, *pieces):
            self.pieces = pieces

        def __repr__(self):
            return "Weights"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(2000, 2)

        def forward(self, x, w=None):
            w = [value for value, times in w.pieces for _ in range(times)]
            return self.out(x * torch.tensor(w))

    net, x = Net().eval(), torch.rand(1, 2000)
    explainer = nrm.Explainer(net)
    for w in (Weights((1.0, 2000)), Weights((1.0, 900), (0.0, 200), (1.0, 900))):
        torch.testing.assert_close(explainer(x, w=w).output, net(x, w=w).detach())


def test_memory_read_as_it_lies():
    class Net(nn.Module):
        def forward(self, x):
            return x.as_strided((x.shape[0], 6), (24, 1)) * 2

    x = torch.rand(2, 2, 3, 4)
    R = nrm.Explainer(Net().eval())(x, target=4)
    torch.testing.assert_close(R.output, Net()(x))
    assert R.heatmap()[1, 0, 1, 0] == 1


def test_samples_that_depend_on_their_neighbours_are_refused():
    class Next(nn.Module):
        def forward(self, x):
            return x * torch.cat([x[1:], x[:1] * 0 + 1])

    class Mean(nn.Module):
        def forward(self, x):
            return x + 1e-2 * x.mean(0)

    for model in (Next(), Mean()):
        with pytest.raises(InputError, match="depend on each other"):
            nrm.Explainer(model.eval())(torch.randn(4, 3), target=0)


def test_channels_of_a_convolution_stay_where_they_are():
    model = nn.Sequential(nn.Conv1d(3, 5, 3), nn.ReLU(), nn.Linear(8, 2), nn.Flatten()).eval()
    R = nrm.Explainer(model)(torch.randn(1, 3, 10), target=0)
    assert R.channels("0").shape == (1, 5)
    assert R.channels("1").shape == (1, 5)


def test_names_of_inputs_and_what_is_called_a_mask():
    class Net(nn.Module):
        def forward(self, masked_input, *more, key_mask, **rest):
            return masked_input + more[0] + more[1] * key_mask + rest["z"]

    x = [torch.rand(2, 3) + 1 for _ in range(5)]
    explainer = nrm.Explainer(Net().eval())
    R = explainer(*x[:3], key_mask=x[3], z=x[4], target=0)
    assert [v.name for v in R.graph.inputs] == ["masked_input", "more_0", "more_1", "z"]
    with pytest.raises(InputError, match="cannot be followed"):
        explainer(nrm.rules.ZBox(x[0] - 2, x[0]), target=0)


def test_bad_composites_and_alphas_are_refused():
    with pytest.raises(TypeError, match="a selector"):
        Composite([(composites.first, Flat)], Zero())
    with pytest.raises(TypeError, match="defaults"):
        Composite([], Zero)
    with pytest.raises(TypeError, match="defaults"):
        Composite([], Zero(), alpha_default=Flat())
    with pytest.raises(ValueError, match="bias"):
        Composite([], Zero(), bias="foo")

    class Both(Alpha):
        def coefficients(self, gates):
            return [1.0, 1.0]

    model = Between(FUNCTIONS["square"]).eval()
    with pytest.raises(QueryError, match="sum to one"):
        nrm.Explainer(model, Composite([], Zero(), alpha_default=Both()))(torch.rand(1, 4))


def test_one_number_for_all():
    R = nrm.Explainer(nn.Linear(3, 1).eval(), output=torch.sum, batch_axis=None)(torch.rand(4, 3))
    torch.testing.assert_close(R.heatmap().sum(), torch.tensor(1.0))


def test_embeddings_that_change_as_they_are_used_are_refused():
    with pytest.raises(InputError, match="max_norm"):
        nrm.Explainer(nn.Embedding(5, 3, max_norm=1.0).eval())(torch.tensor([[1, 2]]))
