"""PSNR and SSIM against the formulas written out, pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forcingkv.headmaps import InputError
from forcingkv.measure.fidelity.pairs import mean_psnr, psnr, squared_error, ssim
from forcingkv.measure.fidelity.video_measures import measure_pair
from tests.measure.textures import moving, texture

Frames = np.ndarray[Any, np.dtype[np.uint8]]


def noisy(frame: Frames, spread: float, seed: int = 1) -> Frames:
    noise = np.random.default_rng(seed).normal(0, spread, frame.shape)
    return (frame + noise).clip(0, 255).astype(np.uint8)


def written_out_ssim(frame: Frames, other: Frames) -> float:
    """Wang et al. 2004, equations 13 to 17, with loops over windows."""
    offsets = np.arange(-5, 6)
    row = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(row, row) / row.sum() ** 2
    x, y = (0.299 * f[..., 0] + 0.587 * f[..., 1] + 0.114 * f[..., 2] for f in (frame, other))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(5, len(x) - 5):
        for j in range(5, x.shape[1] - 5):
            a, b = x[i - 5 : i + 6, j - 5 : j + 6], y[i - 5 : i + 6, j - 5 : j + 6]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            values.append(luminance * (2 * both + c2) / (var_a + var_b + c2))
    return float(np.mean(values))


@pytest.mark.parametrize("spread", [1.0, 10.0, 60.0])
def test_ssim_is_the_formula_written_out(spread: float) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8)
    other = noisy(frame, spread)
    assert ssim(frame, other) == pytest.approx(written_out_ssim(frame, other), abs=1e-9)


def test_identical_videos() -> None:
    video = moving(4)
    pair = measure_pair(video, video)
    assert pair["values"] == {"psnr": None, "ssim": 1.0}
    assert pair["psnr_by_frame"] == [None] * 4
    assert mean_psnr([video], [video]) is None


def test_psnr_is_the_formula_written_out() -> None:
    video = moving(3)
    other = np.stack([noisy(frame, 5, seed) for seed, frame in enumerate(video)])
    error = (
        sum((int(a) - int(b)) ** 2 for a, b in zip(video.ravel(), other.ravel(), strict=True)) / video.size
    )
    expected = 20 * math.log10(255) - 10 * math.log10(error)
    assert psnr(squared_error(video, other)) == pytest.approx(expected)
    assert measure_pair(video, other)["values"]["psnr"] == pytest.approx(expected)
    # Of several videos those that are identical are left out, not taken as some large number.
    assert mean_psnr([video, video], [other, video]) == pytest.approx(expected)


def test_one_level_everywhere_is_48_decibels() -> None:
    frame = texture(20, 20)
    assert psnr(squared_error(frame, frame + 1)) == pytest.approx(48.1308, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 80))
def test_ssim_is_symmetric_and_below_one(seed: int, spread: float) -> None:
    frame = texture(16, 20, seed % 1000)
    other = noisy(frame, spread, seed)
    assert ssim(frame, other) == pytest.approx(ssim(other, frame))
    assert -1 <= ssim(frame, other) <= 1


@settings(max_examples=25, deadline=None)
@given(st.floats(1, 20), st.floats(1.5, 3))
def test_more_noise_is_further_from_the_reference(spread: float, more: float) -> None:
    frame = texture(32, 40)
    near, far = noisy(frame, spread), noisy(frame, spread * more)
    assert (psnr(squared_error(near, frame)) or 0) > (psnr(squared_error(far, frame)) or 0)
    assert ssim(near, frame) > ssim(far, frame)


def test_videos_that_cannot_be_compared() -> None:
    video = moving(4)
    for other, message in [
        (video[:3], "has more than 3 frames; expected 3, as the reference has"),
        (moving(5), "has 4 frames; expected more than 4, as the reference has"),
        (video[:, :32], "has frames of 96x64; expected 96x32, as the reference has"),
    ]:
        with pytest.raises(InputError, match=message):
            measure_pair(video, other)
    small = video[:, :10]
    with pytest.raises(InputError, match=r"96x10; expected 11x11 pixels or more for SSIM"):
        measure_pair(small, small)
