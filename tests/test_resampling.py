"""Bootstrap intervals against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from forcingkv.resampling import percentile_interval, resampling_weights


def test_percentile_intervals_are_those_of_scipy() -> None:
    values = np.random.default_rng(1).normal(size=12)
    ours = percentile_interval(resampling_weights(12, 2000) @ values, 12)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=1e-12)


def test_weights_of_a_resample_sum_to_1() -> None:
    weights = resampling_weights(5, 100)
    assert weights.shape == (100, 5)
    assert weights.sum(1) == pytest.approx(np.ones(100))


def test_one_sample_has_no_interval() -> None:
    interval = percentile_interval(resampling_weights(1, 50) @ np.ones((1, 3)), 1)
    assert np.isnan(interval.low).tolist() == np.isnan(interval.high).tolist() == [True] * 3
