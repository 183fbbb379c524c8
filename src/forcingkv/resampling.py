"""Bootstrap intervals of means: how far one may be from the mean over all that could have been drawn.

Efron and Tibshirani, "An introduction to the bootstrap", 1993: percentiles (13.3) and bias-corrected and
accelerated intervals (14.3). The same data give the same interval. Needs numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
SEED = 0
"""Of all resampling."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Bounds of each mean; NaN where there is nothing to resample."""

    low: Array
    high: Array


def resampling_weights(count: int, resamples: int) -> Array:
    """(resamples, count): the weight of each of `count` samples in the mean over each resample."""
    drawn = np.random.default_rng(SEED).integers(count, size=(resamples, count))
    counts = np.stack([(drawn == sample).sum(1) for sample in range(count)], 1)
    return np.asarray(counts / count)


def percentile_interval(resampled: Array, count: int) -> Interval:
    """The interval between percentiles of resampled means (resamples, ...); NaN for less than two samples."""
    if count < 2:
        nothing = np.full(resampled.shape[1:], np.nan)
        return Interval(nothing, nothing)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return Interval(low, high)


def ratio_interval(sums: Array, counts: Array, resamples: int) -> tuple[float, float]:
    """The bias-corrected and accelerated interval of sum(sums) / sum(counts), pairs drawn together.

    Args:
        sums: (groups,) of what a mean is taken of; the groups' means must not all be equal.
        counts: (groups,) how many values each sum has.
        resamples: how many sets of groups are drawn.
    """
    groups, normal = len(sums), NormalDist()
    drawn = np.random.default_rng(SEED).integers(0, groups, (resamples, groups))
    resampled = sums[drawn].sum(1) / counts[drawn].sum(1)
    ratio = sums.sum() / counts.sum()
    below = np.count_nonzero(resampled < ratio) + np.count_nonzero(resampled <= ratio)
    bias = normal.inv_cdf(below / (2 * resamples))
    others = ~np.eye(groups, dtype=bool)
    without = np.array([sums[rest].sum() / counts[rest].sum() for rest in others])
    change = without.mean() - without
    acceleration = (change**3).sum() / (change**2).sum() ** 1.5 / 6
    bounds = []
    for share in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2):
        shifted = bias + normal.inv_cdf(share)
        bounds.append(normal.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(resampled, bounds)
    return float(low), float(high)
