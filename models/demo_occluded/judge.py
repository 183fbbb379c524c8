"""An independent reader of demo-occluded videos: is the digit that comes back the one that went away?

It reads digits with the demo's classifier, and knows nothing of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from forcingkv.models.demo.data import DIRECTIONS
from forcingkv.models.demo.judge import Frames, centre_of, direction_of, halves, read_half
from forcingkv.models.demo_occluded.data import CHUNK, Clip, Mover

Waits = Literal["given", "made"]

FAR = 2.0
"""Pixels by which the ink's centre may be off, on either axis; the nearest other place is 4 away."""


@dataclass(frozen=True)
class Return:
    """What is right of a digit that comes back."""

    digit: bool
    """Its class is read as that of the digit that went away."""
    place: bool
    """It is where the real clip has it, within `FAR` pixels."""
    direction: bool
    """It comes from where it went."""


def given_chunks(clip: Clip, waits: Waits = "given") -> int:
    """Chunks of a clip that a video to be judged begins with.

    `waits` says whether the chunks in which digits are away are among them, so that memory alone is judged,
    or are the model's own but for the first, whose marks say how long the wait is.
    """
    return clip.timeline.returns if waits == "given" else clip.timeline.leaves + 1


def judged_chunk(clip: Clip) -> int:
    """The chunk that is judged: the first in which digits that came back are seen whole."""
    return clip.timeline.returns + 1


def judge_returns(chunk: Frames, clip: Clip) -> tuple[Return, Return]:
    """Judge both halves' digits in frames (CHUNK, HEIGHT, WIDTH) in [-1, 1] of the chunk `judged_chunk`.

    The clip is real and has that chunk. Where a half shows no ink, nothing is right.
    """
    first = judged_chunk(clip) * CHUNK
    real = clip.frames[first : first + CHUNK]
    left, right = (
        _judge(without_bar(seen, mover), without_bar(wanted, mover), mover)
        for seen, wanted, mover in zip(halves(chunk), halves(real), clip.movers, strict=True)
    )
    return left, right


def without_bar(half: Frames, mover: Mover) -> Frames:
    """Frames of a half as they are, but for the bar's rows, which are black."""
    half = half.copy()
    half[:, mover.bar_rows] = -1
    return half


def _judge(seen: Frames, wanted: Frames, mover: Mover) -> Return:
    where, true = _mean_centre(seen), _mean_centre(wanted)
    back = {unit: way for way, unit in DIRECTIONS.items()}
    rows, columns = DIRECTIONS[mover.direction]
    near = where is not None and true is not None and bool(np.abs(where - true).max() <= FAR)
    return Return(read_half(seen) == mover.digit, near, direction_of(seen) == back[-rows, -columns])


def _mean_centre(half: Frames) -> npt.NDArray[np.float64] | None:
    centres = [centre for frame in half if (centre := centre_of(frame)) is not None]
    return np.mean(centres, 0) if centres else None
