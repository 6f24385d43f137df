"""Explicit zeros beside real parents are no parents: two spellings of one network, one heatmap."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support.networks import OCCLUSION, RULES
from torch import Tensor, nn
from torch.nn import functional as F

import nrm
from nrm import composites, rules

pytestmark = pytest.mark.usefixtures("captured_once")

COMPOSITES = [
    composites.GammaFlat(),
    composites.EpsilonPlus(),
    composites.EpsilonPlusFlat(),
    composites.EpsilonGammaFlat(),
    composites.EpsilonGammaBox(-9.0, 9.0),
    composites.EpsilonAlpha2Beta1Flat(),
    composites.LRPZero(),
    composites.CPLRP(),
    composites.AttnLRP(),
    composites.LRPAll(),
    composites.Occlusion(),
    composites.LocalLinear(),
    composites.IntegratedGradients(0.1, 3),
]
ALL = [*(rule for rule, _ in (RULES | OCCLUSION).values()), *COMPOSITES]
FLAT = [rules.Flat(), rules.WSquare(), rules.ZBox(-9.0, 9.0), rules.ZPlus()]


class Net(nn.Module):
    """Layers of fixed weights around a function of the features: `forward` is one spelling."""

    def __init__(self, function, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers).flatten(1)


def two(first, second, *layers: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two spellings of one network, with the same layers."""
    models = [Net(function, *layers).double().eval() for function in (first, second)]
    return models[0], models[1]


def alike_under(choices, models, x, biases=("drop",)) -> None:
    for choice in choices:
        for bias in biases:
            alike(models, x, choice, bias)


def alike(models, x, choice, bias="drop", target=1, tolerance=1e-12) -> None:
    with torch.no_grad():
        torch.testing.assert_close(models[0](x), models[1](x))
    first, second = (
        nrm.Explainer(model, choice, bias=bias)(x, target=target).heatmap() for model in models
    )
    off, size = float((first - second).abs().max()), max(1.0, float(second.abs().max()))
    assert off <= tolerance * size, (choice, bias)


def padded_first(x, conv):
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), conv.weight, conv.bias)


@cache
def two_paddings() -> tuple[list[nn.Module], Tensor]:
    """Padding before convolutions and in them, and an input."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3, stride=2)
    inner = [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=(1, 2))]
    for own, other in zip(inner, (first, second), strict=True):
        own.load_state_dict(other.state_dict())
    head = nn.Linear(48, 3)
    models = [
        nn.Sequential(
            nn.ZeroPad2d(1), first, nn.ReLU(), nn.ZeroPad2d((2, 2, 1, 1)), second, nn.ReLU(),
            nn.Flatten(), head,
        ),
        nn.Sequential(inner[0], nn.ReLU(), inner[1], nn.ReLU(), nn.Flatten(), head),
    ]  # fmt: skip
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    return [model.double().eval() for model in models], x


@pytest.mark.parametrize("bias", ["drop", "input"])
@pytest.mark.parametrize("choice", ALL, ids=str)
def test_padding_before_a_convolution_is_padding_in_it(choice, bias):
    alike(*two_paddings(), choice, bias)


# Spellings of a zero frame around [N, 2, 4, 5]. Each failed under Flat while explicit zeros were
# parents.


def by_cat(x):
    row = torch.zeros(x.shape[0], 2, 1, 5, dtype=x.dtype)
    column = x.new_zeros(x.shape[0], 2, 6, 1)
    return torch.cat([column, torch.cat([row, x, row], 2), column], 3)


def by_slices(x):
    frame = x.new_zeros(x.shape[0], 2, 6, 7)
    frame[:, :, 1:-1, 1:-1] = x
    return frame


def by_adding_to_slices(x):
    frame = x.new_zeros(x.shape[0], 2, 6, 7)
    frame[:, :, 1:-1, 1:-1] += x
    return frame + 0


def by_two_pads(x):
    return F.pad(F.pad(x, (1, 1)), (0, 0, 1, 1))


def by_crop(x):
    return F.pad(F.pad(x, (3, 3, 3, 3)), (-2, -2, -2, -2))


def by_slice(x):
    return F.pad(x, (3, 1, 1, 1))[..., 2:]


def by_permutation(x):
    return F.pad(x.permute(2, 3, 0, 1), (0, 0, 0, 0, 1, 1, 1, 1)).permute(2, 3, 0, 1)


def by_scatter(x):
    places = torch.arange(42).view(6, 7)[1:-1, 1:-1].flatten().expand(x.shape[0], 2, -1)
    return x.new_zeros(x.shape[0], 2, 42).scatter(2, places, x.flatten(2)).view(-1, 2, 6, 7)


def by_index_add(x):
    inside = torch.arange(42).view(6, 7)[1:-1, 1:-1].flatten()
    return x.new_zeros(x.shape[0], 2, 42).index_add(2, inside, x.flatten(2)).view(-1, 2, 6, 7)


def by_mask(x):
    inside = F.pad(torch.ones(4, 5, dtype=torch.bool), (1, 1, 1, 1))
    return F.pad(x, (1, 1, 1, 1), value=7.0).masked_fill(~inside, 0.0)


def by_where(x):
    inside = F.pad(torch.ones(4, 5, dtype=torch.bool), (1, 1, 1, 1))
    return torch.where(inside, F.pad(x, (1, 1, 1, 1), value=7.0), 0.0)


def by_factor(x):
    inside = F.pad(torch.ones(4, 5, dtype=x.dtype), (1, 1, 1, 1))
    return F.pad(x, (1, 1, 1, 1), value=7.0) * inside


def by_nothing(x):
    row, column = 0 * x[:, :, :1], 0.0 * F.pad(x, (0, 0, 1, 1))[..., :1]
    return torch.cat([column, torch.cat([row, x, row], 2), column], 3)


def by_sum(x):
    return F.pad(x, (1, 1, 1, 1)) + torch.zeros(6, 7, dtype=x.dtype)


def by_scale(x):
    return -2.0 * F.pad(x, (1, 1, 1, 1)) / 4.0 * -2.0


@pytest.mark.parametrize(
    "frame",
    [by_cat, by_slices, by_adding_to_slices, by_two_pads, by_crop, by_slice, by_permutation,
     by_scatter, by_index_add, by_mask, by_where, by_factor, by_nothing, by_sum, by_scale],
)  # fmt: skip
def test_every_spelling_of_a_zero_frame(frame):
    torch.manual_seed(0)
    conv, head = nn.Conv2d(2, 3, 3), nn.Linear(60, 2)
    models = two(
        lambda x, conv, head: head(conv(frame(x)).flatten(1)),
        lambda x, conv, head: head(F.conv2d(x, conv.weight, conv.bias, padding=1).flatten(1)),
        conv,
        head,
    )
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    alike_under(FLAT[:3], models, x, ("drop", "input"))


INDEX, PICKED = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0, 0], [0, 1, 1]]).double()

NOTHING_ADDED = {  # to x0 and x1 + x2
    "scatter_add": lambda x: x.new_zeros(len(x), 2).scatter_add(1, INDEX.expand(len(x), -1), x),
    "index_add": lambda x: torch.zeros(len(x), 2).double().index_add(1, INDEX, x),
    "index_put": lambda x: x.new_zeros(2, len(x)).index_put((INDEX,), x.T, accumulate=True).T,
    "replaced": lambda x: x.new_ones(len(x), 2).scatter_reduce(
        1, INDEX.expand(len(x), -1), x, "sum", include_self=False
    ),
    "addmm": lambda x: torch.addmm(x.new_zeros(2), x, PICKED.T),
    "linear": lambda x: F.linear(x, PICKED, x.new_zeros(2))[:, [0, 1]],
    "beta": lambda x: torch.addmm(x.new_full((2,), torch.nan), x, PICKED.T, beta=0),
    "alpha": lambda x: (x @ PICKED.T).add(torch.ones(2).double(), alpha=0),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING_ADDED)
def test_zeros_that_are_added_to_are_no_bias(name):
    """Under the flat rule the zeros took 1/3 of two parents, and 1/4 of three."""
    x = torch.tensor([[1.0, 2.0, -3.0]], dtype=torch.float64)
    R = nrm.Explainer(Net(NOTHING_ADDED[name]).eval(), rules.Flat(), bias="input")(x, target=1)
    weighted = name in ("addmm", "linear", "beta", "alpha")  # a zero weight is a connection
    right = [[1 / 3] * 3] if weighted else [[0, 0.5, 0.5]]
    torch.testing.assert_close(R.heatmap(), torch.tensor(right, dtype=torch.float64))
    assert all(float(share) == 0 for share in R.biases().values())


@pytest.mark.parametrize("kind", ["bias", "shift"])
def test_a_bias_of_zeros_that_a_layer_holds_is_one(kind):
    """Whether it is trained decides nothing: a parameter, or a buffer of a frozen layer."""
    norm = nn.BatchNorm2d(2)
    if kind == "shift":  # all of it buffers
        for part in ("weight", "bias"):
            held = getattr(norm, part).detach()
            delattr(norm, part)
            norm.register_buffer(part, held)
    model = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), norm, nn.Flatten()).double().eval()
    R = nrm.Explainer(model, rules.Flat(), bias="input")(torch.ones(1, 1, 2, 2).double(), target=0)
    assert float(R.heatmap().sum()) == pytest.approx(4 / 5)


def test_a_convolution_by_unfolding():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3)

    def unfolded(x, conv):
        patches = F.unfold(x, 3, padding=1)
        return conv.weight.flatten(1) @ patches + conv.bias[:, None]

    def plain(x, conv):
        return F.conv2d(x, conv.weight, padding=1).flatten(2) + conv.bias[:, None]

    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    alike_under(FLAT, two(unfolded, plain, conv), x, ("drop", "input"))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dim", [1, 3])
def test_one_and_three_dimensions_with_sides_that_differ(dim):
    torch.manual_seed(0)
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[dim]
    conv = kind(2, 2, 4, padding="same")  # one more on the right

    def explicit(x, conv):
        same = {1: F.conv1d, 3: F.conv3d}[dim]
        return same(F.pad(x, (1, 2) * dim), conv.weight, conv.bias)

    models = two(explicit, lambda x, conv: conv(x), conv)
    alike_under(FLAT, models, torch.randn(2, 2, *(4,) * dim, dtype=torch.float64))


def test_zeros_through_activations_and_pooling():
    """Average pooling over padding that does not count, and maxima over two halves."""
    torch.manual_seed(0)
    head = nn.Linear(12, 2)

    def explicit(x, head):
        padded = F.relu(F.pad(torch.tanh(x), (1, 1, 1, 1)))
        return head(F.avg_pool2d(padded, 2).flatten(1))

    def implicit(x, head):
        return head(F.avg_pool2d(F.relu(torch.tanh(x)), 2, padding=1).flatten(1))

    x = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    alike_under(FLAT, two(explicit, implicit, head), x)


def test_a_shortcut_with_padded_channels():
    """Option A of residual networks: new channels have only the branch for a parent."""
    torch.manual_seed(0)
    up, head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(16, 2)

    def padded(x, up, head):
        return head((up(x) + F.pad(x, (0, 0, 0, 0, 1, 1))).flatten(1))

    def apart(x, up, head):
        branch = up(x)
        middle = branch[:, 1:3] + x
        return head(torch.cat([branch[:, :1], middle, branch[:, 3:]], 1).flatten(1))

    choices = [rules.Flat(), rules.WSquare(), composites.GammaFlat()]
    models = two(padded, apart, up, head)
    alike_under(choices, models, torch.randn(2, 2, 2, 2, dtype=torch.float64))


def test_flat_shares_by_hand():
    """A window of two zeros and one input beside one of three inputs."""

    class Window(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(F.pad(x, (2, 0)), torch.ones(1, 1, 3, dtype=x.dtype)).flatten(1)

    x = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.float64)
    R = nrm.Explainer(Window().eval(), rules.Flat())
    assert R(x, target=0).heatmap().flatten().tolist() == [1, 0, 0]
    assert R(x, target=1).heatmap().flatten().tolist() == [0.5, 0.5, 0]
    assert R(x, target=0).biases() == {":pad.fill": 0.0}


@pytest.mark.parametrize("rule", [rules.Zero(), rules.Flat(), rules.WSquare()], ids=str)
def test_neurons_that_see_only_zeros_keep_them(rule):
    """No relevance is lost: it ends in the padding, as much as in padding within the layer."""
    torch.manual_seed(0)
    conv = nn.Conv1d(1, 1, 2, bias=False)
    models = two(
        lambda x, conv: conv(F.pad(x, (3, 0))),
        lambda x, conv: F.conv1d(x, conv.weight, padding=3)[..., : x.shape[-1] + 2],
        conv,
    )
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    everything = torch.ones(2, 5, dtype=torch.float64)
    explicit, implicit = (
        nrm.Explainer(model, rule)(x, output_relevance=everything) for model in models
    )
    torch.testing.assert_close(explicit.heatmap(), implicit.heatmap())
    assert float(explicit(":pad.fill")[0]) == pytest.approx(2 / 5)
    total = explicit.heatmap().sum((1, 2)) + explicit(":pad.fill")
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64))


def test_a_zero_that_wins_a_maximum_is_its_parent():
    class Winner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool1d(F.pad(x, (1, 0)), 2, 2).flatten(1)

    x = torch.tensor([[[-1.0, -2.0, -3.0]]], dtype=torch.float64)
    R = nrm.Explainer(Winner().eval(), rules.Flat())(x, target=0)
    assert float(R(":pad.fill")) == 1
    assert float(R.heatmap().abs().sum()) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 1.0,  # a zero of the input
        lambda x: torch.relu(x),
        lambda x: x.masked_fill(x < 0, 0.0),  # a rectifier, spelled by values
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: torch.maximum(x, torch.zeros((), dtype=x.dtype)),
        lambda x: x * (x > 0),  # a rectifier again
        lambda x: F.pad(x[:, 1:], (1, 0), value=0.5),  # no zero
        lambda x: torch.sigmoid(F.pad(x[:, 1:], (1, 0))),  # one no longer
    ],
)
def test_zeros_by_chance_are_parents(function):
    torch.manual_seed(0)
    (model, _) = two(lambda x, head: head(function(x)), lambda x, head: x, nn.Linear(4, 2))
    x = torch.tensor([[-1.0, 2.0, 0.0, 3.0]], dtype=torch.float64)
    R = nrm.Explainer(model, rules.Flat())(x, target=0)
    address = R.graph.operations[-2].operands[0].name  # what the head reads
    torch.testing.assert_close(
        R.marginal(address).flatten(), torch.full((4,), 0.25, dtype=torch.float64)
    )


def test_zeros_that_are_trained_are_parents():
    """A class token may start as zeros; a buffer of zeros stays what it is. So may a scale."""

    class Beside(nn.Module):
        def __init__(self, trained: bool) -> None:
            super().__init__()
            zeros = torch.zeros(1, 1)
            self.token = nn.Parameter(zeros) if trained else nn.Buffer(zeros)
            self.head = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([x, self.token.expand(x.shape[0], -1)], 1))

    x = torch.ones(2, 1, dtype=torch.float64)
    shares = [
        float(nrm.Explainer(Beside(trained).double().eval(), rules.Flat())(x).heatmap()[0])
        for trained in (True, False)
    ]
    assert shares == [0.5, 1.0]


def test_a_mask_of_tokens_decides_what_is_there():
    """A mean over frames of which a mask input blanks some: those left share evenly."""

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1)

    class Multiplied(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x * mask.unsqueeze(-1).to(x)).sum(1) / mask.sum(1, keepdim=True)

    x = torch.rand(2, 3, 2, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for model in (Masked(), Multiplied()):
        R = nrm.Explainer(model.eval(), rules.Flat())(x, mask=mask, target=0)
        assert R.heatmap(at="x")[..., 0].tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]


def test_a_scale_that_starts_at_zero_may_be_trained():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * torch.tanh(x)

    x = torch.ones(1, 2, dtype=torch.float64)
    R = nrm.Explainer(Scaled().double().eval(), rules.Flat())(x, target=0)
    assert float(R(":tanh")) == 0.5


@pytest.mark.parametrize("choice", [rules.Flat(), rules.Gamma(0.25)], ids=str)
def test_every_query_knows_them(choice):
    """Jointly with sets, forward, by channel, in a batch and alone."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(2, 3, 3), nn.Linear(60, 2)
    models = two(
        lambda x, conv, head: head(F.relu(padded_first(x, conv)).flatten(1)),
        lambda x, conv, head: head(
            F.relu(F.conv2d(x, conv.weight, conv.bias, padding=1)).flatten(1)
        ),
        conv,
        head,
    )
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    explainers = [nrm.Explainer(model, choice) for model in models]
    first, second = (explainer(x, target=0) for explainer in explainers)
    some = nrm.channels(":relu", 0, 2)
    for question in (
        lambda R: R.heatmap(some),
        lambda R: R.conditionals(nrm.mask("input", torch.arange(40).view(2, 4, 5) % 2 == 0))[
            ":relu"
        ],
        lambda R: R.marginals(~some)["input"],
        lambda R: R.joint("input", ":relu"),
        lambda R: R.heatmap(normalized=False),
    ):
        torch.testing.assert_close(question(first), question(second), rtol=1e-10, atol=1e-12)
    for sample in range(3):
        alone = explainers[0](x[sample : sample + 1], target=0)
        torch.testing.assert_close(alone.heatmap()[0], second.heatmap()[sample])


def test_a_mask_that_blanks_nothing_this_time():
    """What may have explicit zeros and has none is as without the mask."""

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            h = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
            h = F.dropout(torch.relu(h) / 2, 0.5, self.training)
            return (h * h.new_tensor([1.0, 2.0])).sum(1)

    x = torch.rand(2, 3, 2, dtype=torch.float64)
    explainer = nrm.Explainer(Masked().eval(), rules.Flat())
    everything = torch.ones(2, 3, dtype=torch.bool)
    expected = explainer(x, target=0).heatmap()
    for mask in (everything, everything & (torch.arange(3) < 2)):
        R = explainer(x, mask=mask, target=0)
        kept = torch.where(mask, 1.0, 0.0).double() / mask.sum(1, keepdim=True)
        torch.testing.assert_close(R.heatmap(at="x")[..., 0], kept)
    torch.testing.assert_close(expected[..., 0], torch.full((2, 3), 1 / 3).double())
