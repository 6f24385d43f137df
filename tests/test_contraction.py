"""All pairs of channels in one contraction, against one message for each channel."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support.contraction import RULES, SLOW, agree
from torch import nn

import nrm
from nrm import composites, rules
from nrm.composites import Composite, Everywhere, first
from nrm.contraction import contracted_pairs, find_contraction
from nrm.errors import QueryError

pytestmark = [
    pytest.mark.usefixtures("captured_once"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even"),  # torch's own
]


KINDS = (
    ("zero", "epsilon", "zplus", "plain gamma"),  # one product
    ("gamma", "alpha2beta1"),  # columns and parents of either sign apart
    ("flat", "wsquare", "zbox"),  # of the connections themselves, also in the padding
)


class Net(nn.Module):
    """Two convolutions with something before, between and after, and a head."""

    def __init__(
        self, lower, upper, between=torch.relu, after=torch.relu, before=torch.relu, dims=2
    ):
        super().__init__()
        start = (nn.LazyConv1d, nn.LazyConv2d, nn.LazyConv3d)[dims - 1]
        self.dims, self.start, self.lower, self.upper = dims, start(4, 1), lower, upper
        self.before, self.between, self.after = before, between, after
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        h = self.between(self.lower(self.before(self.start(x))))
        return self.head(self.after(self.upper(h)).flatten(1))


def conv(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs)


def up(*args, **kwargs):
    return nn.ConvTranspose2d(*args, **kwargs)


class Pooled(nn.Module):
    """A pooling and a batch norm that no layer takes in."""

    def __init__(self, pooling, channels=6):
        super().__init__()
        self.pooling, self.norm = pooling, nn.BatchNorm2d(channels)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        return torch.relu(self.norm(self.pooling(torch.relu(x))))


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
    "depthwise alone": lambda: Net(conv(4, 6, 1), conv(6, 6, 3, groups=6, padding=1)),
    "depthwise below": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), Pooled(conv(6, 6, 3, groups=6, padding=2))
    ),
    "depthwise above": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), after=Pooled(conv(5, 5, 2, groups=5, stride=2), 5)
    ),
    "pooled": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), lambda h: F.max_pool2d(torch.relu(h), 3, 1, 1)
    ),
    "pooled after": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), after=lambda h: F.max_pool2d(torch.relu(h), 2)
    ),
    "normalised": lambda: Net(conv(4, 6, 1), Norm()),
    "same": lambda: Net(conv(4, 6, 1), conv(6, 5, 3, padding="same")),
    "same, even": lambda: Net(conv(4, 6, 2, padding="same"), conv(6, 4, (2, 3), padding="same")),
    "same, wide": lambda: Net(
        conv(4, 6, 1), conv(6, 4, (4, 2), padding="same", dilation=(1, 3), groups=2)
    ),
    "valid": lambda: Net(conv(4, 6, 1), conv(6, 5, 2, padding="valid", stride=2)),
    "transposed": lambda: Net(up(4, 6, 2), up(6, 5, 3, stride=2, padding=1, output_padding=1)),
    "transposed, with gaps": lambda: Net(conv(4, 6, 1), up(6, 5, 1, stride=2)),
    "transposed in groups": lambda: Net(
        conv(4, 6, 2, stride=2), up(6, 4, (2, 3), groups=2, dilation=2, padding=(1, 0))
    ),
    "of one dimension": lambda: Net(
        nn.Conv1d(4, 6, 3), nn.Conv1d(6, 4, 2, padding=1, groups=2), dims=1
    ),
    "same, of one dimension": lambda: Net(
        nn.Conv1d(4, 6, 1), nn.Conv1d(6, 5, 4, padding="same"), dims=1
    ),
    "transposed, of one dimension": lambda: Net(
        nn.Conv1d(4, 6, 2), nn.ConvTranspose1d(6, 5, 3, stride=2), dims=1
    ),
    "of three dimensions": lambda: Net(
        nn.Conv3d(4, 6, 2), nn.Conv3d(6, 5, 2, stride=2, padding=1), dims=3
    ),
    "same, of three dimensions": lambda: Net(
        nn.Conv3d(4, 6, 1), nn.Conv3d(6, 5, (1, 2, 3), padding="same"), dims=3
    ),
    "transposed, of three dimensions": lambda: Net(
        nn.Conv3d(4, 6, 2), nn.ConvTranspose3d(6, 4, 2, groups=2), dims=3
    ),
    "averaged": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), lambda h: F.avg_pool2d(torch.relu(h), 3, 2, 1)
    ),
    "averaged, with signs": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), lambda h: F.avg_pool2d(h, 2, ceil_mode=True), torch.tanh
    ),
    "averaged after": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), after=lambda h: F.avg_pool2d(torch.relu(h), 2)
    ),
    "averaged before": lambda: Net(
        conv(4, 6, 2), conv(6, 5, 2), before=lambda h: F.avg_pool2d(torch.relu(h), 2)
    ),
    "averaged, then normalised": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), Pooled(nn.AvgPool2d(2, 1))
    ),
    "averaged to a size": lambda: Net(
        conv(4, 6, 1),
        conv(6, 5, 2),
        Pooled(nn.AdaptiveAvgPool2d((4, 3))),
        Pooled(nn.AdaptiveAvgPool2d(2), 5),
    ),
    "averaged and largest": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), lambda h: F.avg_pool2d(F.max_pool2d(h.relu(), 2, 1), 2, 1)
    ),
    "enlarged": lambda: Net(
        conv(4, 6, 1),
        conv(6, 5, 2),
        lambda h: F.interpolate(torch.relu(h), scale_factor=1.5, mode="bilinear"),
    ),
    "averaged by rows": lambda: Net(
        conv(4, 6, 1), conv(6, 5, (1, 2)), lambda h: torch.relu(h).mean(-2, keepdim=True)
    ),
    "averaged over all": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), after=lambda h: torch.relu(h).mean((2, 3))
    ),
    "scaled and added to": lambda: Net(
        conv(4, 6, 1), conv(6, 5, 2), lambda h: torch.relu(h) * 2 + torch.ones(6, 1, 1)
    ),
    "permuted": lambda: Net(conv(4, 6, 1), conv(6, 5, 2), lambda h: torch.relu(h).flip(1)),
    "rolled": lambda: Net(conv(4, 6, 1), conv(6, 5, 2), after=lambda h: h.roll(2, 1)),
}


@cache
def made(name, batch):
    """A network and its input."""
    torch.manual_seed(0)
    model = NETS[name]()
    x = torch.randn(batch, 2, *(9, 6, 5)[model.dims - 1 : model.dims] * model.dims)
    model(x)
    return model.double().eval(), x.double()


def measure(name, rule, bias, batch=2):
    model, x = made(name, batch)
    return nrm.Explainer(model, Everywhere(RULES[rule]), bias=bias)(x, target=1)


@pytest.mark.parametrize(
    ("name", "rule", "bias"),
    [  # on every network a rule of each kind, in turns, and both biases with every one of either
        (name, rules_of[row % len(rules_of)], ("drop", "input")[(row // len(rules_of) + kind) % 2])
        for row, name in enumerate(NETS)
        for kind, rules_of in enumerate(KINDS)
    ],
)
def test_pairs_of_convolutions(name, rule, bias):
    R = measure(name, rule, bias)
    pairs = agree(R, "lower", "upper")
    assert pairs.shape == (2, R.channels("lower").shape[1], R.channels("upper").shape[1])
    bound = 1 + float(R.diagnostics().total_variation.max())
    torch.testing.assert_close(pairs.sum((1, 2)), R("lower", "upper"), atol=1e-10 * bound, rtol=0)


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize(
    "name",
    [
        "pooled after",
        "rolled",
        "plain",
        "averaged",
        "averaged after",
        "averaged to a size",
        "averaged, then normalised",
        "averaged over all",
        "averaged, with signs",
        "depthwise below",
        "depthwise above",
    ],
)
def test_layers_may_be_taken_on_either_side_of_what_keeps_channels_apart(name, bias):
    R = measure(name, "gamma", bias)
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
    R = measure("averaged", "gamma", "drop")
    agree(R, "start", "upper", contracts=False)  # two convolutions between
    agree(R, "lower", R.graph.variable("upper").producer.operands[0].name, contracts=False)  # none
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
        agree(R, ":cat", "input", contracts=False)  # over two convolutions side by side


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
    agree(R, "0", "2", contracts=False)


def test_pairs_of_neurons_and_of_sets():
    """Any division of two layers, against the joint relevance of each pair."""
    R = measure("pooled", "gamma", "input")
    upper = [nrm.patch("upper", row, slice(None)) for row in range(3)] + [nrm.channels("upper", 1)]
    lower = nrm.clusters(R, "lower", 3)
    pairs = R.joint(upper, lower)
    assert R.joint_method(upper, lower) != "contraction"
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
    with pytest.raises(QueryError, match="different layers"):
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

    for tied in (False, True):
        torch.manual_seed(0)
        model = Tied(tied).to(dtype).eval()
        R = nrm.Explainer(model, Everywhere(rules.ZPlus()), bias="input")(
            torch.tensor([[0.3, 0.7]], dtype=dtype), target=0
        )
        assert (R.joint_method("a", "b") == "contraction") != tied
        pairs = R.joint("a", "b")
        torch.testing.assert_close(pairs, R.joint("a", "b", method=SLOW))
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
        R.joint("a", "b"), R.joint("a", "b", method=SLOW), atol=1e-6, rtol=1e-4
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


@pytest.mark.parametrize("name", ["plain", "averaged", "transposed", "same, even", "pooled"])
def test_pairs_with_factors_at_the_lower_layer(name):
    """As for bounds: what becomes of walks below is a factor at each neuron."""
    R = measure(name, "alpha2beta1", "input")
    forward = R.forward_pass
    upper, lower = R.graph.variable("upper"), R.graph.variable("lower")
    message = R.marginal("upper").unsqueeze(0)
    onward = torch.randn(1, *forward.shape(lower)).double()
    found = find_contraction(forward, upper, lower)
    pairs = contracted_pairs(forward, message, upper, lower, found, onward)
    for channel in range(pairs.shape[1]):
        expected = R.marginal("lower", nrm.channels("upper", channel)) * onward[0]
        torch.testing.assert_close(pairs[:, channel], expected.sum((2, 3)), atol=1e-10, rtol=1e-10)
