"""Correlations, contributions of the best and bootstrap intervals beside scipy's and numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nrm.evaluation.metrics import bootstrap, contribution_of_top, pearson, ranks, spearman

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
SHAPES = [(500,), (17, 23), (5, 6, 7)]
KINDS = ["plain", "tied", "far from zero", "heavy tails", "single precision", "integers"]


def pair(kind: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors that are somewhat alike."""
    random = torch.Generator().manual_seed(len(kind) + len(shape))
    a = torch.randn(shape, generator=random, dtype=torch.float64)
    b = 0.5 * a + torch.randn(shape, generator=random, dtype=torch.float64)
    if kind == "tied":
        return (2 * a).round(), (2 * b).round()
    if kind == "far from zero":
        return 1e6 + 1e-3 * a, b - 1e8
    if kind == "heavy tails":
        return a**5, b**7
    if kind == "single precision":
        return a.float(), b.float()
    if kind == "integers":
        return (10 * a).long(), (10 * b).int()
    return a, b


def flat(values: torch.Tensor) -> np.ndarray:
    return values.double().flatten().numpy()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_correlations_are_scipys(kind: str, shape: tuple[int, ...]) -> None:
    a, b = pair(kind, shape)
    tolerance = 1e-7 if kind == "far from zero" else 1e-11  # of the numbers, not of the sums
    assert pearson(a, b) == pytest.approx(stats.pearsonr(flat(a), flat(b))[0], abs=tolerance)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(flat(a), flat(b))[0], abs=1e-11)
    np.testing.assert_array_equal(ranks(a).numpy(), stats.rankdata(flat(a)))


def test_millions_are_gone_through_chunk_by_chunk() -> None:
    """More than a chunk, the last one short, its numbers elsewhere than those of the others."""
    count = 2**20 + 2**19 + 7
    random = torch.Generator().manual_seed(0)
    a = torch.randn(count, generator=random)
    b = 0.3 * a + torch.randn(count, generator=random)
    a[2**20 :] += 5
    wanted = np.corrcoef(flat(a), flat(b))[0, 1]
    assert pearson(a, b) == pytest.approx(wanted, abs=1e-12)
    assert pearson(a.view(-1, 1), b.view(-1, 1)) == pearson(a, b)
    best = np.argsort(-flat(a))[:1000]
    (found,) = contribution_of_top(a, b, (1000,)).tolist()
    assert found == pytest.approx(flat(b)[best].sum(), rel=1e-4)  # single precision has ties


def test_tensors_are_left_as_they_are() -> None:
    a, b = pair("plain", (40,))
    before = a.clone(), b.clone()
    pearson(a, b)
    spearman(a, b)
    contribution_of_top(a, b, (1, 5, 40))
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_tiny_and_huge_numbers_correlate_alike() -> None:
    a, b = pair("plain", (200,))
    wanted = stats.pearsonr(flat(a), flat(b))[0]
    assert pearson(a * 1e-120, b * 1e120) == pytest.approx(wanted, abs=1e-11)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("count", [2, 9, 60])
def test_the_bootstrap_is_scipys(count: int, level: float) -> None:
    """The same draws by the same seed, hence the same interval to rounding."""
    values = np.random.default_rng(count).normal(size=count)
    found = bootstrap(list(values), seed=3, resamples=400, level=level)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=400, confidence_level=level, method="percentile",
        random_state=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert found.samples == count


@pytest.mark.parametrize("order", ["largest", "smallest", "absolute"])
def test_the_best_are_those_of_a_sort(order: str) -> None:
    relevance, contribution = pair("plain", (17, 23))
    key = {"largest": -flat(relevance), "smallest": flat(relevance),
           "absolute": -abs(flat(relevance))}[order]  # fmt: skip
    added = flat(contribution)[np.argsort(key)].cumsum()
    ks = (1, 2, 50, 391, 1000)
    wanted = [added[min(k, 391) - 1] for k in ks]
    found = contribution_of_top(relevance, contribution, ks, order)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)


def test_ties_take_the_mean_over_the_orders_they_may_come_in() -> None:
    relevance = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    contribution = torch.tensor([5.0, 1.0, 2.0, 6.0, 9.0])
    found = contribution_of_top(relevance, contribution, (1, 2, 3, 4, 5))
    assert found.tolist() == [5.0, 8.0, 11.0, 14.0, 23.0]
