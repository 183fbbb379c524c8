"""Recency scores from recorded mass (METHOD.md section 2)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from forcingkv.headmaps.errors import InputError

__all__ = ["RECENT_FRAMES", "mean_scores", "read_statistics", "recency_scores"]

RECENT_FRAMES = 4
"""One transition frame and the three frames of the current chunk."""


def read_statistics(folder: Path) -> pl.LazyFrame:
    """A lazy scan of every sample in `folder`. Raises InputError where there is none."""
    if not any(folder.glob("sample-*.parquet")):
        raise InputError(
            "holds no statistics",
            where=str(folder),
            expected="files sample-NNNN.parquet",
            mend="Record them with: forcingkv analyze heads",
        )
    return pl.scan_parquet(folder / "sample-*.parquet")


def recency_scores(statistics: pl.LazyFrame, sink_frames: int, first_chunk: int) -> pl.DataFrame:
    """One score for each (sample, chunk, step, layer, head), as the column `score`.

    Score = mass on the last `RECENT_FRAMES` key frames / (total mass - mass on the first
    `sink_frames`). Chunks before `first_chunk` are left out: with little history every head looks
    recent. Raises InputError where a score is not a number.
    """
    newest = pl.col("key_frame").max().over("chunk")
    recent = pl.col("mass").filter(pl.col("key_frame") > pl.col("newest") - RECENT_FRAMES)
    beyond_sink = pl.col("mass").filter(pl.col("key_frame") >= sink_frames)
    scores = (
        statistics.filter(pl.col("chunk") >= first_chunk)
        .with_columns(newest=newest)
        .group_by("sample", "chunk", "step", "layer", "head")
        .agg(score=recent.sum() / beyond_sink.sum())
        .sort("sample", "chunk", "step", "layer", "head")
        .collect()
    )
    broken = scores.filter(~pl.col("score").is_finite())
    if len(scores) == 0 or len(broken):
        raise InputError(
            f"{len(broken)} of {len(scores)} recency scores are not numbers",
            where="statistics",
            expected=f"finite mass in chunks from {first_chunk} on",
            mend="Check the checkpoint for NaN weights, or record more chunks.",
        )
    return scores


def mean_scores(scores: pl.DataFrame) -> npt.NDArray[np.float64]:
    """Mean score of each head: (layers, heads)."""
    means = scores.group_by("layer", "head").agg(pl.col("score").mean()).sort("layer", "head")
    layers = means["layer"].n_unique()
    return means["score"].to_numpy().reshape(layers, -1)
