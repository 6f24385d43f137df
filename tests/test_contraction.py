"""All pairs of channels in one contraction, against one message for each channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nrm
from nrm import composites, rules
from nrm.composites import Composite, Everywhere, first
from nrm.errors import QueryError

RULES = {
    "zero": rules.Zero(),
    "epsilon": rules.Epsilon(1e-3),
    "gamma": rules.Gamma(0.25),
    "plain gamma": rules.PlainGamma(0.5),
    "zplus": rules.ZPlus(),
    "alpha2beta1": rules.AlphaBeta(2.0, 1.0),
    "flat": rules.Flat(),
    "wsquare": rules.WSquare(),
    "zbox": rules.ZBox(-9.0, 9.0),
}


class Net(nn.Module):
    """Two convolutions with something before, between and after, and a head."""

    def __init__(self, lower, upper, between=torch.relu, after=torch.relu, before=torch.relu):
        super().__init__()
        self.start, self.lower, self.upper = nn.LazyConv2d(4, 1), lower, upper
        self.before, self.between, self.after = before, between, after
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        h = self.between(self.lower(self.before(self.start(x))))
        return self.head(self.after(self.upper(h)).flatten(1))


def conv(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs)


class Norm(nn.Module):
    """An operation that batch norm is folded into."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        return self.norm(self.conv(x))


NETS = {
    "plain": lambda: Net(conv(4, 6, 3), conv(6, 5, 2)),
    "padded": lambda: Net(conv(4, 6, 3, padding=2), conv(6, 5, 3, padding=1)),
    "strided": lambda: Net(conv(4, 6, 2), conv(6, 5, 3, stride=2, padding=1)),
    "dilated": lambda: Net(conv(4, 6, 1), conv(6, 5, 2, dilation=2, padding=1)),
    "grouped": lambda: Net(conv(4, 6, 1), conv(6, 4, 2, groups=2)),
    "depthwise": lambda: Net(conv(4, 6, 1), conv(6, 12, 3, groups=6, padding=1)),
    "pooled": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), lambda h: F.max_pool2d(torch.relu(h), 3, 1, 1)
    ),
    "pooled after": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), after=lambda h: F.max_pool2d(torch.relu(h), 2)
    ),
    "normalised": lambda: Net(conv(4, 6, 1), Norm()),
    "same": lambda: Net(conv(4, 6, 1), conv(6, 5, 3, padding="same")),
    "permuted": lambda: Net(conv(4, 6, 1), conv(6, 5, 2), lambda h: torch.relu(h).flip(1)),
    "rolled": lambda: Net(conv(4, 6, 1), conv(6, 5, 2), after=lambda h: h.roll(2, 1)),
}


def measure(name, rule, bias, batch=2):
    torch.manual_seed(0)
    model, x = NETS[name](), torch.randn(batch, 2, 6, 6)
    model(x)
    return nrm.Explainer(model.double().eval(), Everywhere(RULES[rule]), bias=bias)(
        x.double(), target=1
    )


def agree(R, a, b, *sets, way="contraction"):
    assert R.joint_method(a, b) == way
    quick = R.joint(a, b, *sets)
    slow = R.joint(a, b, *sets, method="messages")
    scale = max(1.0, float(R.diagnostics().total_variation.max()))
    torch.testing.assert_close(quick, slow, atol=1e-10 * scale, rtol=0)
    torch.testing.assert_close(quick, R.joint(b, a, *sets).transpose(1, 2))
    return quick


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [name for name in NETS if name not in ("same",)])
def test_pairs_of_convolutions(name, rule, bias):
    R = measure(name, rule, bias)
    pairs = agree(R, "lower", "upper")
    assert pairs.shape == (2, R.channels("lower").shape[1], R.channels("upper").shape[1])
    bound = 1 + float(R.diagnostics().total_variation.max())
    torch.testing.assert_close(pairs.sum((1, 2)), R("lower", "upper"), atol=1e-10 * bound, rtol=0)


@pytest.mark.parametrize("name", ["pooled after", "rolled", "plain"])
def test_layers_may_be_taken_on_either_side_of_what_has_one_parent(name):
    R = measure(name, "gamma", "drop")
    upper = next(v for v in R.graph.variables if v.name == "head").producer.operands[0].name
    flat = R.graph.variable(upper).producer.operands[0].name
    for a in ("lower", R.graph.variable("upper").producer.operands[0].name):
        for b in ("upper", flat):
            agree(R, a, b)
            agree(R, a, b, nrm.channels(b, 0, 2))


def test_pairs_given_sets_above_and_of_one_sample():
    R = measure("padded", "gamma", "input", batch=1)
    agree(R, "lower", "upper", nrm.neurons("output", 1), nrm.patch("upper", 0, slice(0, 3)))


def test_other_layers_are_joined_by_messages():
    """Where the contraction does not do, messages are sent, and it says so."""
    R = measure("same", "gamma", "drop")
    agree(R, "lower", "upper", way="messages")
    agree(R, "start", "upper", way="messages")  # two weighted sums between
    with pytest.raises(QueryError, match="not just one"):
        R.joint("start", "upper", method="contraction")
    with pytest.raises(QueryError, match="method is one of"):
        R.joint("start", "upper", method="quick")


class Branches(nn.Module):
    """Two branches that are concatenated, and a convolution over both."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1)
        self.joined, self.head = nn.Conv2d(7, 5, 3), nn.Linear(20, 3)

    def forward(self, x):
        h = torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
        return self.head(torch.relu(self.joined(h)).flatten(1))


def test_pairs_across_a_concatenation():
    torch.manual_seed(0)
    model, x = Branches().double().eval(), torch.randn(2, 2, 4, 4).double()
    R = nrm.Explainer(model, Composite([(first, rules.Flat())], rules.Gamma(0.25)))(x, target=0)
    whole = agree(R, "joined", ":cat")
    torch.testing.assert_close(agree(R, "joined", "a"), whole[:, :, :3])
    torch.testing.assert_close(agree(R, "joined", "b"), whole[:, :, 3:])
    for branch in ("a", "b"):
        agree(R, branch, "input")
        agree(R, ":cat", "input", way="messages")  # over two convolutions side by side


def test_pairs_of_linear_layers_and_of_what_is_flattened():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 4)
    )
    for composite in (Everywhere(rules.Gamma(0.1)), composites.GammaFlat(), composites.CPLRP()):
        R = nrm.Explainer(model.double().eval(), composite)(
            torch.rand(3, 1, 6, 6).double(), target=2
        )
        agree(R, "4", "5")
        agree(R, "3", "5")
        agree(R, "1", "3")  # 48 neurons of three channels
        agree(R, "0", "4")
        assert R.joint("2", "3").shape == (3, 48, 6)


@pytest.mark.parametrize("dims", [1, 3])
def test_pairs_of_other_dimensions(dims):
    torch.manual_seed(0)
    Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = nn.Sequential(
        Conv(2, 4, 2),
        nn.ReLU(),
        Conv(4, 3, 2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    x = torch.randn(2, 2, *[4] * dims)
    model(x)
    R = nrm.Explainer(model.double().eval(), Everywhere(rules.Gamma(0.25)))(x.double(), target=0)
    agree(R, "0", "2")
    agree(R, "input", "1")


def test_tokens_of_a_linear_layer():
    """Channels of a layer applied to every position."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(35, 2)
    )
    R = nrm.Explainer(model.double().eval(), Everywhere(rules.Gamma(0.25)))(
        torch.randn(2, 7, 4).double(), target=0
    )
    agree(R, "0", "2")
    agree(R, "1", "3")


def test_columns_that_vanish_are_split_over_all_channels():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    model[0].bias.data.fill_(-9)  # nothing comes through
    for composite in (Everywhere(rules.ZPlus()), Everywhere(rules.Flat())):
        R = nrm.Explainer(model.double().eval(), composite)(
            torch.rand(2, 1, 4, 4).double(), target=0
        )
        pairs = agree(R, "1", "2")
        torch.testing.assert_close(pairs.sum((1, 2)), torch.ones(2).double())


def test_occlusion_has_no_terms_to_contract():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )
    R = nrm.Explainer(model.double().eval(), composites.Occlusion())(
        torch.rand(1, 1, 4, 4).double(), target=0
    )
    agree(R, "0", "2", way="messages")


def test_pairs_of_neurons_and_of_sets():
    """Any division of two layers, against the joint relevance of each pair."""
    R = measure("pooled", "gamma", "input")
    upper = [nrm.patch("upper", row, slice(None)) for row in range(3)] + [nrm.channels("upper", 1)]
    lower = nrm.clusters(R, "lower", 3)
    pairs = R.joint(upper, lower)
    assert R.joint_method(upper, lower) == "messages"
    expected = torch.stack([torch.stack([R(a, b) for b in lower], -1) for a in upper], 1)
    torch.testing.assert_close(pairs, expected)
    torch.testing.assert_close(R.joint(lower, upper, memory=1), expected.transpose(1, 2))
    single = R.joint(upper[0], "lower")
    torch.testing.assert_close(single[:, 0], R.channels("lower", upper[0]))
    by_neuron = R.joint("head", "upper", by="neuron")
    assert by_neuron.shape == (2, 3, R.marginal("upper")[0].numel())
    torch.testing.assert_close(by_neuron[:, 1], R.marginal("upper").flatten(1))
    inner = R.joint("upper", "lower", by="neuron")
    for place in (0, 7, 30):
        index = torch.unravel_index(torch.tensor(place), R.marginal("upper").shape[1:])
        neuron = nrm.neurons("upper", tuple(int(i) for i in index))
        torch.testing.assert_close(inner[:, place], R.marginal("lower", neuron).flatten(1))


def test_divisions_that_cannot_be_are_refused():
    R = measure("plain", "gamma", "drop")
    with pytest.raises(QueryError, match="two different"):
        R.joint([nrm.channels("upper", 0)], "upper")
    with pytest.raises(nrm.NrmError, match="one layer"):
        R.joint([nrm.channels("upper", 0), nrm.channels("lower", 0)], "start")
    with pytest.raises(nrm.NrmError, match="at least one"):
        R.joint([], "start")
    with pytest.raises(nrm.NrmError, match="divided by"):
        R.joint("upper", "lower", by="patch")
    with pytest.raises(nrm.NrmError, match="not the formula"):
        R.joint([~nrm.channels("upper", 0)], "lower")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_are_told_from_winners_among_many_channels(dtype):
    """What shares evenly among two channels has no one channel for a parent."""

    class Tied(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 6000), nn.Linear(3000, 4), nn.Linear(4, 2)
            self.a.bias.data += 9  # no ties at zero
            if tied:
                self.a.weight.data[4100:4102], self.a.bias.data[4100:4102] = 0, 9

        def forward(self, x):
            h = torch.relu(self.a(x)).view(-1, 3000, 2).amax(2)
            return self.c(torch.relu(self.b(h)))

    for tied, way in ((False, "contraction"), (True, "messages")):
        torch.manual_seed(0)
        model = Tied(tied).to(dtype).eval()
        R = nrm.Explainer(model, Everywhere(rules.ZPlus()), bias="input")(
            torch.tensor([[0.3, 0.7]], dtype=dtype), target=0
        )
        assert R.joint_method("a", "b") == way
        pairs = R.joint("a", "b")
        torch.testing.assert_close(pairs, R.joint("a", "b", method="messages"))
        if tied:
            torch.testing.assert_close(pairs[:, 4100], pairs[:, 4101])


def test_many_channels_behind_a_pooling():
    """Numbers beyond the precision of single floats' squares."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(1, 5000, 1), nn.Linear(5000, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.c(torch.relu(self.b(nn.functional.max_pool1d(self.a(x), 4).flatten(1))))

    torch.manual_seed(0)
    R = nrm.Explainer(Wide().eval(), Everywhere(rules.ZPlus()))(torch.randn(2, 1, 4), target=0)
    assert R.joint_method("a", "b") == "contraction"
    torch.testing.assert_close(
        R.joint("a", "b"), R.joint("a", "b", method="messages"), atol=1e-6, rtol=1e-4
    )


def test_pairs_without_a_batch_axis():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    explainer = nrm.Explainer(model.double().eval(), rules.Gamma(0.25), batch_axis=None)
    agree(explainer(torch.randn(3).double(), target=0), "0", "2")
    agree(explainer(torch.randn(6, 3).double(), target=(1, 0)), "1", "3")


def test_sides_of_pairs_that_are_none_are_refused():
    R = measure("plain", "gamma", "drop")
    for side in (None, 3):
        with pytest.raises(QueryError, match="a side of pairs"):
            R.joint(side, "lower")
    with pytest.raises(nrm.NrmError, match="not the formula"):
        R.joint(nrm.channels("upper", 0) & nrm.channels("lower", 0), "start")
    with pytest.raises(QueryError, match="list of one"):
        R.heatmaps(nrm.channels("upper", 0))
    with pytest.raises(QueryError, match="list of one"):
        R.heatmaps("upper")
    both = [
        nrm.channels("upper", 0),
        nrm.mask("upper", torch.rand(R.marginal("upper").shape) > 0.5),
    ]
    torch.testing.assert_close(R.heatmaps(both), torch.stack([R.heatmap(s) for s in both]))
