"""Operators that networks use now and then: each against gradient x input or a value by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nrm
from nrm import rules
from nrm.errors import UnsupportedOperatorError
from nrm.operators import LocalLinear


class Of(nn.Module):
    """A function of the input and a linear layer, with a square weight beside it."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.o = nn.Linear(3, 2).double()
        self.w = nn.Parameter(torch.randn(3, 3).double())
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def drawn(*shape):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


X, PICTURE = drawn(2, 3), drawn(2, 3, 4, 4)


def explained(function, *inputs, rule=None, target=1, **options):
    model = Of(function).eval()
    return nrm.Explainer(model, rule or rules.Zero(), bias="input", **options)(
        *inputs, target=target
    )


def places(x):
    at = torch.tensor([[[[-1.2, 0.1], [0.5, 0.9]]]], dtype=x.dtype)  # one of them outside
    return at.expand(len(x), -1, -1, -1)


def sampled(x, at):
    return F.grid_sample(x, at, align_corners=False)


def windows(m, x):
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    return m.o(F.max_unpool2d(values, indices, 2).mean((2, 3)))


LIKE_GRADIENTS = {  # linear or homogeneous where relevance passes: nothing is held constant
    "vector_norm": (lambda m, x: m.o(x) + torch.linalg.vector_norm(x, dim=1, keepdim=True), X),
    "norm of order 3": (lambda m, x: m.o(x) + x.norm(3, 1, True), X),
    "pairwise_distance": (lambda m, x: m.o(x) + F.pairwise_distance(x, m.w[:1])[:, None], X),
    "cdist": (lambda m, x: m.o(torch.cdist(x, m.w)), X),
    "logsumexp": (lambda m, x: m.o(x) + x.logsumexp(1, True), X),
    "logaddexp": (lambda m, x: m.o(torch.logaddexp(x, 2 * x.flip(1))), X),
    "std": (lambda m, x: m.o(x) + x.std(1, keepdim=True), X),
    "median": (lambda m, x: m.o(x) + x.median(1, keepdim=True).values, X),
    "quantile": (lambda m, x: m.o(x) + x.quantile(0.3, 1, keepdim=True), X),
    "einsum of one": (lambda m, x: m.o(torch.einsum("nchw->nc", x)), PICTURE),
    "einsum that only moves": (lambda m, x: m.o(torch.einsum("nchw->nhwc", x)).mean((1, 2)),
                               PICTURE),
    "einsum of three": (lambda m, x: m.o(torch.einsum("bi,ij,jk->bk", x, m.w, m.w)), X),
    "tensordot": (lambda m, x: m.o(torch.tensordot(x, m.w, dims=1)), X),
    "inner": (lambda m, x: m.o(torch.inner(x, m.w)), X),
    "lerp": (lambda m, x: m.o(torch.lerp(x, 2 * x, m.w[0])), X),
    "diff": (lambda m, x: m.o(x) + x.diff(dim=1), X),
    "max_unpool": (windows, PICTURE),
    "masked_scatter": (lambda m, x: m.o(x.masked_scatter(m.w[:1] > 0, 3 * x)), X[:1]),
    "grid_sample": (lambda m, x: m.o(sampled(x, places(x))[:, :, 0, 0]), PICTURE[:1]),
    "bicubic": (lambda m, x: m.o(F.interpolate(x, size=(3, 5), mode="bicubic").mean((2, 3))),
                PICTURE),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE_GRADIENTS)
def test_gradient_times_input(name):
    function, x = LIKE_GRADIENTS[name]
    R = explained(function, x)
    held = x.clone().requires_grad_()
    with torch.enable_grad():
        Of(function)(held)[:, 1].sum().backward()
    scale = R.scale.view(-1, *(1,) * (x.dim() - 1))
    torch.testing.assert_close(R.heatmap() * scale, held.grad * x)
    assert R.diagnostics().worst_cut_deviation < 1e-12


def test_flat_counts_the_parents_of_a_sampled_place():
    x = PICTURE[:1, :1]
    at = torch.tensor([[[[0.0, 0.0]]]], dtype=x.dtype)
    R = nrm.Explainer(Of(lambda m, x: sampled(x, at)).eval(), rules.Flat())(x, target=(0, 0, 0))
    expected = torch.zeros(4, 4).double()
    expected[1:3, 1:3] = 0.25
    torch.testing.assert_close(R.heatmap()[0, 0], expected)


def test_what_is_sampled_outside_is_a_leaf():
    x = PICTURE[:1, :1]
    at = torch.tensor([[[[5.0, 0.0], [0.1, 0.0]]]], dtype=x.dtype)
    function = Of(lambda m, x: 1 + sampled(x, at).flatten(1)).eval()
    R = nrm.Explainer(function, rules.Flat(), bias="drop")(x, target=0)
    (leaf,) = [v.name for v in R.graph.leaves if v.kind == "constant"]
    assert leaf.endswith(".outside")
    torch.testing.assert_close(R(leaf), torch.ones(1).double())


def test_a_norm_shares_by_squares_and_a_product_evenly():
    x = torch.tensor([[3.0, 4.0, 1.0]], dtype=torch.float64)
    R = explained(lambda m, x: x[:, :2].norm(dim=1, keepdim=True), x, target=0)
    torch.testing.assert_close(R.heatmap()[0], torch.tensor([0.36, 0.64, 0.0]).double())
    R = explained(lambda m, x: x.prod(1, keepdim=True), x, target=0)
    torch.testing.assert_close(R.heatmap()[0], torch.full((3,), 1 / 3).double())
    R = explained(lambda m, x: x.var(1, keepdim=True), x, target=0)
    from_mean = x - x.mean()
    torch.testing.assert_close(R.heatmap(), x * from_mean / (x * from_mean).sum())


def test_a_soft_maximum_leaves_its_entropy_to_the_bias():
    x = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    R = explained(lambda m, x: x.logsumexp(1, True), x, target=0)
    share = x.softmax(1)
    torch.testing.assert_close(R.heatmap() * R.scale, x * share)
    (entropy,) = R.biases().values()
    torch.testing.assert_close(entropy * R.scale, -(share * share.log()).sum(1))


def test_an_exponent_that_is_learned_takes_none():
    def gem(m, x):
        p = m.w[0, 0].abs() + 1
        return m.o(F.adaptive_avg_pool2d(x.abs().pow(p), 1).pow(1 / p).flatten(1))

    R = explained(gem, PICTURE)
    p = Of(None).w[0, 0].abs().detach() + 1
    powers = PICTURE.abs() ** p
    shares = powers / powers.sum((2, 3), keepdim=True)
    pooled = powers.mean((2, 3)) ** (1 / p) * Of(None).o.weight[1].detach()
    torch.testing.assert_close(R.heatmap() * R.scale.view(-1, 1, 1, 1),
                               shares * pooled[..., None, None])  # fmt: skip
    with pytest.raises(UnsupportedOperatorError, match=r"pow.* combines several"):
        explained(lambda m, x: m.o(x.abs() ** x), X)


def test_a_weight_from_the_input_shares_with_what_it_is_applied_to():
    def dynamic(m, x):
        weight = x.mean((2, 3)).view(1, 3, 1, 1) * m.w.view(3, 3, 1, 1)
        weight = F.pad(weight, (1, 0, 0, 1))
        return m.o(F.conv2d(x, weight, m.w[0], stride=2, padding=1, dilation=2).mean((2, 3)))

    x = PICTURE[:1]
    R = explained(dynamic, x)
    held = x.clone().requires_grad_()
    with torch.enable_grad():
        Of(dynamic)(held)[:, 1].sum().backward()
    # y = x * w(x), of degree two: half to each by alpha, and gradient x input counts both whole
    torch.testing.assert_close(2 * R.heatmap() * R.scale, held.grad * x)
    same = explained(lambda m, x: m.o(F.conv1d(x, x[..., :2], padding="same").mean(2)),
                     drawn(3, 3, 4)[:1].repeat(3, 1, 1), batch_axis=None,
                     target=(0, 1))  # fmt: skip
    assert same.diagnostics().worst_cut_deviation < 1e-12


ROUNDED = {
    "sign": torch.sign,
    "round": lambda x: torch.round(4 * x),
    "decimals": lambda x: torch.round(x, decimals=1),
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "floor_divide": lambda x: torch.div(x, 0.1, rounding_mode="floor"),
    "a comparison": lambda x: (x > 0.1).to(x),
    "argmax": lambda x: F.one_hot(x.argmax(1), 3).to(x),
}


@pytest.mark.parametrize("fallback", [None, LocalLinear()], ids=["refused", "to first order"])
@pytest.mark.parametrize("name", ROUNDED)
def test_what_rounds_is_a_gate_that_takes_nothing(name, fallback):
    step = ROUNDED[name]
    R = explained(lambda m, x: m.o(x * step(x)), X, fallback=fallback)
    weight = Of(None).o.weight[1].detach()
    torch.testing.assert_close(R.heatmap() * R.scale[:, None], X * step(X) * weight)


def test_what_rounds_and_is_added_is_a_leaf_of_its_own():
    R = explained(lambda m, x: m.o(x) + x.round()[:, :2], X)
    assert set(R.biases()) == {"o.bias", ":add.round"}
    torch.testing.assert_close(R.biases()[":add.round"] * R.scale, X.round()[:, 1])
    with pytest.raises(nrm.errors.CaptureError, match=r"steps alone \(sign is constant"):
        explained(lambda m, x: m.o(torch.sign(x)), X, fallback=LocalLinear())


REFUSED = {
    "frac": lambda m, x: m.o(x.frac()),
    "i0": lambda m, x: m.o(torch.special.i0(x)),
    "cross": lambda m, x: m.o(torch.linalg.cross(x, m.w[:1].expand_as(x))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name_and_taken_to_first_order_on_request(name):
    with pytest.raises(UnsupportedOperatorError, match=rf"{name}.*fallback=LocalLinear\(\)"):
        explained(REFUSED[name], X)
    R = explained(REFUSED[name], X, fallback=LocalLinear())
    assert R.diagnostics().worst_cut_deviation < 1e-12


def test_places_that_depend_on_the_input_are_refused():
    with pytest.raises(UnsupportedOperatorError, match=r"grid_sampler.*'grid' depends"):
        explained(
            lambda m, x: m.o(sampled(x, places(x) * x.mean())[:, :, 0, 0]),
            PICTURE[:1],
        )
