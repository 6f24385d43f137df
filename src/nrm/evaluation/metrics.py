"""How well relevance agrees with contribution (section 4.1), and how sure one is of a mean.

Correlations, contributions of the k most relevant combinations (eq. 58), bootstrap intervals. They
give scipy's values, which tests compare them with, but chunk by chunk and on the tensors' device:
the joint relevances of two layers are tens of millions of numbers. All is added up in double
precision, whatever the tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nrm.errors import QueryError

Ranking = Literal["largest", "smallest", "absolute"]
"""Which combinations are the most relevant ones."""

_CHUNK = 2**20
"""Elements that are there in double precision at a time."""
_DRAWN = 2**22
"""Numbers that a bootstrap draws at a time."""


def pearson(a: Tensor, b: Tensor) -> float | None:
    """The correlation of two tensors' elements; `None` where one of them is constant.

    Chunk by chunk: beside the tensors there is never more than a few megabytes of numbers.

    Raises:
        QueryError: they have other shapes, no elements, or some that are not finite.
    """
    _require_alike(a, b)
    if _constant(a) or _constant(b):
        return None
    # Centred first: sums of squares would cancel, as most of millions of relevances are near zero.
    mean_x, mean_y = _mean(a), _mean(b)
    xx = yy = xy = 0.0
    for x, y in _chunks(a, b):
        x, y = x.sub_(mean_x), y.sub_(mean_y)
        xx, yy, xy = xx + float(x @ x), yy + float(y @ y), xy + float(x @ y)
    size = math.sqrt(xx) * math.sqrt(yy)  # one by one: their product may overflow
    return min(1.0, max(-1.0, xy / size)) if size > 0 else None


def spearman(a: Tensor, b: Tensor) -> float | None:
    """The correlation of two tensors' ranks, where ties share theirs; as `pearson` otherwise.

    Sorts both: some 3 s and half a GB for each of 25 million elements.
    """
    _require_alike(a, b)
    return pearson(ranks(a), ranks(b))


def ranks(values: Tensor) -> Tensor:
    """The rank of every element from 1 on, flat and of double precision; ties share their mean."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    shared: Tensor = counts.cumsum(0).double() - (counts - 1).double() / 2
    return shared[places.flatten()]


def contribution_of_top(
    relevance: Tensor, contribution: Tensor, ks: Sequence[int], order: Ranking = "largest"
) -> Tensor:
    """`SC_k` (eq. 58): the contributions of the k most relevant combinations, added up.

    Where combinations are tied for the last places, each place takes the mean contribution of the
    tied ones: the expectation over the orders that they may come in. The result depends on the
    order of no axis.

    Arguments:
        relevance, contribution: of each combination, of one shape.
        ks: how many; more than there are takes all.
        order: by what they are the most relevant.

    Returns:
        `[len(ks)]`, of double precision.
    """
    _require_alike(relevance, contribution)
    require_ranking(ks, order)
    if not ks:
        return torch.zeros(0, dtype=torch.float64)
    for values in (relevance, contribution):
        _require_finite(values)
    wanted = [min(k, relevance.numel()) for k in ks]
    key = _key(relevance, order)
    added = _by_place(key, contribution.reshape(-1).to(key.device), max(wanted)).cumsum(0)
    return torch.stack([added[k - 1] for k in wanted]).cpu()


def require_ranking(ks: Sequence[int], order: Ranking) -> None:
    """Refuse what `contribution_of_top` refuses, before there are any combinations."""
    if not isinstance(ks, Sequence) or isinstance(ks, str):
        raise QueryError(f"ks are a list of numbers, as in (1, 10, 100), not {ks!r}.")
    if order not in get_args(Ranking):
        raise QueryError(f"the order is one of {get_args(Ranking)}, not {order!r}")
    for k in ks:
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
            raise QueryError(f"SC_k is of the k = 1, 2, … most relevant combinations, not {k!r}.")


@dataclass(frozen=True)
class Mean:
    """A mean over samples with its bootstrap interval; `None` where there is no sample.

    Attributes:
        low, high: the ends of the interval.
        samples: how many it is of; those without a value are left out.
    """

    mean: float | None
    low: float | None
    high: float | None
    samples: int

    def __str__(self) -> str:
        if self.mean is None:
            return "unknown"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(
    values: Sequence[float | None], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Mean:
    """The mean, and the percentiles between which it lies when the samples are drawn again.

    With the same seed, lists that lack the same values are drawn alike.

    Arguments:
        values: of each sample; `None` where it has none, and is left out.
        resamples: how many times they are drawn.
        level: how often the mean of such a draw lies in the interval.

    Raises:
        QueryError: it is never drawn, or for no level.
    """
    if resamples < 1 or not 0 < level < 1:
        raise QueryError(
            f"a bootstrap draws at least once, for a level between 0 and 1; not {resamples} times "
            f"for {level}."
        )
    require_seed(seed)
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return Mean(None, None, None, 0)
    means = _means_of_draws(known, np.random.default_rng(seed), resamples)
    low, high = np.percentile(means, [50 - 50 * level, 50 + 50 * level])
    return Mean(float(known.mean()), float(low), float(high), len(known))


def require_seed(seed: int) -> None:
    """Refuse what no random numbers can be drawn by."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise QueryError(f"a seed is 0, 1, 2, …, not {seed!r}.")


def bootstrap_difference(
    a: Sequence[float | None],
    b: Sequence[float | None],
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Mean:
    """The mean of `a - b`, sample by sample: a paired comparison of two methods.

    Samples of which one value is missing are left out. Other arguments: as for `bootstrap`.

    Raises:
        QueryError: there are not as many of both.
    """
    if len(a) != len(b):
        raise QueryError(f"{len(a)} values are not to be paired with {len(b)}.")
    differences = [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]
    return bootstrap(differences, seed, resamples, level)


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The elements of both, some at a time, as copies of double precision."""
    parts = (torch.split(flat.reshape(-1), _CHUNK) for flat in (a, b))
    for x, y in zip(*parts, strict=True):
        yield x.to(torch.float64, copy=True), y.to(x.device, torch.float64, copy=True)


def _mean(values: Tensor) -> float:
    """Of all elements."""
    parts = torch.split(values.reshape(-1), _CHUNK)
    return sum(float(part.sum(dtype=torch.float64)) for part in parts) / values.numel()


def _by_place(key: Tensor, contribution: Tensor, k: int) -> Tensor:
    """`[k]`: the contribution at each place from the largest key on, the mean of those tied."""
    last = _kth(key, k)
    above, tied = key > last, key == last
    # Few are above, even where nearly everything is tied: only they are sorted.
    values, places, counts = torch.unique(key[above], return_inverse=True, return_counts=True)
    sums = torch.zeros(len(values), dtype=torch.float64, device=key.device)
    sums.index_add_(0, places, contribution[above].to(sums))
    means = (sums / counts).flip(0).repeat_interleave(counts.flip(0))
    rest = contribution[tied].mean(dtype=torch.float64).to(sums)
    return torch.cat([means, rest.expand(k - len(means))])


def _kth(values: Tensor, k: int) -> Tensor:
    """The k-th largest value: chunk by chunk, since of most none comes near it."""
    best = values[:0]
    for part in torch.split(values, _CHUNK):
        higher = part if len(best) < k else part[part > best[-1]]
        best = torch.cat([best, higher])
        best = torch.topk(best, min(k, len(best))).values
    return best[-1]


def _key(relevance: Tensor, order: Ranking) -> Tensor:
    """What is largest where the relevance comes first."""
    flat = relevance.reshape(-1)
    if not flat.is_floating_point():
        flat = flat.double()  # which has an opposite of every number
    if order == "largest":
        return flat
    return -flat if order == "smallest" else flat.abs()


def _means_of_draws(
    known: np.ndarray[tuple[int], np.dtype[np.float64]], random: np.random.Generator, resamples: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """`[resamples]`, a bounded number of draws at a time."""
    rows = max(1, _DRAWN // len(known))
    means = [
        known[random.integers(0, len(known), (min(rows, resamples - done), len(known)))].mean(1)
        for done in range(0, resamples, rows)
    ]
    return np.concatenate(means)


def _constant(values: Tensor) -> bool:
    """Whether all elements are the same.

    Raises:
        QueryError: some are not finite.
    """
    low, high = _require_finite(values)
    return low == high


def _require_finite(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest element.

    Raises:
        QueryError: some are not finite.
    """
    low, high = (float(end) for end in torch.aminmax(values))
    if not math.isfinite(low) or not math.isfinite(high):
        raise QueryError("values to be compared hold NaN or infinite ones.")
    return low, high


def _require_alike(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise QueryError(f"{tuple(a.shape)} is not to be compared with {tuple(b.shape)}.")
    if not a.numel():
        raise QueryError("there is nothing to compare.")
    if a.is_complex() or b.is_complex():
        raise QueryError("complex numbers have no order to compare.")
