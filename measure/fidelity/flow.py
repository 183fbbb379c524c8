"""Dense optical flow between two frames, and what the flow leaves unexplained.

DIS (Kroeger et al., "Fast optical flow using dense inverse search", ECCV 2016) as OpenCV has it: it needs no
weights and runs on a CPU. VBench uses RAFT, a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

PRESET = cv2.DISOPTICAL_FLOW_PRESET_MEDIUM
SHORTEST = 128
"""Pixels of the shorter side from which frames are taken as they are: DIS looks for motion from coarse to
fine, in patches of 8 pixels, and has no coarse scale in frames of a few patches."""
FASTEST = 0.05
"""Share of pixels whose mean magnitude is `PairFlow.fastest`."""


@dataclass(frozen=True)
class PairFlow:
    """The flow from a frame to the next one."""

    flow: Floats
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
    """Measures flow between frames of one size. The result does not depend on the number of threads.

    Args:
        height: pixels of the frames.
        width: pixels of the frames.
    """

    def __init__(self, height: int, width: int) -> None:
        self.enlarged = enlargement(height, width)
        self._method = cv2.DISOpticalFlow.create(PRESET)
        sides = np.arange(width * self.enlarged), np.arange(height * self.enlarged)
        self._columns, self._rows = np.meshgrid(*(side.astype(np.float32) for side in sides))

    def between(self, frame: Frame, following: Frame) -> PairFlow:
        """The flow from a frame to the following one, both uint8 (height, width, 3)."""
        first, second = self._large(frame), self._large(following)
        greys = [cv2.cvtColor(large, cv2.COLOR_RGB2GRAY) for large in (first, second)]
        unknown: Any = None  # no flow to start from, which OpenCV's types leave out
        moved = np.asarray(self._method.calc(greys[0], greys[1], unknown), np.float32)
        columns, rows = self._columns + moved[..., 0], self._rows + moved[..., 1]
        back = cv2.remap(second, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        flow = moved / np.float32(self.enlarged)
        lengths = np.hypot(flow[..., 0], flow[..., 1])
        return PairFlow(
            flow=flow,
            magnitude=float(lengths.mean(dtype=np.float64)),
            fastest=_mean_of_largest(lengths),
            residual=float(cv2.absdiff(back, first).mean()),
        )

    def _large(self, frame: Frame) -> Frame:
        if self.enlarged == 1:
            return np.ascontiguousarray(frame)
        factor = float(self.enlarged)
        large = cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
        return np.asarray(large, np.uint8)


def enlargement(height: int, width: int) -> int:
    """The whole number by which frames are enlarged before flow is looked for; 1 for all but tiny frames."""
    return max(1, -(-SHORTEST // min(height, width)))


def _mean_of_largest(lengths: Floats) -> float:
    count = max(1, int(lengths.size * FASTEST))
    return float(np.partition(lengths, -count, axis=None)[-count:].mean(dtype=np.float64))
