"""Walks of differences from a reference: against two runs by hand, patching, DeepLIFT, and laws."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from support.blocks import seeded
from support.matrices import Dense
from torch import Tensor, nn

import nrm
from nrm import composites, rules
from nrm.errors import InputError, QueryError, TargetError, UnsupportedOperatorError

pytestmark = pytest.mark.usefixtures("captured_once")


class Attention(nn.Module):
    """A token model with all that two runs differ in: attention, gates, norms, a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.rms = nn.RMSNorm(8)
        self.gate = nn.Linear(8, 6)
        self.up = nn.Linear(8, 6)
        self.down = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.words(ids)
        q, k, v = (
            t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        h = h + self.out(a.transpose(1, 2).flatten(2))
        h = h + self.down(nn.functional.silu(self.gate(self.rms(h))) * self.up(h))
        return self.head(torch.tanh(h.amax(1)))


class Pictures(nn.Module):
    """Convolutions, rectified, with both poolings, batch norm and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.gn = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn(self.a(x)))
        h = nn.functional.max_pool2d(h, 2)
        h = h + nn.functional.gelu(self.gn(self.b(h)))
        return self.head(nn.functional.avg_pool2d(h, 2).flatten(1))


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
OTHER = torch.tensor([[1, 8, 9, 4], [5, 1, 7, 0]])
MASK = torch.tensor([[True] * 4, [True, True, True, False]])


ATTENTION, PICTURES = seeded(Attention), seeded(Pictures)
torch.manual_seed(1)
X, BLANK = torch.randn(2, 2, 4, 4).double(), torch.zeros(1, 2, 4, 4).double()


def words() -> nrm.Measure:
    return nrm.Explainer(ATTENTION)(IDS, MASK, target=[0, 2], reference={"ids": OTHER})


def pictures() -> nrm.Measure:
    return nrm.Explainer(PICTURES)(X, target=[1, 2], reference=BLANK)


# -- two runs by hand ------------------------------------------------------------------------------


def gamma(z: Tensor) -> Tensor:
    sign = torch.where(z.sum() < 0, -1.0, 1.0)
    return sign * z + 0.25 * (sign * z).clamp(min=0)


@pytest.mark.parametrize(
    ("rule", "column"),
    [(rules.Zero(), lambda z: z), (rules.Gamma(0.25), gamma)],
    ids=("zero", "gamma"),
)
def test_walks_of_a_perceptron_are_those_of_differences(
    rule: rules.Rule, column: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)
    ).double()
    x, y = torch.randn(2, 3).double()
    values = []
    for start in (x, y):
        run = [start]
        for layer in model:
            run.append(layer(run[-1]).detach())
        values.append(run)
    gone = [a - b for a, b in zip(*values, strict=True)]
    matrices = []  # R(i|j) of the three weighted sums
    for layer, index in ((model[0], 0), (model[2], 2), (model[4], 4)):
        columns = [column(layer.weight[j].detach() * gone[index]) for j in range(len(layer.weight))]
        matrices.append(torch.stack([c / c.sum() for c in columns], 1))
    R = nrm.Explainer(model.eval(), rule)(x[None], target=1, reference=y[None])
    assert torch.allclose(R.scale, gone[-1][1:])
    for i, j, k in itertools.product(range(3), range(4), range(3)):
        walk = matrices[0][i, j] * matrices[1][j, k] * matrices[2][k, 1]
        sets = [nrm.neurons("input", i), nrm.neurons("1", j), nrm.neurons("3", k)]
        assert torch.allclose(R(*sets), walk[None], atol=1e-12)


def test_attention_is_shared_as_by_hand() -> None:
    """One head, every factor's part written out: `(P + P')/2 Dv + (v + v')/2 DP`, and so on."""

    class Head(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ((q @ k.mT).softmax(-1) @ v).sum(1)

    torch.manual_seed(3)
    now, then = (tuple(torch.randn(1, 3, 2).double() for _ in range(3)) for _ in range(2))
    R = nrm.Explainer(Head().eval())(
        *now, target=0, reference=dict(zip(("q", "k", "v"), then, strict=True))
    )
    (q, k, v), (r, m, w) = ([t[0] for t in run] for run in (now, then))
    s, s0 = q @ k.mT, r @ m.mT
    P, P0 = s.softmax(-1), s0.softmax(-1)
    g = torch.zeros(3, 2).double()
    g[:, 0] = 1  # of the output's sum over positions
    by_value = ((P + P0) / 2).mT @ g * (v - w)
    on_weights = g @ ((v + w) / 2).mT
    lm = (P - P0) / (P.log() - P0.log())  # the logarithmic mean
    on_scores = lm * (on_weights - (lm * on_weights).sum(-1, keepdim=True) / lm.sum(-1, True))
    by_query = on_scores @ ((k + m) / 2) * (q - r)
    by_key = on_scores.mT @ ((q + r) / 2) * (k - m)
    total = (P @ v - P0 @ w)[:, 0].sum()
    assert torch.isclose(by_value.sum() + by_query.sum() + by_key.sum(), total)
    for name, expected in (("q", by_query), ("k", by_key), ("v", by_value)):
        assert torch.allclose(R.heatmap(at=name)[0], expected / total, atol=1e-12)


# -- completeness, and both ways -------------------------------------------------------------------


@pytest.mark.parametrize("make", [words, pictures])
def test_leaves_add_up_to_the_difference_of_outputs(make: Callable[[], nrm.Measure]) -> None:
    R = make()
    if make is words:
        change = ATTENTION(IDS, MASK) - ATTENTION(OTHER, MASK)
        leaves = R.tokens().sum(1)
    else:
        change = PICTURES(X) - PICTURES(BLANK.expand_as(X))
        leaves = R.heatmap().flatten(1).sum(1)
    expected = change.detach()[torch.arange(2), R.target]
    assert torch.allclose(R.scale, expected, rtol=0, atol=1e-12)
    assert torch.allclose(leaves * R.scale, expected, rtol=0, atol=1e-10)
    assert R.diagnostics().worst_cut_deviation <= 1e-10
    assert not any(bool(share.any()) for share in R.biases().values())


@pytest.mark.parametrize("make", [words, pictures])
def test_both_ways_and_dense_matrices_agree(make: Callable[[], nrm.Measure]) -> None:
    fast, slow = make(), make()
    assert fast.forward_pass.telescope is not None
    slow.forward_pass.telescope = None
    low, high = ("words", "down") if make is words else ("a", "gn")
    one, two = nrm.channels(low, 0, 3), nrm.channels(high, 1, 2)
    for ask in (
        lambda R: R(one),
        lambda R: R(one, two),
        lambda R: R(one, given=two),
        lambda R: R(~one & two),
        lambda R: R.marginal(high),
        lambda R: R.joint(low, high, by="channel"),
    ):
        assert torch.allclose(ask(fast), ask(slow), atol=1e-10)
    assert torch.allclose(fast(one) + fast(~one), torch.ones(2).double())
    assert torch.allclose(fast(one | two), fast(one) + fast(two) - fast(one & two))
    assert torch.allclose(fast(one, two), fast(one, given=two) * fast(two))
    dense = Dense(slow)
    for name in (low, high):
        layer = slow.graph.variable(name)
        assert torch.allclose(dense.relevance(layer), slow.marginal(name).flatten(), atol=1e-10)


def test_elements_without_a_difference_carry_nothing() -> None:
    R = words()
    assert torch.equal(R.tokens() != 0, IDS != OTHER)
    y = X.clone()
    y[:, 1] += 1
    R = nrm.Explainer(PICTURES)(X, target=0, reference=y)
    assert not bool(R.heatmap()[:, 0].any())
    assert bool(R.heatmap()[:, 1].any())


def test_masked_scores_and_causal_masks_are_no_difference() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, -1]

    torch.manual_seed(4)
    x, y = torch.randn(2, 1, 4, 3).double()
    R = nrm.Explainer(Causal().eval())(x, target=1, reference=y)
    assert torch.allclose(R.heatmap().sum() * R.scale, (Causal()(x) - Causal()(y))[:, 1])


# -- what others compute ---------------------------------------------------------------------------


def test_equals_the_rescale_rule_of_deep_lift() -> None:
    deep_lift = pytest.importorskip("captum.attr").DeepLift
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 9, 10), nn.ReLU(), nn.Linear(10, 4),
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 3, 9, 9).double()
    R = nrm.Explainer(model)(x, target=2, reference=0.0)
    with pytest.warns(UserWarning, match="forward, backward"):
        expected = deep_lift(model).attribute(
            x.clone().requires_grad_(), torch.zeros_like(x).requires_grad_(), target=2
        )
    assert torch.allclose(R.heatmap() * R.scale.view(-1, 1, 1, 1), expected, atol=1e-14)


def test_is_patching_where_all_above_is_linear() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below = nn.Linear(4, 6)
            self.skip = nn.Linear(4, 5)
            self.above = nn.Linear(6, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(torch.tanh(self.below(x)), x)

        def top(self, h: Tensor, x: Tensor) -> Tensor:
            return self.head(self.above(h) + torch.sigmoid(self.skip(x)))

    model = seeded(Linear, 6)
    x, y = torch.randn(2, 1, 4).double()
    R = nrm.Explainer(model)(x, target=1, reference=y)
    h, other = (torch.tanh(model.below(t)) for t in (x, y))
    for chosen in ([0], [1, 4], [2, 3, 5]):
        patched = h.clone()
        patched[:, chosen] = other[:, chosen]
        effect = (model(x) - model.top(patched, x))[:, 1]
        found = R(nrm.neurons(":tanh", *chosen)) * R.scale
        assert torch.allclose(found, effect.detach(), atol=1e-12)


def test_patching_converges_as_the_two_inputs_come_closer() -> None:
    """The error of one patched layer falls faster than its effect: as the square."""
    x, step = X[:1], torch.randn_like(X[:1])
    errors = []
    for size in (0.02, 0.01):
        y = x + size * step
        R = nrm.Explainer(PICTURES)(x, target=1, reference=y)
        runs = [torch.relu(PICTURES.bn(PICTURES.a(t))) for t in (x, y)]
        patched = runs[0].clone()
        patched[:, 1] = runs[1][:, 1]
        h = nn.functional.max_pool2d(patched, 2)
        h = h + nn.functional.gelu(PICTURES.gn(PICTURES.b(h)))
        out = PICTURES.head(nn.functional.avg_pool2d(h, 2).flatten(1))
        effect = (PICTURES(x) - out)[0, 1].detach()
        errors.append(abs(float(R(nrm.channels("bn", 1)) * R.scale - effect)))
    assert errors[1] < 0.4 * errors[0]


# -- how it is asked -------------------------------------------------------------------------------


def test_contrasts_and_other_targets() -> None:
    R = words()
    change = (ATTENTION(IDS, MASK) - ATTENTION(OTHER, MASK)).detach()
    contrast = R.of(nrm.Contrast(0, 2))
    assert torch.allclose(contrast.scale, change[:, 0] - change[:, 2])
    parts = (R.of(k) for k in (0, 2))
    first, second = (part.tokens() * part.scale[:, None] for part in parts)
    assert torch.allclose(contrast.tokens() * contrast.scale[:, None], first - second)


def test_a_reference_is_kept_with_a_measure() -> None:
    R = words()
    again = copy.deepcopy(R)
    assert torch.equal(again.tokens(), R.tokens())
    assert "from a reference" in repr(R)
    assert "difference" in str(R.table())


def test_the_same_explainer_explains_with_and_without() -> None:
    explainer = nrm.Explainer(PICTURES)
    plain = explainer(X, target=1)
    with_one = explainer(X, target=1, reference=BLANK)
    again = explainer(X, target=1)
    assert torch.equal(plain.heatmap(), again.heatmap())
    assert not torch.allclose(plain.heatmap(), with_one.heatmap())
    captured = [R.graph.captured for R in (plain, with_one)]
    assert captured[0] is captured[1]


def test_references_of_all_samples_or_of_each() -> None:
    explainer = nrm.Explainer(PICTURES)
    each = explainer(X, target=1, reference=X.flip(0)).heatmap()
    assert torch.allclose(each[:1], explainer(X[:1], target=1, reference=X[1:]).heatmap())
    shared = explainer(X, target=1, reference=BLANK).heatmap()
    assert torch.allclose(shared, explainer(X, target=1, reference=0.0).heatmap())


def test_composites_apply_to_weighted_sums() -> None:
    composite = composites.Everywhere(rules.Gamma(0.25))
    R = nrm.Explainer(PICTURES, composite)(X, target=1, reference=BLANK)
    assert R.forward_pass.telescope is None
    assert R.diagnostics().worst_cut_deviation <= 1e-10


# -- what is refused -------------------------------------------------------------------------------


def test_no_difference_is_refused() -> None:
    explainer = nrm.Explainer(PICTURES)
    with pytest.raises(TargetError, match="same at the input and at the reference"):
        explainer(X, target=1, reference=X)
    with pytest.raises(TargetError, match="of sample 1 is the same"):
        explainer(X, target=1, reference=torch.cat([X[1:], X[1:]]))
    with pytest.raises(TargetError, match="same at the input and at the"):
        explainer(X, target=nrm.Contrast(0, 1), reference=X)
    with pytest.raises(TargetError, match="no difference to share"):
        explainer(X, reference=X, output_relevance=torch.ones(2, 3).double())


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (torch.zeros(2, 2, 3, 4).double(), "same shape"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.long), "int64"),
        ({"y": 0.0}, "inputs are 'x'"),
        (math.nan, "NaN"),
    ],
)
def test_references_that_do_not_fit(reference: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        nrm.Explainer(PICTURES)(X, target=1, reference=reference)


def test_several_inputs_are_named() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * y

    x, y = torch.randn(2, 1, 3).double()
    explainer = nrm.Explainer(Two().eval())
    with pytest.raises(InputError, match="'x', 'y'"):
        explainer(x, y, target=1, reference=0.0)
    R = explainer(x, y, target=1, reference={"x": 0.0})
    assert torch.allclose(R.heatmap(at="x")[0], torch.tensor([0.0, 1.0, 0.0]).double())
    assert not bool(R.heatmap(at="y").any())


@pytest.mark.parametrize(
    "composite",
    [composites.LocalLinear(), composites.IntegratedGradients(0.0), composites.Occlusion()],
    ids=str,
)
def test_rules_that_read_values_are_refused(composite: composites.Composite) -> None:
    with pytest.raises(QueryError, match="says nothing of their differences"):
        nrm.Explainer(PICTURES, composite)(X, target=1, reference=BLANK)


def test_rows_without_slopes_and_other_orders_are_refused_by_name() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.prod(-1)

    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(-1).values

    x = torch.tensor([[1.0, 2.0, 3.0]]).double()
    with pytest.raises(UnsupportedOperatorError, match=r"prod.*no exact slope"):
        nrm.Explainer(Product().eval())(x, target=0, reference=2 * x)
    same_order = nrm.Explainer(Sorted().eval())(x, target=2, reference=2 * x)
    assert torch.equal(same_order.heatmap(), torch.tensor([[0.0, 0.0, 1.0]]).double())
    with pytest.raises(UnsupportedOperatorError, match="another order"):
        nrm.Explainer(Sorted().eval())(x, target=2, reference=4 - x - 0.5).heatmap()


def test_what_is_no_operand_has_to_be_the_same() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0, x, 2 * x)

    x = torch.tensor([[1.0, 2.0, 3.0]]).double()
    explainer = nrm.Explainer(Masked().eval())
    assert float(explainer(x, target=1, reference=x / 2).scale) == 1.0
    with pytest.raises(UnsupportedOperatorError, match="'condition' is another"):
        explainer(x, target=1, reference=-x)
    with pytest.raises(UnsupportedOperatorError, match=r"is another at the reference"):
        nrm.Explainer(ATTENTION)(
            IDS, MASK, target=0, reference={"ids": OTHER, "mask": MASK.flip(0)}
        )


class Gated(nn.Module):
    """A product, then a layer whose rule decides what its operands get."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * torch.sigmoid(x))


@pytest.mark.parametrize(
    ("rule", "lost"),
    [
        (rules.Flat(), 1 / 3),
        (rules.WSquare(), 0.25 / 5.25),
        (rules.ZPlus(), 1 / 3),  # nothing is positive: the column is split evenly
        (rules.Zero(), 0.0),
    ],
    ids=("flat", "w2", "z+", "zero"),
)
def test_relevance_that_neurons_are_given_which_are_the_same_is_not_lost(
    rule: rules.Rule, lost: float
) -> None:
    model = Gated().double().eval()
    model.layer.weight.data[0] = torch.tensor([-1.0, 0.5, -2.0])
    x, y = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[0.5, 2.0, 1.0]]).double()
    R = nrm.Explainer(model, rule)(x, target=0, reference=y)
    torch.testing.assert_close(R.heatmap().sum(1), torch.tensor([1 - lost]).double())
    ended = R.biases().get(":mul.flat", torch.zeros(1).double())
    torch.testing.assert_close(ended, torch.tensor([lost]).double())
    assert R.heatmap()[0, 1] == 0
    assert (":mul.flat" in R.biases()) == (not isinstance(rule, rules.Zero))


def test_unnormalised_walks_pass_what_cancels() -> None:
    """`x_0 x_1` is the same in both: its two contributions are not zero (eq. 26)."""

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1).sum(1, keepdim=True)

    x, y = torch.tensor([[2.0, 3.0, 1.0]]).double(), torch.tensor([[3.0, 2.0, 0.0]]).double()
    R = nrm.Explainer(Pair().eval(), rules.Flat())(x, target=0, reference=y)
    expected = torch.tensor([[-2.5, 2.5, 1.0]]).double()  # R.scale times T~ of one
    torch.testing.assert_close(R.heatmap(normalized=False), expected)
    found = R.heatmap()
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 0.5]]).double())
    torch.testing.assert_close(R.biases()[":mul.flat"], torch.tensor([0.5]).double())


def test_one_sample_for_all_where_the_batch_is_the_second_axis() -> None:
    """As many steps as samples: shapes alone do not tell one from the other."""

    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (torch.arange(1.0, 4.0).view(3, 1, 1).to(x) * torch.tanh(x)).sum(0)

    torch.manual_seed(0)
    explainer = nrm.Explainer(Steps().eval(), batch_axis=1)
    x, one = torch.randn(3, 3, 2).double(), torch.randn(3, 2).double()
    R = explainer(x, target=1, reference=one)
    expected = explainer(x, target=1, reference=one[:, None].expand(3, 3, 2))
    torch.testing.assert_close(R.scale, expected.scale)
    torch.testing.assert_close(R.heatmap(), expected.heatmap())
    alone = explainer(x[:, :1], target=1, reference=one[:, None])
    torch.testing.assert_close(alone.heatmap()[:, 0], R.heatmap()[:, 0])


class Running(nn.Module):
    """A running sum of words: what it holds after two words does not depend on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.o = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.o(torch.tanh(self.f(self.e(ids).cumsum(1))).sum(1))


def test_what_cancels_passes_nothing_by_derivatives_and_by_messages() -> None:
    torch.manual_seed(0)
    model = Running().double().eval()
    ids, other = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1, 4]])
    R = nrm.Explainer(model)(ids, target=1, reference=other)
    assert R.forward_pass.telescope is not None
    tokens = R.tokens()
    torch.testing.assert_close(R.tokens(nrm.neurons(":cumsum")), tokens)  # a cut
    for k in range(3):
        word = nrm.neurons("e", (k, slice(None)))
        torch.testing.assert_close(R(word), tokens[:, k])
        torch.testing.assert_close(R(word & nrm.neurons(":cumsum")), tokens[:, k])
    R.forward_pass.telescope = None
    torch.testing.assert_close(R.tokens(), tokens)
