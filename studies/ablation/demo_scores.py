"""What is measured of each video of the demo model: by its judge, and against the video of `full`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from forcingkv.measure.fidelity.pairs import psnr, squared_error, ssim
from forcingkv.models.demo.data import moves_of
from forcingkv.models.demo.judge import READ_CHUNK, grey, verdict
from studies.ablation.variant_scores import Cost, Measure, Values, VariantScores
from studies.ablation.variant_videos import Sample, Video
from studies.ablation.variants import Variant

MEASURES: dict[Measure, str] = {
    "digits": "share of digits read, all chunks",
    "directions": "share of directions right, all chunks",
    "digits_at": f"share of digits read, chunk {READ_CHUNK}",
    "directions_at": f"share of directions right, chunk {READ_CHUNK}",
    "psnr": "PSNR to full in dB",
    "ssim": "SSIM to full",
}
"""What each measure of a video is."""


def measure_videos(
    variant: Variant,
    cost: Cost,
    videos: Sequence[Video],
    references: Sequence[Video],
    samples: Sequence[Sample],
    frames_per_chunk: int,
) -> VariantScores:
    """Measure videos of the demo model: against those of `full`, and by its judge.

    Raises ValueError for prompts that are not of two moving digits.
    """
    values: dict[Measure, Values] = {name: [] for name in MEASURES}
    for video, reference, sample in zip(videos, references, samples, strict=True):
        digits, directions = read_chunks(video, sample.prompt, frames_per_chunk)
        at = min(READ_CHUNK, len(digits) - 1)
        values["digits"].append(float(digits.mean()))
        values["directions"].append(float(directions.mean()))
        values["digits_at"].append(float(digits[at].mean()))
        values["directions_at"].append(float(directions[at].mean()))
        values["psnr"].append(psnr(squared_error(video, reference)))
        values["ssim"].append(float(np.mean([ssim(*pair) for pair in zip(video, reference, strict=True)])))
    return VariantScores(variant, cost, values)


def read_chunks(
    video: npt.NDArray[np.uint8], prompt: str, frames_per_chunk: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(chunks, 2): which digits are read, and which directions are right."""
    moves, frames = moves_of(prompt), grey(video)
    chunks = range(len(video) // frames_per_chunk)
    seen = [verdict(frames, moves, frames_per_chunk, chunk) for chunk in chunks]
    return np.array([v.digits for v in seen]), np.array([v.directions for v in seen])
