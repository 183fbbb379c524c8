"""Where chunks meet, and how much jumps there: the published chunk discontinuity, and measures of seams.

The published one takes the pairs with most motion, wherever they are: a burst of motion raises it, and a seam
that does not move does not. A seam measure compares each boundary with pairs of the two chunks that meet
there, and only with crossings from one latent frame to the next (`ChunkLayout`): a boundary is such a
crossing too, and every crossing shows a step that comes from decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.measure.fidelity.motion import Motion
from forcingkv.runtime.spec import ModelSpec

Floats = npt.NDArray[np.float64]
Ratios = tuple[float | None, ...]
"""For each boundary of a video, what is there over what is at crossings inside the two chunks that meet.
1: the boundary is like them. None: those chunks have no crossings."""

FLOOR_PIXELS = 0.05
"""Added above and below in ratios of motion: a smaller flow of DIS is noise, and nothing may be divided by
zero."""
FLOOR_LEVELS = 0.25
"""The same in ratios of brightness: how far rounding to whole grey levels moves a pixel, on average."""


@dataclass(frozen=True)
class ChunkLayout:
    """Pixel frames of the chunks of a video.

    Pair `i` is frames `i` and `i + 1`. A pair is at a **boundary** if its frames are of two chunks. Inside a
    chunk, a pair is a **crossing** if its frames come from two latent frames: decoders make several frames
    of one latent frame, and the step from one latent frame to the next is larger wherever it lies.

    Raises InputError for numbers that no decoder gives.
    """

    first: int
    """Frames of the first chunk: its first latent frame gives one, the others `stride`."""
    later: int
    """Frames of every later chunk: `stride` for each latent frame."""

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.later or self.later % self.stride:
            raise InputError(
                f"are {self.first} in the first chunk and {self.later} in later ones",
                where="frames a chunk",
                expected="1 + (F - 1) * S and F * S, where each of F latent frames gives S (9 and 12 for"
                " Wan's VAE: F = 3, S = 4)",
            )

    @classmethod
    def of(cls, spec: ModelSpec) -> ChunkLayout:
        """The layout of a model's videos."""
        return cls(spec.frames_of(1), spec.frames_of(2) - spec.frames_of(1))

    @property
    def stride(self) -> int:
        """Pixel frames of a latent frame other than the video's first."""
        return self.later - self.first + 1

    def boundaries(self, frames: int) -> list[int]:
        """Pairs at the boundaries of chunks, of a video of that many frames."""
        return list(range(self.first - 1, frames - 1, self.later))

    def crossings(self, frames: int) -> list[int]:
        """Pairs inside chunks whose frames come from two latent frames."""
        boundaries = set(self.boundaries(frames))
        return [pair for pair in range(0, frames - 1, self.stride) if pair not in boundaries]

    def around(self, boundary: int) -> range:
        """Pairs of the two chunks that meet there, that boundary among them, the others left out."""
        length = self.first if boundary == self.first - 1 else self.later
        return range(boundary - length + 1, boundary + self.later)


def chunk_discontinuity(magnitude: Floats, top: int) -> float | None:
    """The published chunk discontinuity: mean of the `top` largest over the mean of all.

    As in the public code of Forcing-KV (arXiv 2605.09681), which has 7, 39 and 79 for `top` in videos of 5,
    30 and 60 s. `magnitude` is the mean flow of each adjacent pair of frames, `top` of them or more. None for
    a video without any motion.
    """
    mean = float(magnitude.mean())
    return float(np.sort(magnitude)[-top:].mean()) / mean if mean else None


def seams(motion: Motion, layout: ChunkLayout) -> dict[str, Ratios]:
    """For each boundary of a video, how much larger something is there than at crossings inside the chunks.

    Returns:
        `motion`: of the mean flow: everything moves further, or less far, than before and after.
        `jolt`: of the change of flow into and out of the pair: motion that what was before does not lead to,
        also where it cancels motion and so makes the flow itself smaller.
        `residual`: of the difference that the flow leaves: colour, brightness or texture that jumps in place.
    """
    return {
        "motion": seam_ratios(motion.magnitude, layout, FLOOR_PIXELS),
        "jolt": _jolts(motion.change, layout),
        "residual": seam_ratios(motion.residual, layout, FLOOR_LEVELS),
    }


def seam(ratios: Sequence[float | None]) -> float | None:
    """The geometric mean over boundaries; None where there is none that could be compared."""
    known = [ratio for ratio in ratios if ratio is not None]
    return float(np.exp(np.mean(np.log(known)))) if known else None


def seam_ratios(values: Floats, layout: ChunkLayout, floor: float) -> Ratios:
    """(value at the boundary + floor) / (median at crossings of the two chunks + floor), for each boundary.

    Values are of each adjacent pair of frames, 0 or more; the floor is in their unit, above 0.
    """
    frames = len(values) + 1
    at = {boundary: values[boundary] for boundary in layout.boundaries(frames)}
    return _ratios(at, {pair: values[pair] for pair in layout.crossings(frames)}, layout, floor)


def _jolts(change: Floats, layout: ChunkLayout) -> Ratios:
    """The same of the change of flow. Changes that touch a boundary are no part of what it is compared with.

    Change `i` is from pair `i` to `i + 1`, so pair `p` is touched by changes `p - 1` and `p`.
    """
    frames = len(change) + 2
    boundaries = layout.boundaries(frames)
    touched = {i for pair in boundaries for i in (pair - 1, pair)}
    inside = {i for pair in layout.crossings(frames) for i in (pair - 1, pair)} - touched
    at = {pair: change[max(0, pair - 1) : pair + 1].mean() for pair in boundaries if len(change)}
    steps = {i: change[i] for i in inside if 0 <= i < len(change)}
    return _ratios(at, steps, layout, FLOOR_PIXELS)


def _ratios(
    at: Mapping[int, float], inside: Mapping[int, float], layout: ChunkLayout, floor: float
) -> Ratios:
    found: list[float | None] = []
    for boundary, value in at.items():
        around = [inside[pair] for pair in layout.around(boundary) if pair in inside]
        found.append(float((value + floor) / (np.median(around) + floor)) if around else None)
    return tuple(found)
