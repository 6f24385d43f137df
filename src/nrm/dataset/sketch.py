"""Histograms with fixed edges: quantiles that merge exactly, in any order, on any machine.

Sketches that adapt to what they see (KLL, t-digest) choose at random or by the order of arrival,
so that a run that was interrupted would end with other quantiles than one that was not. Here every
number has its bin whatever else is counted: the first bits of its floating-point form, that is
`STEPS` equal steps between two powers of two. Counts are integers; merging adds them up.

The bin of `x` is 0 where `|x| < 2^-32`, else `1 + 16 (e + 32) + m` with the sign of `x`, where
`2^e (1 + m/16) <= |x| < 2^e (1 + (m+1)/16)`. The middle of a bin is within 1/32 (3.1 %) of every
number in it. What lies beyond `2^32` is counted in the last bin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STEPS = 16
"""Bins between two powers of two."""
LOWEST, HIGHEST = -32, 32
"""Powers of two: numbers that are smaller count as zero, larger ones as the largest."""
OUTERMOST = (HIGHEST - LOWEST) * STEPS
"""The number of the last bin; that of the first is as large, and negative."""
BINS = 2 * OUTERMOST + 1
ACCURACY = 1 / (2 * STEPS)
"""The largest relative error of a quantile, between the smallest and the largest bin."""

_MANTISSA = 52 - 4  # bits of a double that are below the first four of its fraction
_BIAS = 1023
_FIRST = (_BIAS + LOWEST) * STEPS


def bins(values: Floats) -> Ints:
    """The number of each value's bin, from `-OUTERMOST` to `OUTERMOST`."""
    sizes = np.abs(np.ascontiguousarray(values, np.float64)).view(np.int64) >> _MANTISSA
    found: Ints = np.clip(sizes - _FIRST + 1, 0, OUTERMOST)
    return np.where(values < 0, -found, found)


def edges(bin_number: int) -> tuple[float, float]:
    """The smallest and the largest absolute value of a bin, with its sign."""
    if bin_number == 0:
        return 0.0, 0.0
    power, step = divmod(abs(bin_number) - 1, STEPS)
    sign = 1.0 if bin_number > 0 else -1.0
    unit = sign * 2.0 ** (power + LOWEST)
    return unit * (1 + step / STEPS), unit * (1 + (step + 1) / STEPS)


def histogram(values: Floats) -> Ints:
    """How many values of each column are in which bin.

    Arguments:
        values: `[samples, parts]`.

    Returns:
        `[parts, BINS]`, from the bin `-OUTERMOST` on.
    """
    parts = values.shape[1]
    places = bins(values) + OUTERMOST + np.arange(parts) * BINS
    return np.bincount(places.ravel(), minlength=parts * BINS).reshape(parts, BINS)


def quantiles(counts: Ints, at: Sequence[float], lowest: Floats, highest: Floats) -> Floats:
    """Quantiles by nearest rank: the middle of the bin of the value with rank `ceil(q n)`.

    Arguments:
        counts: `[parts, BINS]`.
        at: from 0 to 1.
        lowest, highest: `[parts]`, the smallest and the largest value, beyond which no quantile
            lies.

    Returns:
        `[len(at), parts]`; NaN where nothing was counted.
    """
    middles = np.array([sum(edges(number)) / 2 for number in range(-OUTERMOST, OUTERMOST + 1)])
    cumulative = counts.cumsum(1)
    total = cumulative[:, -1]
    found = np.empty((len(at), len(counts)))
    for row, q in zip(found, at, strict=True):
        rank = np.maximum(np.ceil(q * total), 1)
        places = np.minimum((cumulative < rank[:, None]).sum(1), BINS - 1)
        row[:] = np.clip(middles[places], lowest, highest)
        row[total == 0] = np.nan
    return found
