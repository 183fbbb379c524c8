"""What a session gives: chunks of frames, with the time they took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

FramesOn: TypeAlias = Literal["host", "device"]


@dataclass(frozen=True)
class Timing:
    """Seconds a chunk took."""

    denoise: float
    """The denoising passes."""
    clean: float
    """The clean pass, which updates the cache."""
    decode: float
    total: float
    """End to end, from the first pass to frames that can be used. Where decoding overlaps the next chunk
    it is not the sum of the others."""


@dataclass(frozen=True)
class Chunk:
    """Frames that were generated together."""

    index: int
    frames: Any
    """uint8 (frames, height, width, 3): a numpy array of the caller's own; or, of a session opened with
    `frames="device"`, something with `__dlpack__` on the session's memory, which later chunks overwrite:
    use or copy it before asking for the next one."""
    latents: npt.NDArray[np.float32]
    """(1, channels, latent frames, height, width)."""
    timing: Timing
