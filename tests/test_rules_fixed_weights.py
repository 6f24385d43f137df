"""Rules on sums whose weights no parameter holds, against their matrices found by derivatives.

A rule sees connections: i and j are connected where `dy_j/dx_i` is not zero, with that weight. What
each rule makes of a column of the matrix is written out here, sharing nothing with the package.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from support import oracle as o
from support.networks import RULES
from torch import Tensor, nn
from torch.nn import functional as F

import nrm
from nrm import rules
from nrm.composites import Composite, Everywhere, kind
from nrm.errors import UnsupportedOperatorError

pytestmark = pytest.mark.usefixtures("captured_once")

NAMES = sorted(set(RULES) - {"epsilon"})


class Function(nn.Module):
    """Any function as a model."""

    def __init__(self, function, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, *self.layers).flatten(1)


def _resized(*size, mode, **more):
    return lambda x: F.interpolate(x, size=size, mode=mode, **more)


def _onto(*places):
    index = torch.tensor(places)
    return lambda x: (index.expand(*x.shape[:-1], -1), x.new_zeros(*x.shape[:-1], 3))


def _scatter_mean(x):
    index, base = _onto(0, 2, 2, 0, 2)(x)
    return base.scatter_reduce(-1, index, x, "mean", include_self=False)


def _scatter_mean_with_self(x):
    """What is scattered into depends on the input too."""
    base, added = x[..., :3], x[..., 3:]
    index, _ = _onto(0, 2, 2, 0)(added)
    return base.scatter_reduce(-1, index, added, "mean", include_self=True)


def _index_add(x):
    return x[..., :3].index_add(-1, torch.tensor([0, 2, 2, 0]), x[..., 3:], alpha=-0.5)


ROWS = {
    "linear": ((2, 3), _resized(7, mode="linear")),
    "linear, aligned": ((2, 3), _resized(7, mode="linear", align_corners=True)),
    "linear, down": ((1, 7), _resized(3, mode="linear")),
    "linear, by a factor": ((2, 3), lambda x: F.interpolate(x, scale_factor=1.7, mode="linear")),
    "bilinear": ((2, 3, 2), _resized(5, 4, mode="bilinear")),
    "bilinear, aligned": ((1, 3, 3), _resized(5, 5, mode="bilinear", align_corners=True)),
    "bilinear, antialiased": ((1, 6, 5), _resized(3, 2, mode="bilinear", antialias=True)),
    "bicubic": ((1, 4, 4), _resized(6, 3, mode="bicubic")),
    "bicubic, antialiased": ((1, 6, 5), _resized(3, 4, mode="bicubic", antialias=True)),
    "trilinear": ((1, 2, 2, 3), _resized(3, 4, 4, mode="trilinear")),
    "avg_pool1d": ((2, 7), lambda x: F.avg_pool1d(x, 3, 2, 1, ceil_mode=True)),
    "avg_pool1d, inside": ((2, 7), lambda x: F.avg_pool1d(x, 3, 2, 1, count_include_pad=False)),
    "avg_pool2d": ((2, 5, 4), lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)),
    "avg_pool2d, inside": (
        (1, 5, 4),
        lambda x: F.avg_pool2d(x, (3, 2), 2, 1, ceil_mode=True, count_include_pad=False),
    ),
    "avg_pool2d, divisor": ((1, 4, 4), lambda x: F.avg_pool2d(x, 2, 1, divisor_override=3)),
    "avg_pool3d": ((1, 3, 4, 3), lambda x: F.avg_pool3d(x, 2, 2, 1, count_include_pad=False)),
    "adaptive_avg_pool1d": ((2, 7), lambda x: F.adaptive_avg_pool1d(x, 3)),
    "adaptive_avg_pool2d": ((2, 5, 7), lambda x: F.adaptive_avg_pool2d(x, (3, None))),
    "adaptive_avg_pool3d": ((1, 3, 5, 4), lambda x: F.adaptive_avg_pool3d(x, (2, 3, 3))),
    "mean": ((2, 3, 2), lambda x: x.mean((1, -1), keepdim=True)),
    "sum": ((2, 3), lambda x: x.sum(-1)),
    "cumsum": ((2, 4), lambda x: x.cumsum(2)),
    "fold": ((8, 6), lambda x: F.fold(x, (3, 4), 2)),
    "scatter mean": ((2, 5), _scatter_mean),
    "scatter mean with self": ((2, 7), _scatter_mean_with_self),
    "index_add": ((2, 7), _index_add),
    "difference": ((2, 4), lambda x: torch.sub(x[:, :, 1:], x[:, :, :-1], alpha=0.3)),
    "reversed": ((4,), lambda x: torch.rsub(x[:, 1:], x[:, :-1], alpha=2.0)),
}


def _matrix(function, x: Tensor) -> np.ndarray:
    """`[outputs, inputs]` of one sample, by derivatives in double precision."""
    found = torch.autograd.functional.jacobian(lambda v: function(v).flatten(), x)
    matrix = found.reshape(found.shape[0], -1).numpy().copy()
    matrix[np.abs(matrix) < 1e-12] = 0  # rounding
    return matrix


def _shares(matrix: np.ndarray, x: np.ndarray, rule: o.ColumnRule, j: int) -> np.ndarray:
    """`R(i|j)` for every i, by a rule for one neuron."""
    parents = np.flatnonzero(matrix[j])
    made = rule([o.Parent(("x", int(i)), x[i], matrix[j, i]) for i in parents])
    total = sum(made)
    found = np.zeros(matrix.shape[1])
    found[parents] = np.array(made) / total if abs(total) > 1e-300 else 1 / len(parents)
    return found


@pytest.mark.parametrize("row", ROWS)
def test_every_rule_acts_on_the_connections(row):
    shape, function = ROWS[row]
    torch.manual_seed(0)
    x = torch.randn(2, *shape, dtype=torch.float64)
    x[1] = -x[1].abs()  # under z+ every column vanishes where weights are positive
    matrix = _matrix(function, x[:1])
    columns = np.flatnonzero(np.abs(matrix).sum(1))
    model = Function(function).eval()
    for name in NAMES:
        package, rule = RULES[name]
        heatmap = nrm.Explainer(model, package)(x, target=int(columns[-1])).heatmap()
        for sample in range(2):
            expected = _shares(matrix, x[sample].flatten().numpy(), rule, columns[-1])
            found = heatmap[sample].flatten().numpy()
            size = max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(found, expected, atol=1e-9 * size, rtol=0, err_msg=name)


@cache
def model_of(row: str) -> nn.Module:
    return Function(ROWS[row][1]).eval()


@pytest.mark.parametrize("row", ["bilinear", "avg_pool2d", "adaptive_avg_pool1d", "scatter mean"])
@pytest.mark.parametrize("name", ["zero", "gamma", "flat", "wsquare"])
def test_all_outputs_at_once_forward_and_in_single_precision(row, name):
    shape, function = ROWS[row]
    torch.manual_seed(0)
    x = torch.rand(1, *shape, dtype=torch.float64)
    package, rule = RULES[name]
    model = model_of(row)
    matrix = _matrix(function, x)
    columns = np.flatnonzero(np.abs(matrix).sum(1))
    given = np.zeros(len(matrix))
    given[columns] = np.random.default_rng(0).uniform(0.5, 1, len(columns))
    shares = np.stack([_shares(matrix, x.flatten().numpy(), rule, j) for j in columns], 1)
    expected = shares @ (given[columns] / given.sum())
    some = torch.arange(x.numel()).view(shape) % 2 == 0
    for kind_, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        relevance = torch.from_numpy(given)[None].to(kind_)
        R = nrm.Explainer(model, package)(x.to(kind_), output_relevance=relevance)
        found = R.heatmap().flatten().double().numpy()
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
        upward = R.conditionals(nrm.mask("input", some))
        upward = upward[R.graph.output.name].flatten()[columns]
        wanted = shares[some.flatten().numpy()].sum(0)
        np.testing.assert_allclose(upward.double().numpy(), wanted, atol=tolerance, rtol=0)


def test_interpolation_by_hand():
    """Of weights (.75, .25): flat shares evenly, w2 by .5625 to .0625."""
    x = torch.ones(1, 1, 2, dtype=torch.float64)
    model = Function(_resized(4, mode="linear")).eval()
    for rule, expected in (
        (rules.Zero(), (0.75, 0.25)),
        (rules.Flat(), (0.5, 0.5)),
        (rules.WSquare(), (0.9, 0.1)),
    ):
        found = nrm.Explainer(model, rule)(x, target=1).heatmap().flatten().tolist()
        assert found == pytest.approx(expected, abs=1e-12)
        corner = nrm.Explainer(model, rule)(x, target=0).heatmap().flatten().tolist()
        assert corner == pytest.approx((1.0, 0.0), abs=1e-12)  # a grid point has one parent


@pytest.mark.parametrize(
    ("rule", "contribution"),
    [(rules.Flat(), 1.0), (rules.WSquare(), 1 / 16), (rules.Zero(), 0.5)],
)
def test_unnormalised_contributions_to_a_mean_of_four(rule, contribution):
    """`T~ = 1` per connection under the flat rule, whatever it divides by (eq. 26)."""
    x = torch.full((1, 4), 2.0, dtype=torch.float64)
    for function in (
        lambda v: v.mean(1, keepdim=True),
        lambda v: F.avg_pool1d(v[None], 4)[0],
        lambda v: F.adaptive_avg_pool1d(v[None], 1)[0],
    ):
        model = Function(function).eval()
        R = nrm.Explainer(model, rule)(x, output_relevance=torch.ones(1, 1, dtype=x.dtype))
        found = R.heatmap(normalized=False).flatten().tolist()
        assert found == pytest.approx([contribution] * 4, abs=1e-12)


def test_beside_a_parent_of_another_sum():
    """Each connection of a mean counts as each of a bias does."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            index = torch.tensor([0, 0, 1]).expand(x.shape[0], -1)
            base = torch.full((2,), 0.5, dtype=x.dtype).expand(x.shape[0], -1)
            return base.scatter_reduce(1, index, x, "mean", include_self=True)

    x = torch.ones(1, 3, dtype=torch.float64)
    R = nrm.Explainer(Model().eval(), rules.Flat(), bias="input")(x, target=0)
    assert R.heatmap().flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 0])
    R = nrm.Explainer(Model().eval(), rules.Zero(), bias="input")(x, target=0)
    # (0.5 + 1 + 1) / 3
    assert R.heatmap().flatten().tolist() == pytest.approx([0.4, 0.4, 0])


# -- products ------------------------------------------------------------------------------------


PRODUCTS = [
    Function(product).eval()
    for product in (
        lambda a, b: torch.matmul(a, b),
        lambda a, b: torch.bmm(a, b),
        lambda a, b: torch.einsum("bij,bjk->bik", a, b),
        lambda a, b: torch.baddbmm(torch.ones(2, 2, dtype=a.dtype), a, b, beta=0.5, alpha=2.0),
    )
]


@pytest.mark.parametrize("share", [0.8, 0.3])
@pytest.mark.parametrize("product", PRODUCTS, ids=["matmul", "bmm", "einsum", "baddbmm"])
@pytest.mark.parametrize("name", ["flat", "wsquare", "zero", "zplus"])
def test_factors_take_their_alpha_under_every_rule(product, share, name):
    torch.manual_seed(0)
    a, b = (torch.rand(1, 2, 2, dtype=torch.float64) for _ in range(2))
    composite = Composite([], RULES[name][0], alpha_default=rules.InOrder(share, 1 - share))
    R = nrm.Explainer(product, composite, bias="drop")(a, b, target=0)
    first, second = (R.heatmap(at=v.name) for v in R.graph.inputs)
    row, column = a[0, 0], b[0, :, 0]
    made = {
        "flat": (torch.ones(2), torch.ones(2)),
        "wsquare": (column**2, row**2),
    }.get(name, (row * column, row * column))
    parts = share * made[0], (1 - share) * made[1]
    total = parts[0].sum() + parts[1].sum()
    torch.testing.assert_close(first[0, 0], (parts[0] / total).double())
    torch.testing.assert_close(second[0, :, 0], (parts[1] / total).double())


def test_a_product_beside_its_addend_under_flat():
    """Two connections with alpha 1/2 each, twice, and the bias: (.5, .5, .5, .5, 1) / 3."""

    def product(a, b):
        return torch.baddbmm(torch.ones(2, 2, dtype=a.dtype), a, b)

    a, b = (torch.ones(1, 2, 2, dtype=torch.float64) for _ in range(2))
    composite = Composite([], rules.Flat(), alpha_default=rules.Uniform())
    R = nrm.Explainer(Function(product).eval(), composite, bias="input")(a, b, target=0)
    assert float(R.biases()[":baddbmm.bias"]) == pytest.approx(1 / 3)
    assert float(R.heatmap(at=R.graph.inputs[0].name).sum()) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["flat", "wsquare", "zplus"])
def test_einsum_along_an_axis_of_one_neuron(name):
    """It is connected with an output as often as the weight says, by the sum of that."""
    torch.manual_seed(1)
    package, rule = RULES[name]
    x = torch.rand(1, 2, 1, dtype=torch.float64)
    weight = torch.randn(3, 2, 4, dtype=torch.float64)

    def function(v):
        return torch.einsum("bij,oij->bo", v, weight)

    R = nrm.Explainer(Function(function).eval(), package)(x, target=1)
    expected = _shares(_matrix(function, x), x.flatten().numpy(), rule, 1)
    np.testing.assert_allclose(R.heatmap().flatten().numpy(), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "equation", ["bi,oij->bo", "bi,oj->bo", "bi,ojj->bo", "bik,oij->bo", "bi,ij"]
)
def test_einsum_that_adds_up_its_weight(equation):
    """What is added up along axes of the weight alone is the weight of one connection."""
    torch.manual_seed(1)
    left, right = equation.partition("->")[0].split(",")
    x = torch.randn(1, *(3,) * (len(left) - 1), dtype=torch.float64)
    weight = torch.randn(*(3,) * len(right), dtype=torch.float64)

    def function(v):
        return torch.einsum(equation, v, weight)

    model, matrix = Function(function).eval(), _matrix(function, x)
    for name in NAMES:
        package, rule = RULES[name]
        found = nrm.Explainer(model, package)(x, target=1).heatmap().flatten().numpy()
        expected = _shares(matrix, x.flatten().numpy(), rule, 1)
        size = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=1e-9 * size, rtol=0, err_msg=name)


# -- layers --------------------------------------------------------------------------------------

LAYERS = {
    "conv1d": ((2, 6), lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1, bias=False)),
    "same": ((2, 5), lambda: nn.Conv1d(2, 3, 3, padding="same", dilation=2, bias=False)),
    "groups": ((4, 4, 3), lambda: nn.Conv2d(4, 4, 2, padding=1, groups=2, bias=False)),
    "conv3d": ((1, 2, 3, 2), lambda: nn.Conv3d(1, 2, 2, padding=(1, 0, 1), bias=False)),
    "transposed": (
        (2, 3, 2),
        lambda: nn.ConvTranspose2d(
            2, 4, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False
        ),
    ),
    "linear": ((2, 3), lambda: nn.Linear(3, 2, bias=False)),
    "bilinear": ((3,), lambda: nn.Sequential(nn.Linear(3, 4, bias=False))),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer):
    shape, build = LAYERS[layer]
    torch.manual_seed(0)
    made = build().double().eval()
    x = torch.randn(1, *shape, dtype=torch.float64)
    matrix = _matrix(made, x)
    model = Function(lambda v, inner: inner(v), made).eval()
    for name in NAMES:
        package, rule = RULES[name]
        explainer = nrm.Explainer(model, package)
        for target in (0, len(matrix) // 2, len(matrix) - 1):
            expected = _shares(matrix, x.flatten().numpy(), rule, target)
            found = explainer(x, target=target).heatmap().flatten().numpy()
            size = max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(found, expected, atol=1e-9 * size, rtol=0, err_msg=name)


# -- softmax and norms, whose weights are products -------------------------------------------------


def test_a_softmax_squares_the_weights_of_its_expansion():
    """`w_ji = s_j (delta_ij - s_i)`, in two parts for i = j, and the rest as a bias."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4, dtype=torch.float64)
    composite = Composite([(kind("softmax"), rules.WSquare())], rules.Zero())
    model = nn.Sequential(nn.Identity(), _Taken()).eval()
    R = nrm.Explainer(model, composite, bias="drop", head="keep")(logits, target=2)
    s = logits.softmax(-1)[0]
    made = (s[2] * s) ** 2
    made[2] += s[2] ** 2
    torch.testing.assert_close(R.heatmap()[0], made / made.sum())


class _Taken(nn.Module):
    """A softmax, which `head="keep"` leaves to its rule."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x.softmax(-1)


def test_a_rule_that_a_factored_weight_cannot_follow_is_refused():
    class Odd(rules.Rule):
        def groups(self, x, w):
            return [[(x.ones, w.derive("odd", lambda v: v.square() + v.abs()))]]

    composite = Composite([(kind("softmax"), Odd())], rules.Zero())
    R = nrm.Explainer(nn.Sequential(_Taken()).eval(), composite, bias="drop", head="keep")
    with pytest.raises(UnsupportedOperatorError, match=r"softmax.*Choose another rule"):
        R(torch.randn(1, 3), target=0).heatmap()


def test_nothing_added_is_no_parent():
    """`alpha=0` connects nothing."""
    x, y = torch.rand(1, 3, dtype=torch.float64), torch.rand(1, 3, dtype=torch.float64)
    model = Function(lambda a, b: torch.add(a, b, alpha=0)).eval()
    for rule in (rules.Flat(), rules.WSquare(), rules.ZPlus(), rules.Gamma(0.1)):
        R = nrm.Explainer(model, Everywhere(rule))(x, y, target=0)
        shares = [float(R(v.name)) for v in R.graph.inputs]
        assert shares == [1.0, 0.0], rule
