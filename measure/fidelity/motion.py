"""How a video moves: numbers of each adjacent pair of frames, and its dynamic degree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forcingkv.measure.fidelity.flow import FlowMeter, PairFlow

Frame = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

SAMPLED_FPS = 8
"""Frames a second at which dynamic degree is judged (VBench)."""
THRESHOLD, SIDE = 6.0, 256
"""A pair moves from 6 pixels on in frames whose shorter side has 256 pixels, and in proportion (VBench)."""
MOVING, OF = 4, 16
"""A video moves if 4 pairs do for every 16 frames (VBench)."""


@dataclass(frozen=True)
class Motion:
    """Of a video of n frames; pixels are those of the original frames."""

    magnitude: Floats
    """(n - 1,) mean length of the flow of each adjacent pair, in pixels."""
    change: Floats
    """(n - 2,) mean length of the difference between the flows of a pair and of the pair after it, in
    pixels: entry i is between pairs i and i + 1."""
    residual: Floats
    """(n - 1,) mean absolute difference that the flow leaves unexplained, in grey levels."""
    dynamic: bool
    """Whether VBench's rule calls it moving (`moves`)."""


class MotionMeter:
    """Takes the frames of one video, one by one.

    Args:
        fps: frames a second of the video.
    """

    def __init__(self, fps: float) -> None:
        self._interval = max(1, round(fps / SAMPLED_FPS))
        self._meter: FlowMeter | None = None
        self._frames = 0
        self._last: Frame | None = None
        self._sampled: Frame | None = None
        self._flow: PairFlow | None = None
        self._magnitude, self._change = list[float](), list[float]()
        self._residual, self._fastest = list[float](), list[float]()

    def add(self, frame: Frame) -> None:
        """Take the next frame, uint8 (height, width, 3)."""
        self._meter = self._meter or FlowMeter(*frame.shape[:2])
        if self._last is not None:
            self._add_pair(self._meter.between(self._last, frame))
        if self._frames % self._interval == 0:
            self._sample(self._meter, frame)
        self._last, self._frames = frame, self._frames + 1

    def motion(self) -> Motion:
        """Of the frames so far, of which there are two or more."""
        if self._last is None or not self._magnitude:
            raise RuntimeError("there are no two frames yet")
        sampled = (self._frames - 1) // self._interval + 1
        return Motion(
            magnitude=np.array(self._magnitude),
            change=np.array(self._change),
            residual=np.array(self._residual),
            dynamic=moves(self._fastest, sampled, min(self._last.shape[:2])),
        )

    def _add_pair(self, pair: PairFlow) -> None:
        self._magnitude.append(pair.magnitude)
        self._residual.append(pair.residual)
        if self._flow is not None:
            turned = pair.flow - self._flow.flow
            self._change.append(float(np.hypot(turned[..., 0], turned[..., 1]).mean(dtype=np.float64)))
        self._flow = pair

    def _sample(self, meter: FlowMeter, frame: Frame) -> None:
        """The same at 8 frames a second, of which dynamic degree alone is made."""
        if self._sampled is not None:
            adjacent = self._flow if self._interval == 1 else None
            self._fastest.append((adjacent or meter.between(self._sampled, frame)).fastest)
        self._sampled = frame


def moves(fastest: list[float], frames: int, side: int) -> bool:
    """VBench's dynamic degree of one video; its score is the share of videos that move.

    A video moves if at least round(4 * frames / 16) pairs of frames are faster than 6 * side / 256 pixels
    (Huang et al., "VBench: comprehensive benchmark suite for video generative models", CVPR 2024, and its
    public code). VBench takes the flow from RAFT; here it is that of DIS.

    Args:
        fastest: for each pair of frames at 8 frames a second, the mean flow of its fastest 5% of pixels.
        frames: how many frames the pairs are of.
        side: pixels of the shorter side.
    """
    count = sum(speed > THRESHOLD * side / SIDE for speed in fastest)
    return count >= max(1, round(MOVING * frames / OF))
