"""What an independent reader sees in videos of the demo model: which digits, and which way they move."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forcingkv.models.demo.data import HEIGHT, WIDTH, Moves, moves_of
from forcingkv.models.demo.judge import Judge, Verdict, verdict
from forcingkv.runtime.spec import ModelSpec

READ_CHUNK = 5
"""Index of the chunk whose digits are read: by then the caches have been pruned several times."""


def shows_digits(spec: ModelSpec) -> bool:
    """Whether videos of a model look like the clips that the reader was trained on: grey, of their size."""
    size = spec.width, spec.height, spec.latent_channels
    return spec.decoder.kind == "pixels" and size == (WIDTH, HEIGHT, 1)


def grey(video: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """The first channel of grey frames (frames, height, width, 3) as (frames, height, width) in [-1, 1]."""
    return video[..., 0] / 127.5 - 1


def read_chunk(video: npt.NDArray[np.uint8], moves: Moves, frames_per_chunk: int, chunk: int) -> Verdict:
    """What is seen in one chunk of a video, uint8 (frames, 32, 48, 3), that was to show those moves."""
    return verdict(Judge.fit(), grey(video), moves, frames_per_chunk, chunk)


def read_digits(
    video: npt.NDArray[np.uint8], prompt: str, frames_per_chunk: int
) -> tuple[float | None, float | None]:
    """Shares of the two digits that are read as prompted, and that move as prompted, in `READ_CHUNK`.

    None for both where the video is too short to have that chunk, and where the prompt is not one of two
    moving digits.

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
    seen = read_chunk(video, moves, frames_per_chunk, READ_CHUNK)
    return float(np.mean(seen.digits)), float(np.mean(seen.directions))
