"""Video to video: each chunk is drawn from the latents of given frames, noised, and not from noise alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.frame_encoder import Encoder
from forcingkv.runtime.positions import Floats
from forcingkv.runtime.schedule import Schedule
from forcingkv.runtime.spec import ModelSpec

_CLOSE = 1e-6
"""By which a level may be above the strength that was asked for: both are rounded."""


class Source:
    """Frames that a video is drawn from, chunk by chunk, as they come.

    Attributes:
        strength: the noise level, at most, that chunks begin with.
        left_out: frames at the end that make no whole chunk; known when the source has ended.
    """

    def __init__(
        self, frames: Iterable[npt.NDArray[np.uint8]], strength: float, spec: ModelSpec, encoder: Encoder
    ) -> None:
        """`frames` are uint8 (height, width, 3) of the model's size. Raises InputError for a strength that
        leaves chunks no pass."""
        check_strength(spec.schedule, strength)
        self.strength, self.left_out = strength, 0
        self._frames: Iterator[npt.NDArray[np.uint8]] = iter(frames)
        self._spec, self._encoder, self._next = spec, encoder, 0
        encoder.restart()
        self._begun = encoder.begun

    def latents(self, index: int) -> Floats | None:
        """Those of a chunk, which are asked for in order: (1, channels, frames, height, width). None: its
        frames are not all there. Raises RuntimeError where other frames were encoded meanwhile."""
        if self._encoder.begun != self._begun:
            raise RuntimeError("other frames were encoded while this video was drawn from its source")
        assert index == self._next, "a source is read once, chunk by chunk"
        wanted = self._spec.frames_of(index + 1) - self._spec.frames_of(index)
        frames = list(islice(self._frames, wanted))
        if len(frames) < wanted and not index:
            raise InputError(
                f"has {len(frames)} frames",
                where="source",
                expected=f"{wanted} or more, those of the first chunk of {self._spec.name}",
            )
        if len(frames) < wanted:
            self.left_out = len(frames)
            return None
        self._next += 1
        return self._encoder.encode(np.stack(frames))


def first_pass(sigmas: Sequence[float], strength: float) -> int | None:
    """The first of the passes at those levels that a source of that strength goes through; None: no one."""
    return next((step for step, sigma in enumerate(sigmas) if sigma <= strength + _CLOSE), None)


def check_strength(schedule: Schedule, strength: float) -> None:
    """Raise InputError unless every chunk has a pass at a level of at most `strength`."""
    if not 0 < strength <= 1:
        raise InputError(f"is {strength:g}", where="strength", expected="a number above 0, at most 1")
    least = max(min(kind.sigmas[:-1]) for kind in schedule.kinds)
    if least > strength + _CLOSE:
        raise InputError(
            f"is {strength:g}, and of some chunk no pass begins at so little noise",
            where="strength",
            expected=f"{least:.4g} to 1",
            hint="A model of one pass draws everything anew: take one with more, such as self-forcing.",
        )


def described(schedule: Schedule, strength: float) -> str:
    """What chunks go through at a strength, for people."""
    kinds = []
    for kind in schedule.kinds:
        first = first_pass(kind.sigmas[:-1], strength)
        assert first is not None
        kinds.append(f"{len(kind) - first} of {len(kind)} passes, from the level {kind.sigmas[first]:.4g} on")
    return "; ".join(dict.fromkeys(kinds))
