"""What an independent reader sees in videos of the demo model: which digits, and which way they move."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forcingkv.measure.fidelity.pairs import grey
from forcingkv.models.demo.data import moves_of
from forcingkv.models.demo.judge import Judge, verdict

READ_CHUNK = 5
"""Chunk index whose digits are read, as in `forcingkv demo`: the caches have been pruned several times."""


def read_digits(
    video: npt.NDArray[np.uint8], prompt: str, frames_per_chunk: int
) -> tuple[float | None, float | None]:
    """Shares of the two digits that are read as prompted, and that move as prompted.

    None for both where the video is too short to have the chunk that is read, and where the prompt is not one
    of two moving digits.

    Args:
        video: uint8 (frames, 32, 48, 3).
        prompt: what it was to show.
        frames_per_chunk: of the demo model.
    """
    if len(video) < (READ_CHUNK + 1) * frames_per_chunk:
        return None, None
    try:
        moves = moves_of(prompt)
    except ValueError:
        return None, None
    seen = verdict(Judge.fit(), grey(video), moves, frames_per_chunk, READ_CHUNK)
    return float(np.mean(seen.digits)), float(np.mean(seen.directions))
