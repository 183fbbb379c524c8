"""Intervals over prompts: how often they hold the truth, and that seeds do not stand in for prompts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from forcingkv.measure.fidelity.evaluation import Estimate, estimate


def width(found: Estimate) -> float:
    assert found.low is not None
    assert found.high is not None
    return found.high - found.low


def test_many_prompts_give_the_interval_of_the_textbook() -> None:
    values = np.random.default_rng(0).normal(3, 2, 200)
    found = estimate(values.tolist(), [f"prompt {i}" for i in range(200)])
    half = float(student.ppf(0.975, 199) * values.std(ddof=1) / np.sqrt(200))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert (found.videos, found.prompts) == (200, 200)


def test_seeds_do_not_stand_in_for_prompts() -> None:
    values = np.random.default_rng(0).normal(0, 1, 32)
    once = estimate(values.tolist(), [str(i) for i in range(32)])
    often = estimate(np.repeat(values, 8).tolist(), [str(i) for i in np.repeat(np.arange(32), 8)])
    fooled = estimate(np.repeat(values, 8).tolist(), [str(i) for i in range(256)])
    assert width(often) == pytest.approx(width(once), rel=1e-6)
    assert width(fooled) < 0.5 * width(once)
    assert (often.videos, often.prompts) == (256, 32)


def test_videos_without_a_value_are_left_out() -> None:
    found = estimate([1.0, None, 3.0, 5.0, None], ["a", "a", "a", "b", "c"])
    assert (found.mean, found.videos, found.prompts) == (3.0, 3, 2)
    assert estimate([None, None], ["a", "b"]) == Estimate(None, None, None, 0, 0)


def test_no_interval_from_what_does_not_differ() -> None:
    assert estimate([1.0] * 40, [str(i) for i in range(40)]) == Estimate(1.0, None, None, 40, 40)
    assert estimate([1.0, 2.0, 4.0], ["a"] * 3) == Estimate(7 / 3, None, None, 3, 1)


def test_what_excludes_zero() -> None:
    pairs = [((0.1, 0.3), True), ((-0.1, 0.3), False), ((-0.3, -0.1), True), ((None, None), False)]
    for (low, high), excluded in pairs:
        assert Estimate(0.2, low, high, 9, 9).excludes_zero == excluded


def test_the_same_videos_give_the_same_interval() -> None:
    values, prompts = np.random.default_rng(1).random(40).tolist(), [str(i) for i in range(40)]
    assert estimate(values, prompts) == estimate(values, prompts)


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "seeds", "least"), [(32, 1, 0.90), (32, 3, 0.90), (8, 1, 0.80)])
def test_how_often_the_interval_holds_the_mean(prompts: int, seeds: int, least: float) -> None:
    """Of 95% intervals of skewed values that are alike within a prompt. Below 32 prompts: fewer hold."""
    rng, held, rounds = np.random.default_rng(0), 0, 120
    names = [str(prompt) for prompt in np.repeat(np.arange(prompts), seeds)]
    for _ in range(rounds):
        common = np.repeat(rng.gamma(4.0, 1.0, prompts), seeds)
        found = estimate((common + rng.normal(0, 0.5, prompts * seeds)).tolist(), names)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 4.0 <= found.high
    assert least <= held / rounds <= 0.99, held / rounds
