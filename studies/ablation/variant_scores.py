"""What is measured of each video, and the means of each variant, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from forcingkv.measure.fidelity.evaluation import Estimate, SeededPrompt, differences, estimate
from forcingkv.measure.fidelity.pairs import psnr, squared_error, ssim
from forcingkv.models.demo.data import moves_of
from forcingkv.models.demo.judge import READ_CHUNK, grey, verdict
from studies.ablation.variant_videos import Videos
from studies.ablation.variants import PROFILED, REFERENCE, Variant

Measure = Literal["digits", "directions", "digits_at", "directions_at", "psnr", "ssim"]

MEASURES: dict[Measure, str] = {
    "digits": "share of digits read, all chunks",
    "directions": "share of directions right, all chunks",
    "digits_at": f"share of digits read, chunk {READ_CHUNK}",
    "directions_at": f"share of directions right, chunk {READ_CHUNK}",
    "psnr": "PSNR to full in dB",
    "ssim": "SSIM to full",
}
"""What each measure of a video is."""

Values = list[float | None]


@dataclass(frozen=True)
class VariantScores:
    """The measures of a variant's videos, in the order of the samples."""

    variant: Variant
    kv_bytes: int
    values: Mapping[Measure, Values]


@dataclass(frozen=True)
class VariantRow:
    """A variant, or all draws of one thing together."""

    family: str
    name: str
    draws: int
    """1 for what is not drawn."""
    kv_bytes: int
    means: Mapping[Measure, Estimate]
    to_full: Mapping[Measure, Estimate]
    """The variant minus `full`, paired by sample."""
    to_profiled: Mapping[Measure, Estimate]
    """The variant minus `forcing-kv` with the profiled map, paired by sample."""
    spread: Mapping[Measure, tuple[float, float]]
    """The least and the largest mean of a draw."""


def measure_videos(
    variant: Variant,
    kv_bytes: int,
    videos: Videos,
    references: Videos,
    samples: Sequence[SeededPrompt],
    frames_per_chunk: int,
) -> VariantScores:
    """Measure videos of the demo model: against those of `full`, and by its judge.

    Raises ValueError for prompts that are not of two moving digits.
    """
    values: dict[Measure, Values] = {name: [] for name in MEASURES}
    for video, reference, sample in zip(videos, references, samples, strict=True):
        digits, directions = _read(video, sample.prompt, frames_per_chunk)
        at = min(READ_CHUNK, len(digits) - 1)
        values["digits"].append(float(digits.mean()))
        values["directions"].append(float(directions.mean()))
        values["digits_at"].append(float(digits[at].mean()))
        values["directions_at"].append(float(directions[at].mean()))
        values["psnr"].append(psnr(squared_error(video, reference)))
        values["ssim"].append(float(np.mean([ssim(*pair) for pair in zip(video, reference, strict=True)])))
    return VariantScores(variant, kv_bytes, values)


def rows_of(measured: Sequence[VariantScores], samples: Sequence[SeededPrompt]) -> list[VariantRow]:
    """A row for each variant, in order; draws of one thing are one row."""
    prompts = [sample.prompt for sample in samples]
    by_name: dict[str, list[VariantScores]] = {}
    for one in measured:
        by_name.setdefault(one.variant.name, []).append(one)
    return [_row(draws, by_name[REFERENCE][0], by_name[PROFILED][0], prompts) for draws in by_name.values()]


def frontier(rows: Sequence[VariantRow], measure: Measure) -> list[VariantRow]:
    """The rows that no other beats: none with as few bytes has a higher mean. By bytes, ascending."""
    best: list[VariantRow] = []
    for row in sorted(rows, key=lambda row: (row.kv_bytes, -_quality(row, measure))):
        if not best or _quality(row, measure) > _quality(best[-1], measure):
            best.append(row)
    return best


def _quality(row: VariantRow, measure: Measure) -> float:
    """The mean; what has none is identical to its reference, and beats all."""
    mean = row.means[measure].mean
    return float("inf") if mean is None else mean


def _read(
    video: npt.NDArray[np.uint8], prompt: str, frames_per_chunk: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(chunks, 2): which digits are read, and which directions are right."""
    moves, frames = moves_of(prompt), grey(video)
    chunks = range(len(video) // frames_per_chunk)
    seen = [verdict(frames, moves, frames_per_chunk, chunk) for chunk in chunks]
    return np.array([v.digits for v in seen]), np.array([v.directions for v in seen])


def _row(
    draws: Sequence[VariantScores], full: VariantScores, profiled: VariantScores, prompts: Sequence[str]
) -> VariantRow:
    every = [*prompts] * len(draws)

    def pooled(of: Callable[[VariantScores, Measure], Values]) -> dict[Measure, Estimate]:
        return {m: estimate([value for one in draws for value in of(one, m)], every) for m in MEASURES}

    means = {m: [estimate(one.values[m], prompts).mean for one in draws] for m in MEASURES}
    known = {m: [mean for mean in means[m] if mean is not None] for m in MEASURES}
    return VariantRow(
        family=draws[0].variant.family,
        name=draws[0].variant.name,
        draws=len(draws),
        kv_bytes=round(float(np.mean([one.kv_bytes for one in draws]))),
        means=pooled(lambda one, m: one.values[m]),
        to_full=pooled(lambda one, m: differences(one.values[m], full.values[m])),
        to_profiled=pooled(lambda one, m: differences(one.values[m], profiled.values[m])),
        spread={m: (min(values), max(values)) for m, values in known.items() if values},
    )
