"""The metrics by name: their units, and what each says."""

from __future__ import annotations

from dataclasses import dataclass

Values = dict[str, float | None]
"""Metric -> its value for one video; None where it has none."""


@dataclass(frozen=True)
class Metric:
    """What a number of a video is."""

    title: str
    unit: str
    """"" for ratios, "share" for what lies between 0 and 1 and is shown in percent."""
    meaning: str


METRICS = {
    "psnr": Metric("PSNR", "dB", "against the reference; nothing where identical"),
    "ssim": Metric("SSIM", "", "against the reference; 1: identical"),
    "digits_read": Metric("digits read", "share", "as prompted, in chunk 5 (demo model)"),
    "direction_right": Metric("direction right", "share", "as prompted, in chunk 5 (demo model)"),
    "motion": Metric("motion", "px", "mean optical flow of adjacent frames"),
    "dynamic_degree": Metric("dynamic degree", "share", "videos that move, by VBench's rule"),
    "chunk_discontinuity": Metric("chunk discontinuity", "", "published: most moving pairs over all"),
    "seam_motion": Metric("seam motion", "", "flow at chunk boundaries over inside; 1: no seam"),
    "seam_jolt": Metric("seam jolt", "", "change of flow at boundaries over inside; 1: no seam"),
    "seam_residual": Metric("seam residual", "", "unexplained change at boundaries over inside; 1: no seam"),
    "sharpness_drift": Metric("sharpness drift", "log2", "first to last second; -1: halved"),
    "contrast_drift": Metric("contrast drift", "L*", "first to last second"),
    "chroma_drift": Metric("chroma drift", "C*", "first to last second; above 0: stronger colours"),
    "colour_drift": Metric("colour drift", "dE", "between mean colours of first and last second"),
    "colour_drift_most": Metric("colour drift, most", "dE", "from the first second to any other"),
    "histogram_drift": Metric("histogram drift", "L*a*b*", "between colours of first and last second"),
}
"""Those of a video alone and those against a reference; the order is that of tables."""
