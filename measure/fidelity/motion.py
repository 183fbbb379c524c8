"""How a video moves: optical flow of each adjacent pair of frames, and the dynamic degree of the video.

The flow is dense, by DIS (Kroeger et al., "Fast optical flow using dense inverse search", ECCV 2016), as in
OpenCV: it needs no weights and runs on a CPU. VBench uses RAFT, a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Floats32 = npt.NDArray[np.float32]

PRESET = cv2.DISOPTICAL_FLOW_PRESET_MEDIUM
SHORTEST = 128
"""Pixels of the shorter side from which frames are taken as they are: DIS looks for motion from coarse to
fine, in patches of 8 pixels, and has no coarse scale in frames of a few patches."""
FASTEST = 0.05
"""Share of pixels whose mean magnitude is `PairFlow.fastest`."""

SAMPLED_FPS = 8
"""Frames a second at which dynamic degree is judged (VBench)."""
THRESHOLD, SIDE = 6.0, 256
"""A pair moves from 6 pixels on in frames whose shorter side has 256 pixels, and in proportion (VBench)."""
MOVING, OF = 4, 16
"""A video moves if 4 pairs do for every 16 frames (VBench)."""


@dataclass(frozen=True)
class PairFlow:
    """The flow from a frame to the next one."""

    flow: Floats32
    """(height, width, 2): pixels of the original frames to the right and downwards. Frames that were enlarged
    have as many more rows and columns."""
    magnitude: float
    """Mean over pixels of the length, in pixels of the original frames."""
    fastest: float
    """The same over the fastest 5% of pixels, as VBench takes it."""
    residual: float
    """Mean absolute difference, over pixels and channels, between the frame and the next one brought back
    along the flow: grey levels that motion does not explain."""


class FlowMeter:
    """Measures flow between frames of one size, in pixels. How many threads there are changes nothing."""

    def __init__(self, height: int, width: int) -> None:
        self.enlarged = enlargement(height, width)
        self._method = cv2.DISOpticalFlow.create(PRESET)
        sides = np.arange(width * self.enlarged), np.arange(height * self.enlarged)
        self._columns, self._rows = np.meshgrid(*(side.astype(np.float32) for side in sides))

    def between(self, frame: Frame, following: Frame) -> PairFlow:
        """The flow from a frame to the following one, both uint8 (height, width, 3)."""
        factor = float(self.enlarged)
        first, second = (cv2.resize(one, None, fx=factor, fy=factor) for one in (frame, following))
        greys = [cv2.cvtColor(large, cv2.COLOR_RGB2GRAY) for large in (first, second)]
        unknown: Any = None  # no flow to start from, which OpenCV's types leave out
        moved = np.asarray(self._method.calc(greys[0], greys[1], unknown), np.float32)
        columns, rows = self._columns + moved[..., 0], self._rows + moved[..., 1]
        back = cv2.remap(second, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        flow = moved / np.float32(self.enlarged)
        lengths = _lengths(flow)
        count = max(1, int(lengths.size * FASTEST))
        largest = np.partition(lengths, -count, axis=None)[-count:]
        return PairFlow(
            flow=flow,
            magnitude=float(lengths.mean(dtype=np.float64)),
            fastest=float(largest.mean(dtype=np.float64)),
            residual=float(cv2.absdiff(back, first).mean()),
        )


def enlargement(height: int, width: int) -> int:
    """The whole number by which frames are enlarged before flow is looked for; 1 for all but tiny frames."""
    return max(1, -(-SHORTEST // min(height, width)))


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


def measure_motion(frames: Iterable[Frame], fps: float) -> Motion:
    """The motion of a video of two frames or more, in one pass; two or three are kept at a time.

    Frames are uint8 (height, width, 3), all of one size.
    """
    interval = max(1, round(fps / SAMPLED_FPS))
    magnitude, change, residual, fastest = list[float](), list[float](), list[float](), list[float]()
    video = iter(frames)
    last = sampled = next(video)
    meter, flow = FlowMeter(*last.shape[:2]), None
    for number, frame in enumerate(video, 1):
        pair = meter.between(last, frame)
        magnitude.append(pair.magnitude)
        residual.append(pair.residual)
        if flow is not None:
            change.append(float(_lengths(pair.flow - flow).mean(dtype=np.float64)))
        if number % interval == 0:
            fastest.append((pair if interval == 1 else meter.between(sampled, frame)).fastest)
            sampled = frame
        last, flow = frame, pair.flow
    dynamic = moves(fastest, min(last.shape[:2]))
    return Motion(np.array(magnitude), np.array(change), np.array(residual), dynamic)


def _lengths(flow: Floats32) -> Floats32:
    return np.hypot(flow[..., 0], flow[..., 1])


def moves(fastest: Sequence[float], side: int) -> bool:
    """VBench's dynamic degree of one video; its score is the share of videos that move.

    A video of n frames moves if at least round(4 * n / 16) pairs are faster than 6 * side / 256 pixels
    (Huang et al., "VBench: comprehensive benchmark suite for video generative models", CVPR 2024, and its
    public code). VBench takes the flow from RAFT; here it is that of DIS.

    Args:
        fastest: `PairFlow.fastest` of each of the n - 1 pairs of frames at 8 frames a second.
        side: pixels of the shorter side.
    """
    count = sum(speed > THRESHOLD * side / SIDE for speed in fastest)
    return count >= max(1, round(MOVING * (len(fastest) + 1) / OF))
