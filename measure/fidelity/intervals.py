"""Intervals over videos, by resampling prompts.

Videos of one prompt are alike, so prompts are what is drawn, each with all its seeds (a cluster bootstrap:
Davison and Hinkley, "Bootstrap methods and their application", 1997, section 3.8). More seeds make each
prompt better known; they do not stand in for prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forcingkv.resampling import ratio_interval

FEW = 32
"""Videos below which intervals are known to be too narrow, and a result warns."""
RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean over videos, and the interval that holds the mean over all such prompts."""

    mean: float | None
    """None where no video has a value."""
    low: float | None
    high: float | None
    """None for fewer than two prompts, and where all prompts have the same mean: resampling equal values
    cannot show how others would differ."""
    videos: int
    """How many have a value."""
    prompts: int
    """How many they are of."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float | None], prompts: Sequence[str]) -> Estimate:
    """The mean of the values that are known, with its bias-corrected and accelerated bootstrap interval.

    Args:
        values: of each video; None where it has none.
        prompts: of each video; those of one prompt are drawn together.
    """
    groups: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        if value is not None:
            groups.setdefault(prompt, []).append(value)
    videos = sum(map(len, groups.values()))
    if not groups:
        return Estimate(None, None, None, 0, 0)
    sums = np.array([sum(group) for group in groups.values()], np.float64)
    counts = np.array([len(group) for group in groups.values()], np.float64)
    mean, means = float(sums.sum() / counts.sum()), sums / counts
    if len(groups) < 2 or np.ptp(means) <= 1e-12 * max(1.0, float(np.abs(means).max())):
        return Estimate(mean, None, None, videos, len(groups))
    low, high = ratio_interval(sums, counts, RESAMPLES)
    return Estimate(mean, low, high, videos, len(groups))
