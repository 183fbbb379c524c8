"""Drift: how the look of a video changes from its first second to its last.

Autoregressive models feed on their own output, so small errors of colour and sharpness add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

OFFSETS = (0, 128, 128)
BINS = 256
"""One bin a unit: L* is 0 to 100, a* and b* of sRGB colours -108 to 99."""
FLOOR_SHARPNESS = 1.0
"""Grey levels squared, added to both sharpnesses before they are divided: frames without any edge."""


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


@dataclass(frozen=True)
class Drift:
    """From the first second of a video to its last."""

    sharpness: float
    """log2(last / first) of the mean sharpness: -1 where it halved."""
    contrast: float
    """Last - first, in units of L*."""
    chroma: float
    """Last - first, in units of a* and b*: above 0 where colours became stronger."""
    colour: float
    """Distance of the mean colours (CIE76 delta E)."""
    colour_most: float
    """The largest distance of the mean colour of any second from that of the first."""
    histogram: float
    """Mean over L*, a*, b* of the distance of the histograms (`histogram_distance`)."""


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


def drift(looks: list[Look], fps: float) -> Drift:
    """The drift of a video from the looks of its frames. Of a video under two seconds: of its halves.

    Raises ValueError for fewer than two frames.
    """
    if len(looks) < 2:
        raise ValueError(f"{len(looks)} frames")
    window = min(max(1, round(fps)), len(looks) // 2)
    first, last = looks[:window], looks[-window:]

    def change(name: str) -> float:
        start, end = (float(np.mean([getattr(look, name) for look in part])) for part in (first, last))
        return end - start

    sharpness = [np.mean([look.sharpness for look in part]) + FLOOR_SHARPNESS for part in (first, last)]
    colours = _running_mean(np.array([look.colour for look in looks]), window)
    apart = np.linalg.norm(colours - colours[0], axis=1)
    histograms = [np.mean([look.histogram for look in part], axis=0) for part in (first, last)]
    return Drift(
        sharpness=float(np.log2(sharpness[1] / sharpness[0])),
        contrast=change("contrast"),
        chroma=change("chroma"),
        colour=float(apart[-1]),
        colour_most=float(apart.max()),
        histogram=float(np.mean([histogram_distance(*pair) for pair in zip(*histograms, strict=True)])),
    )


def histogram_distance(shares: Floats, others: Floats) -> float:
    """Wasserstein distance (earth mover's) of two histograms (bins,), in bins: how far colours must move.

    Unlike the distance of means it also sees colours that spread or gather around the same mean.
    """
    return float(np.abs(np.cumsum(shares - others)).sum())


def _lab(frame: Frame) -> npt.NDArray[np.float32]:
    """(height, width, 3) L*, a*, b*, rounded to 0.001: then grey has no colour.

    OpenCV's conversion from sRGB itself interpolates in a table, which gives grey up to 0.1 of colour.
    """
    lab = cv2.cvtColor(_LINEAR[frame], cv2.COLOR_LRGB2Lab)
    return np.asarray(np.round(lab, 3), np.float32)


def _linear() -> npt.NDArray[np.float32]:
    """Linear light, 0 to 1, of the 256 levels of sRGB (IEC 61966-2-1)."""
    levels = np.arange(256) / 255
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4).astype(np.float32)


_LINEAR = _linear()


def _running_mean(values: Floats, window: int) -> Floats:
    """(n - window + 1, ...) means of each window of values (n, ...)."""
    windows = np.lib.stride_tricks.sliding_window_view(values, window, axis=0)
    means: Floats = windows.mean(-1)
    return means
