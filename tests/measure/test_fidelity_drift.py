"""Drift that is planted, and the distance of histograms against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from forcingkv.measure.fidelity.drift import drift, histogram_distance, look_of
from studies.planted_seams import brighten, soften, tint
from tests.measure.textures import Frames, moving

FPS = 8.0


def drift_of(video: Frames, fps: float = FPS) -> dict[str, float]:
    return drift([look_of(frame) for frame in video], fps)


def test_a_video_that_stands_still_does_not_drift() -> None:
    assert set(drift_of(np.repeat(moving(1), 20, 0)).values()) == {0.0}


def test_each_planted_drift_is_seen_by_its_measure() -> None:
    frame = moving(1)
    start = np.repeat(frame, 10, 0)

    def ending(change: Frames) -> dict[str, float]:
        return drift_of(np.concatenate([start, np.repeat(change, 10, 0)]))

    soft, tinted, bright = ending(soften(1.5)(frame)), ending(tint(20)(frame)), ending(brighten(20)(frame))
    flat = ending((128 + (frame.astype(int) - 128) // 2).astype(np.uint8))
    assert soft["sharpness_drift"] < -1
    assert soft["colour_drift"] < 0.5
    assert tinted["chroma_drift"] > 10
    assert tinted["colour_drift"] > 10
    assert bright["contrast_drift"] == pytest.approx(0, abs=1)
    assert bright["colour_drift"] > 5
    assert flat["contrast_drift"] < -5
    assert flat["histogram_drift"] > 2


def test_known_colours() -> None:
    """sRGB red is L* 53.2, a* 80.1, b* 67.2; white is 100, 0, 0."""
    colours = np.array([[[255, 0, 0]], [[255, 255, 255]]], np.uint8)
    red, white = (look_of(np.broadcast_to(colour, (8, 8, 3)).copy()) for colour in colours)
    assert red.colour == pytest.approx([53.2, 80.1, 67.2], abs=0.2)
    assert white.colour == pytest.approx([100, 0, 0], abs=0.2)
    assert red.chroma == pytest.approx(np.hypot(80.1, 67.2), abs=0.3)
    assert (red.contrast, red.sharpness) == (pytest.approx(0, abs=1e-4), 0)
    assert np.flatnonzero(red.histogram[0]).tolist() == [53]
    assert red.histogram.sum(1) == pytest.approx([1, 1, 1])


def test_grey_has_no_colour() -> None:
    greys = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    found = look_of(greys)
    assert found.chroma == 0
    assert found.colour[1:].tolist() == [0, 0]


def test_sharpness_is_the_variance_of_the_second_difference() -> None:
    frame = moving(1)[0]
    grey = frame[..., 0].astype(float)
    padded = np.pad(grey, 1, mode="reflect")
    laplacian = (padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]) - 4 * grey
    assert look_of(frame).sharpness == pytest.approx(laplacian.var())


def test_the_worst_second_is_not_the_last_one() -> None:
    frame = moving(1)
    parts = [frame, tint(30)(frame), frame]
    found = drift_of(np.concatenate([np.repeat(part, 10, 0) for part in parts]))
    assert found["colour_drift"] == 0
    assert found["colour_drift_most"] > 10


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 256))
def test_the_distance_of_histograms_is_scipys(seed: int, bins: int) -> None:
    shares, others = np.random.default_rng(seed).dirichlet(np.ones(bins), 2)
    places = np.arange(bins)
    assert histogram_distance(shares, others) == pytest.approx(
        wasserstein_distance(places, places, shares, others), abs=1e-9
    )


def test_short_videos_are_halved() -> None:
    frame = moving(1)
    video = np.concatenate([frame, frame, tint(20)(frame)])
    assert drift_of(video, fps=24)["colour_drift"] > 10
