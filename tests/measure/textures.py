"""Videos whose motion is known: a soft random texture that moves evenly."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

Frames = np.ndarray[Any, np.dtype[np.uint8]]


def texture(height: int, width: int, seed: int = 0) -> Frames:
    """uint8 (height, width, 3), grey levels over most of the range."""
    noise = gaussian_filter(np.random.default_rng(seed).random((height, width)), 2)
    levels = 20 + 200 * (noise - noise.min()) / np.ptp(noise)
    return np.repeat(levels[..., None], 3, 2).astype(np.uint8)


def moving(
    frames: int, step: tuple[int, int] = (0, 1), height: int = 64, width: int = 96, seed: int = 0
) -> Frames:
    """A video whose every pixel moves by `step` (rows, columns) each frame: down and right above 0."""
    margins = [abs(pixels) * frames for pixels in step]
    canvas = texture(height + 2 * margins[0], width + 2 * margins[1], seed)
    places = [(margins[0] - step[0] * i, margins[1] - step[1] * i) for i in range(frames)]
    return np.stack([canvas[row : row + height, column : column + width] for row, column in places])
