"""Optical flow of known motion, what it leaves, and VBench's rule of what moves."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from forcingkv.measure.fidelity.motion import FlowMeter, Motion, enlargement, measure_motion, moves
from tests.measure.textures import Frames, moving


def motion_of(video: Frames, fps: float = 8.0) -> Motion:
    return measure_motion(iter(video), fps)


@pytest.mark.parametrize(
    ("size", "step"),
    [
        (size, step)
        for size in [(16, 24), (32, 48), (64, 96), (200, 300)]
        for step in [(0, 1), (2, 0), (-1, 2), (3, -3)]
        if max(map(abs, step)) <= min(size) / 8
    ]
    + [((64, 96), (0, 5)), ((200, 300), (0, 16)), ((480, 832), (0, 40))],
)
def test_the_flow_of_a_translation_is_that_translation(size: tuple[int, int], step: tuple[int, int]) -> None:
    """Within 5% or a twentieth of a pixel: also of tiny frames, which are enlarged."""
    first, second = moving(2, step, *size)
    pair = FlowMeter(*size).between(first, second)
    length = float(np.hypot(*step))
    assert pair.magnitude == pytest.approx(length, rel=0.05, abs=0.05)
    down, right = np.median(pair.flow[..., 1]), np.median(pair.flow[..., 0])
    assert (down, right) == pytest.approx(step, abs=0.05)
    assert pair.fastest >= pair.magnitude


def test_a_frame_and_itself() -> None:
    frame = moving(1)[0]
    pair = FlowMeter(*frame.shape[:2]).between(frame, frame)
    assert (pair.magnitude, pair.fastest, pair.residual) == (0, 0, 0)


def test_brightness_that_jumps_is_residual_and_not_motion() -> None:
    first, second = moving(2)
    meter = FlowMeter(*first.shape[:2])
    plain, brighter = meter.between(first, second), meter.between(first, second + 10)
    assert brighter.magnitude == pytest.approx(plain.magnitude, rel=0.02)
    assert plain.residual < 1.5
    assert brighter.residual == pytest.approx(10, abs=1.5)


def test_only_tiny_frames_are_enlarged() -> None:
    assert [enlargement(*size) for size in [(16, 24), (32, 48), (100, 300), (128, 200), (480, 832)]] == [
        8,
        4,
        2,
        1,
        1,
    ]


def test_threads_change_nothing() -> None:
    first, second = moving(2, (1, 2), 150, 200)
    before, found = cv2.getNumThreads(), []
    try:
        for threads in (1, 3):
            cv2.setNumThreads(threads)
            found.append(FlowMeter(150, 200).between(first, second).flow)
    finally:
        cv2.setNumThreads(before)
    assert np.array_equal(*found)


def test_even_motion_has_no_change() -> None:
    motion = motion_of(moving(5, (0, 2)))
    assert motion.magnitude.shape == motion.residual.shape == (4,)
    assert motion.magnitude == pytest.approx([2] * 4, rel=0.05)
    assert motion.change.shape == (3,)
    assert motion.change.max() < 0.15
    # There and back: the flow turns round, and so changes by twice its length.
    video = moving(3, (0, 2))
    assert motion_of(video[[0, 1, 0]]).change == pytest.approx([4], rel=0.1)


def test_what_moves() -> None:
    """VBench: 4 pairs of 16 frames above 6 pixels, where the shorter side has 256 pixels."""
    assert moves([6.1] * 4 + [0.0] * 11, 256)
    assert not moves([6.1] * 3 + [5.9] * 12, 256)
    assert moves([0.8] * 4 + [0.0] * 11, 32)  # in proportion
    assert moves([6.1] * 10 + [0.0] * 29, 256)
    assert not moves([6.1] * 9 + [0.0] * 30, 256)


def test_dynamic_degree_is_judged_at_eight_frames_a_second() -> None:
    # One pixel a frame: below 1.5 in frames of 64 pixels; at 16 frames a second every second is looked at.
    video = moving(17, (0, 1))
    assert not motion_of(video, fps=8).dynamic
    assert motion_of(video, fps=16).dynamic
    still = np.repeat(video[:1], 9, 0)
    assert not motion_of(still).dynamic
    assert motion_of(still).magnitude.max() == 0
