"""Statistics that merge: against NumPy on all values at once, and in any order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="nrm[dataset] is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from nrm.dataset.sketch import ACCURACY, BINS, OUTERMOST, bins, edges, histogram, quantiles
from nrm.dataset.statistics import NOBODY, Joint, Moments, Top, merged

SEEDS = st.integers(0, 2**32 - 1)


def _values(seed: int, parts: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values with ties, numbers out of order, classes: cut into pieces by `_pieces`."""
    random = np.random.default_rng(seed)
    samples = int(random.integers(1, 40))
    values = random.integers(-3, 4, (samples, parts)) * random.choice([1.0, 0.1, 1e-9, 1e6])
    return values, random.permutation(100)[:samples], random.integers(0, 3, samples)


def _pieces(seed: int, length: int) -> list[slice]:
    random = np.random.default_rng(seed + 1)
    cuts = sorted({0, length, *random.integers(0, length + 1, 3).tolist()})
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def test_every_number_lies_within_the_edges_of_its_bin() -> None:
    sizes = np.concatenate(
        [2.0 ** np.arange(-32, 32), np.random.default_rng(0).lognormal(0, 5, 999)]
    )
    for value, number in zip((*sizes, *-sizes), bins(np.array([*sizes, *-sizes])), strict=True):
        near, far = edges(int(number))
        assert abs(near) <= abs(value) < abs(far)
        assert math.copysign(1, near) == math.copysign(1, value)
        assert abs((near + far) / 2 - value) <= ACCURACY * abs(value)


def test_numbers_beyond_the_outermost_bins() -> None:
    values = np.array([0.0, -0.0, 2.0**-33, -(2.0**-33), 2.0**40, -(2.0**40), 2.0**-32])
    assert bins(values).tolist() == [0, 0, 0, 0, OUTERMOST, -OUTERMOST, 1]


def test_bins_are_next_to_each_other() -> None:
    for number in range(1, OUTERMOST):
        assert edges(number)[1] == edges(number + 1)[0]
        assert edges(-number) == tuple(-edge for edge in edges(number))


@given(SEEDS, st.sampled_from([0.0, 0.01, 0.25, 0.5, 0.9, 1.0]))
@settings(max_examples=60, deadline=None)
def test_quantiles_are_those_of_the_sorted_values(seed: int, q: float) -> None:
    values = np.random.default_rng(seed).standard_cauchy((57, 4))
    counts = histogram(values)
    assert counts.shape == (4, BINS)
    assert (counts.sum(1) == 57).all()
    (found,) = quantiles(counts, [q], values.min(0), values.max(0))
    exact = np.sort(values, 0)[max(math.ceil(q * 57), 1) - 1]
    np.testing.assert_allclose(found, exact, rtol=ACCURACY, atol=2.0**-32)


def test_quantiles_of_nothing_are_not_numbers() -> None:
    assert np.isnan(quantiles(np.zeros((2, BINS), np.int64), [0.5], np.zeros(2), np.zeros(2))).all()


@given(SEEDS)
@settings(max_examples=80, deadline=None)
def test_moments_of_pieces_are_those_of_all(seed: int) -> None:
    values, _, classes = _values(seed)
    pieces = [Moments.of(values[p], classes[p]) for p in _pieces(seed, len(values))]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole.merge(piece)
    overall = whole.overall()
    each = [(whole, n, values[classes == one]) for n, one in enumerate(whole.classes)]
    for moments, at, rows in (*each, (overall, 0, values)):
        assert moments.count[at] == len(rows)
        scale = max(np.abs(rows).max(), 1e-300)
        np.testing.assert_allclose(moments.mean[at], rows.mean(0), atol=1e-12 * scale)
        variance = moments.squares[at] / moments.count[at]
        np.testing.assert_allclose(variance, rows.var(0), atol=1e-12 * scale**2)
        assert (moments.lowest[at] == rows.min(0)).all()
        assert (moments.highest[at] == rows.max(0)).all()


def test_variance_keeps_its_digits_far_from_zero() -> None:
    values = 1e9 + np.arange(6.0)[:, None]
    halves = [Moments.of(values[half], np.zeros(3, int)) for half in (slice(3), slice(3, 6))]
    found = halves[0].merge(halves[1])
    assert found.squares[0, 0] / 6 == pytest.approx(np.arange(6).var(), rel=1e-9)


@given(SEEDS, st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_top_of_pieces_in_any_order_is_that_of_all(seed: int, k: int) -> None:
    values, samples, _ = _values(seed)
    pieces = [Top.of(values[p], samples[p], k) for p in _pieces(seed, len(values))]
    for order in (pieces, pieces[::-1]):
        found = order[0]
        for piece in order[1:]:
            found = found.merge(piece)
        for part in range(values.shape[1]):
            ranked = sorted(zip(-values[:, part], samples, strict=True))[:k]
            count = len(ranked)
            assert found.samples[part].tolist() == [n for _, n in ranked] + [NOBODY] * (k - count)
            assert found.values[part, :count].tolist() == [-v for v, _ in ranked]
            assert (found.values[part, count:] == -np.inf).all()


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_joint_of_pieces_is_that_of_all(seed: int) -> None:
    values, samples, classes = _values(seed, parts=6)
    values = values.reshape(-1, 2, 3)
    found = merged(
        [Joint.of(values[p], samples[p], classes[p]) for p in _pieces(seed, len(values))]
    )
    together = found.overall()
    for joint, at, rows in (
        *((found, n, classes == one) for n, one in enumerate(found.classes)),
        (together, 0, np.ones(len(values), bool)),
    ):
        assert joint.count[at] == rows.sum()
        scale = max(np.abs(values).max(), 1e-300)
        np.testing.assert_allclose(joint.mean[at], values[rows].mean(0), atol=1e-12 * scale)
        assert (joint.highest[at] == values[rows].max(0)).all()
        for a, b in itertools.product(range(2), range(3)):
            best = values[rows, a, b] == joint.highest[at, a, b]
            assert joint.samples[at, a, b] == samples[rows][best].min()
