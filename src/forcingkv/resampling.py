"""Bootstrap intervals of means: how far one may be from the mean over all that could have been drawn.

Percentiles of resampled means: Efron and Tibshirani, "An introduction to the bootstrap", 1993, section 13.3.
The same data give the same interval. Needs numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

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
