"""A video against a reference of the same prompt and seed, frame by frame: PSNR and SSIM.

Both say how far a video went from its reference, not which of the two is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from forcingkv.headmaps.errors import InputError

Frames = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

PEAK = 255.0
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601), as Wang et al. use."""
SIGMA = 1.5
RADIUS = 5
WINDOW = 2 * RADIUS + 1
"""Side of the Gaussian window of SSIM, in pixels: no frame may be smaller."""
K1, K2 = 0.01, 0.03


def luma(frame: Frames) -> Floats:
    """Brightness (..., height, width) in grey levels, 0 to 255, of uint8 (..., height, width, 3)."""
    weighted: Floats = frame.astype(np.float64) @ np.array(LUMA)
    return weighted


def squared_error(frame: Frames, other: Frames) -> float:
    """Mean squared difference over pixels and channels of uint8 arrays of one shape, in levels squared."""
    return float(np.mean((frame.astype(np.float64) - other) ** 2))


def psnr(error: float) -> float | None:
    """Peak signal-to-noise ratio in dB of a mean squared error, peak 255; None where nothing differs."""
    return 10 * float(np.log10(PEAK**2 / error)) if error else None


def mean_psnr(videos: Sequence[Frames], references: Sequence[Frames]) -> float | None:
    """Mean over videos of the PSNR of each in dB; None where all are identical to their references.

    Videos that are identical are left out: their PSNR is infinite. The PSNR of a video is that of its
    squared error over all frames.
    """
    values = [psnr(squared_error(*pair)) for pair in zip(videos, references, strict=True)]
    finite = [value for value in values if value is not None]
    return float(np.mean(finite)) if finite else None


def ssim(frame: Frames, other: Frames) -> float:
    """Structural similarity of two frames of one size, uint8 (height, width, 3): 1 where they are identical.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", IEEE Trans. Image Processing 13(4), 2004: on luma, Gaussian window of 11x11 pixels with a
    standard deviation of 1.5, K1 = 0.01, K2 = 0.03, mean over all places where the window lies inside.
    (Their own program first shrinks frames so that the shorter side has about 256 pixels; this does not.)

    Raises InputError for frames smaller than the window.
    """
    if min(frame.shape[:2]) < WINDOW:
        height, width = frame.shape[:2]
        raise InputError(
            f"are {width}x{height}", where="frames", expected=f"{WINDOW}x{WINDOW} pixels or more for SSIM"
        )
    a, b = luma(frame), luma(other)
    mean_a, mean_b = _windowed(a), _windowed(b)
    variance_a = _windowed(a * a) - mean_a**2
    variance_b = _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similar /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float(similar.mean())


def _windowed(values: Floats) -> Floats:
    """The weighted mean in each window that lies inside."""
    blurred: Floats = gaussian_filter(values, SIGMA, radius=RADIUS)
    return blurred[RADIUS:-RADIUS, RADIUS:-RADIUS]
