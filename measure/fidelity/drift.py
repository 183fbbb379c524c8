"""Drift: how the look of a video changes from its first second to its last.

Autoregressive models feed on their own output, so small errors of colour and sharpness add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

Frame = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

OFFSETS = (0, 128, 128)
BINS = 256
"""One bin a unit: L* is 0 to 100, a* and b* of sRGB colours -108 to 99."""
FLOOR_SHARPNESS = 1.0
"""Grey levels squared, added to both sharpnesses before they are divided: frames without any edge."""
_LEVELS = np.arange(256) / 255
LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4).astype(np.float32)
"""Linear light, 0 to 1, of the 256 levels of sRGB (IEC 61966-2-1)."""


@dataclass(frozen=True)
class Look:
    """How a frame looks. Colours are CIELAB (D65); distances of about 2 are the least that eyes see."""

    sharpness: float
    """Variance of the Laplacian of brightness, in grey levels squared."""
    contrast: float
    """Standard deviation of L*."""
    chroma: float
    """Mean of the distance of pixels' colours from grey."""
    colour: Floats
    """(3,) mean L*, a*, b*."""
    histogram: Floats
    """(3, 256) shares of pixels by L*, a*, b* (rounded)."""


def look_of(frame: Frame) -> Look:
    """The look of a frame, uint8 (height, width, 3) in sRGB."""
    lab = _lab(frame)
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    histogram = [
        np.bincount(np.rint(lab[..., channel]).astype(np.int64).ravel() + offset, minlength=BINS)
        for channel, offset in enumerate(OFFSETS)
    ]
    return Look(
        sharpness=float(cv2.Laplacian(grey, cv2.CV_64F, ksize=1).var()),
        contrast=float(lab[..., 0].std(dtype=np.float64)),
        chroma=float(np.hypot(lab[..., 1], lab[..., 2]).mean(dtype=np.float64)),
        colour=lab.mean((0, 1), dtype=np.float64),
        histogram=np.array(histogram) / lab[..., 0].size,
    )


def drift(looks: Sequence[Look], fps: float) -> dict[str, float]:
    """The drift of a video from the looks of its frames: from its first second to its last.

    Of a video under two seconds from its first half to its last. There are two frames or more.

    Returns:
        By metric. `sharpness_drift`: log2(last / first) of the mean sharpness, -1 where it halved.
        `contrast_drift`: last - first, in units of L*. `chroma_drift`: last - first, in units of a* and b*,
        above 0 where colours became stronger. `colour_drift`: distance of the mean colours (CIE76 delta E).
        `colour_drift_most`: the largest distance of the mean colour of any second from that of the first.
        `histogram_drift`: mean over L*, a*, b* of the distance of the histograms (`histogram_distance`).
    """
    window = min(max(1, round(fps)), len(looks) // 2)

    def ends(name: str) -> Any:
        """The means of the first and of the last window."""
        parts = looks[:window], looks[-window:]
        return [np.mean([getattr(look, name) for look in part], axis=0) for part in parts]

    sharpness, last_sharpness = ends("sharpness")
    colours = sliding_window_view(np.array([look.colour for look in looks]), window, axis=0).mean(-1)
    apart = np.linalg.norm(colours - colours[0], axis=1)
    histograms = [histogram_distance(*pair) for pair in zip(*ends("histogram"), strict=True)]
    return {
        "sharpness_drift": float(np.log2((last_sharpness + FLOOR_SHARPNESS) / (sharpness + FLOOR_SHARPNESS))),
        "contrast_drift": float(np.diff(ends("contrast"))[0]),
        "chroma_drift": float(np.diff(ends("chroma"))[0]),
        "colour_drift": float(apart[-1]),
        "colour_drift_most": float(apart.max()),
        "histogram_drift": float(np.mean(histograms)),
    }


def histogram_distance(shares: Floats, others: Floats) -> float:
    """Wasserstein distance (earth mover's) of two histograms (bins,), in bins: how far colours must move.

    Unlike the distance of means it also sees colours that spread or gather around the same mean.
    """
    return float(np.abs(np.cumsum(shares - others)).sum())


def _lab(frame: Frame) -> npt.NDArray[np.float32]:
    """(height, width, 3) L*, a*, b*, rounded to 0.001: then grey has no colour.

    OpenCV's conversion from sRGB itself interpolates in a table, which gives grey up to 0.1 of colour.
    """
    lab = cv2.cvtColor(LINEAR[frame], cv2.COLOR_LRGB2Lab)
    return np.asarray(np.round(lab, 3), np.float32)
