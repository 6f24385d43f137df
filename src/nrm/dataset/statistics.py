"""What is kept of many samples: statistics of every part of a layer, which merge.

A *part* is a channel, a neuron or a set of one layer. Of each, and of each *quantity* (its
relevance, its activation), are kept: count, mean, sum of squared deviations, smallest and largest
value by class; a histogram (`nrm.dataset.sketch`); and the samples with the largest values.

Merging is a function of its two sides alone. What a run ends with depends on which statistics were
merged in which order, never on when they were computed: `merged` says the order, by the number of
the shard. Everything is in double precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Self, TypeVar

import numpy as np

from nrm.dataset.sketch import Floats, Ints, histogram

NOBODY = np.iinfo(np.int64).max
"""In the place of a sample where there are fewer than k."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and squared deviations, by class.

    Attributes:
        classes: `[n]`, which were met, in order.
        count: `[n]`, of samples.
        mean, squares, lowest, highest: `[n, parts]`; `squares` is the sum of squared deviations
            from the mean.
    """

    classes: Ints
    count: Ints
    mean: Floats
    squares: Floats
    lowest: Floats
    highest: Floats

    @classmethod
    def of(cls, values: Floats, classes: Ints) -> Self:
        """Those of samples.

        Arguments:
            values: `[samples, parts]`.
            classes: `[samples]`.
        """
        met, count = np.unique(classes, return_counts=True)
        order = np.argsort(classes, kind="stable")
        rows, starts = values[order], np.cumsum(count) - count
        if not len(met):
            return cls(met, count, *(np.empty((0, values.shape[1])) for _ in range(4)))
        mean = np.add.reduceat(rows, starts) / count[:, None]
        squares = np.add.reduceat((rows - mean.repeat(count, 0)) ** 2, starts)
        lowest, highest = (f.reduceat(rows, starts) for f in (np.minimum, np.maximum))
        return cls(met, count, mean, squares, lowest, highest)

    def merge(self, other: Self) -> Self:
        """Those of the samples of both (Chan, Golub, LeVeque 1979)."""
        met = np.union1d(self.classes, other.classes)
        one, two = self._spread(met), other._spread(met)
        count = one.count + two.count
        share = (two.count / np.maximum(count, 1))[:, None]
        gap = two.mean - one.mean
        mean = np.where(one.count[:, None] == 0, two.mean, one.mean + gap * share)
        squares = one.squares + two.squares + gap**2 * (one.count[:, None] * share)
        return type(self)(
            met,
            count,
            mean,
            squares,
            np.minimum(one.lowest, two.lowest),
            np.maximum(one.highest, two.highest),
        )

    def overall(self) -> Self:
        """Those of all classes together, class by class in their order; their class is -1."""
        each = [
            type(self)(
                np.array([-1]), self.count[n : n + 1], *(f[n : n + 1] for f in self._by_part())
            )
            for n in range(len(self.classes))
        ]
        return reduce(type(self).merge, each) if each else self

    def _by_part(self) -> tuple[Floats, Floats, Floats, Floats]:
        return self.mean, self.squares, self.lowest, self.highest

    def _spread(self, met: Ints) -> Self:
        """With a row for each of some classes, among them all that were met."""
        if len(met) == len(self.classes):
            return self
        places = np.searchsorted(met, self.classes)
        count = np.zeros(len(met), np.int64)
        count[places] = self.count
        rows = []
        for field, missing in zip(self._by_part(), (0.0, 0.0, np.inf, -np.inf), strict=True):
            row = np.full((len(met), field.shape[1]), missing)
            row[places] = field
            rows.append(row)
        return type(self)(met, count, *rows)


@dataclass(frozen=True)
class Top:
    """The k samples with the largest values; of equal values, those with the smaller numbers.

    Attributes:
        values: `[parts, k]`, the largest first; minus infinity where there are fewer samples.
        samples: `[parts, k]`, their numbers; `NOBODY` where there are fewer.
    """

    values: Floats
    samples: Ints

    @classmethod
    def of(cls, values: Floats, samples: Ints, k: int) -> Self:
        """Those of some samples.

        Arguments:
            values: `[samples, parts]`.
            samples: `[samples]`, their numbers.
        """
        parts = values.shape[1]
        return cls._best(values.T, np.broadcast_to(samples, (parts, len(samples))), k)

    def merge(self, other: Self) -> Self:
        """Those of the samples of both."""
        values = np.concatenate([self.values, other.values], 1)
        samples = np.concatenate([self.samples, other.samples], 1)
        return self._best(values, samples, self.values.shape[1])

    @classmethod
    def _best(cls, values: Floats, samples: Ints, k: int) -> Self:
        by_number = np.argsort(samples, axis=1, kind="stable")
        values = np.take_along_axis(values, by_number, 1)
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(values, order, 1)
        samples = np.take_along_axis(np.take_along_axis(samples, by_number, 1), order, 1)
        missing = ((0, 0), (0, k - values.shape[1]))
        return cls(
            np.pad(values, missing, constant_values=-np.inf),
            np.pad(samples, missing, constant_values=NOBODY),
        )


@dataclass(frozen=True)
class Statistics:
    """Of one quantity of one layer.

    Attributes:
        counts: `[parts, BINS]`, the histogram over all classes.
    """

    moments: Moments
    counts: Ints
    top: Top

    @classmethod
    def of(cls, values: Floats, samples: Ints, classes: Ints, k: int) -> Self:
        """Of some samples: `[samples, parts]`, their numbers and classes `[samples]`."""
        return cls(Moments.of(values, classes), histogram(values), Top.of(values, samples, k))

    def merge(self, other: Self) -> Self:
        """Of the samples of both."""
        return type(self)(
            self.moments.merge(other.moments),
            self.counts + other.counts,
            self.top.merge(other.top),
        )


@dataclass(frozen=True)
class Joint:
    """Joint relevance of all pairs of parts of two layers, by class.

    Attributes:
        classes, count: `[n]`.
        mean: `[n, parts of the first, parts of the second]`.
        highest: shaped alike, the largest value.
        samples: shaped alike, the number of the sample that has it, the smallest of several.
    """

    classes: Ints
    count: Ints
    mean: Floats
    highest: Floats
    samples: Ints

    @classmethod
    def of(cls, values: Floats, samples: Ints, classes: Ints) -> Self:
        """Of some samples: `[samples, a, b]`, their numbers and classes `[samples]`."""
        order = np.argsort(samples)  # so that of equal values the first is the smallest number's
        values, samples, classes = values[order], samples[order], classes[order]
        met, count = np.unique(classes, return_counts=True)
        rows = [values[classes == one] for one in met]
        numbers = [samples[classes == one] for one in met]
        shape = (0, *values.shape[1:])
        return cls(
            met,
            count,
            np.stack([row.mean(0) for row in rows]) if rows else np.empty(shape),
            np.stack([row.max(0) for row in rows]) if rows else np.empty(shape),
            np.stack([n[row.argmax(0)] for n, row in zip(numbers, rows, strict=True)])
            if rows
            else np.empty(shape, np.int64),
        )

    def merge(self, other: Self) -> Self:
        """Of the samples of both."""
        met = np.union1d(self.classes, other.classes)
        one, two = self._spread(met), other._spread(met)
        count = one.count + two.count
        share = (two.count / np.maximum(count, 1))[:, None, None]
        only = (one.count == 0)[:, None, None]
        mean = np.where(only, two.mean, one.mean + (two.mean - one.mean) * share)
        equal = two.highest == one.highest
        later = (two.highest > one.highest) | (equal & (two.samples < one.samples))
        return type(self)(
            met,
            count,
            mean,
            np.where(later, two.highest, one.highest),
            np.where(later, two.samples, one.samples),
        )

    def overall(self) -> Self:
        """Of all classes together; their class is -1."""
        each = [
            type(self)(
                np.array([-1]),
                self.count[n : n + 1],
                self.mean[n : n + 1],
                self.highest[n : n + 1],
                self.samples[n : n + 1],
            )
            for n in range(len(self.classes))
        ]
        return reduce(type(self).merge, each) if each else self

    def _spread(self, met: Ints) -> Self:
        if len(met) == len(self.classes):
            return self
        places = np.searchsorted(met, self.classes)
        shape = (len(met), *self.mean.shape[1:])
        count = np.zeros(len(met), np.int64)
        mean, highest = np.zeros(shape), np.full(shape, -np.inf)
        samples = np.full(shape, NOBODY)
        count[places], mean[places] = self.count, self.mean
        highest[places], samples[places] = self.highest, self.samples
        return type(self)(met, count, mean, highest, samples)


Merges = TypeVar("Merges", Statistics, Joint)


def merged(each: Iterable[Merges]) -> Merges:
    """All of them, merged from the first to the last.

    Raises:
        TypeError: there are none.
    """
    return reduce(lambda one, two: one.merge(two), each)
