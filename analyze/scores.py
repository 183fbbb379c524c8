"""Recency scores and log-ratios of every observation, from recorded mass (METHOD.md section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from forcingkv.analyze.storage import Recorded, collect
from forcingkv.headmaps.errors import InputError

FEATURES = ("score", "current", "transition")
"""The last axis of `Observations.values`: the recency score, and the log-ratios of the mass on the
current chunk and on the transition frame to that on the history (additive log-ratios)."""

FLOOR = 1e-6
"""Mass below this counts as this much in a ratio."""

_KEY = ("sample", "chunk", "step", "layer", "head", "query_frame")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observations:
    """What was observed of every head, one by one."""

    values: Array
    """(samples, chunks, steps, layers, heads, features), see `FEATURES`."""
    samples: tuple[int, ...]
    chunks: tuple[int, ...]
    """Chunk indices, those that are scored."""
    sink_frames: int
    """Frames left out of the score's denominator."""

    @property
    def scores(self) -> Array:
        """(samples, chunks, steps, layers, heads)."""
        return self.values[..., 0]

    def mean(self) -> Array:
        """(layers, heads, features)."""
        means: Array = self.values.mean((0, 1, 2))
        return means


@dataclass(frozen=True)
class FrameMass:
    """The mass on every key frame of every scored row, flat."""

    mass: Array
    key_frame: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    """The first frame of the current chunk of that row."""
    starts: npt.NDArray[np.int64]
    """Where each row begins."""
    shape: tuple[int, ...]
    """(samples, chunks, steps, layers, heads, query frames)."""

    def share(self, mask: npt.NDArray[np.bool_]) -> Array:
        """Mass where the mask holds, mean over query frames: (samples, chunks, steps, layers, heads)."""
        # Sums are numpy's, row by row: polars may add in another order from run to run.
        sums = np.add.reduceat(np.where(mask, self.mass, 0.0), self.starts)
        means: Array = sums.reshape(self.shape).mean(-1)
        return means


def frame_mass(recorded: Recorded) -> FrameMass:
    """Read the mass of all scored passes.

    Chunks up to the split (`ar_start`) are left out: with little history every head looks recent.
    Raises InputError where a sample is incomplete, counted twice, or holds what is not a number.
    """
    recording = recorded.recording
    spec = recording.spec
    lazy = recorded.rows.filter(pl.col("chunk") >= recording.first_chunk)
    rows = collect(lazy.select(*_KEY, "key_frame", "mass").sort(_KEY), recorded.place)
    chunks = recording.chunks - recording.first_chunk
    steps = len(spec.schedule.timesteps)
    shape = (len(recorded.samples), chunks, steps, spec.layers, spec.heads, spec.frames_per_chunk)
    _check(rows, recorded, int(np.prod(shape[1:])))
    lengths = rows["key_frame"].list.len().to_numpy()
    found = FrameMass(
        mass=rows["mass"].explode().to_numpy().astype(np.float64),
        key_frame=rows["key_frame"].explode().to_numpy().astype(np.int64),
        first=np.repeat(rows["chunk"].to_numpy().astype(np.int64) * spec.frames_per_chunk, lengths),
        starts=np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int64),
        shape=shape,
    )
    _check_mass(found.share(found.key_frame >= 0), recorded)
    return found


def observe(recorded: Recorded, sink_frames: int) -> Observations:
    """Score each (sample, chunk, step, layer, head) by itself.

    Score = mass on the last frames / (total mass - mass on the first `sink_frames`), the last frames
    being the transition frame and the current chunk. Every aggregate anywhere is a mean of these.
    Raises InputError as `frame_mass` does, and for so many sink frames that no history is left.
    """
    oldest = (recorded.recording.chunks - 1) * recorded.recording.spec.frames_per_chunk - 1
    if not 0 <= sink_frames < oldest:
        raise InputError(
            f"{sink_frames} frames are left out, which leaves no history to any chunk",
            where="sink_frames",
            expected=f"0 to {oldest - 1}",
        )
    found = frame_mass(recorded)
    kept = found.key_frame >= sink_frames
    current = found.share(found.key_frame >= found.first)
    transition = found.share((found.key_frame == found.first - 1) & kept)
    history = found.share((found.key_frame < found.first - 1) & kept)
    recent = current + transition
    values = [
        recent / (recent + history),
        np.log(np.maximum(current, FLOOR) / np.maximum(history, FLOOR)),
        np.log(np.maximum(transition, FLOOR) / np.maximum(history, FLOOR)),
    ]
    chunks = tuple(range(recorded.recording.first_chunk, recorded.recording.chunks))
    return Observations(np.stack(values, -1), recorded.samples, chunks, sink_frames)


def _check(rows: pl.DataFrame, recorded: Recorded, wanted: int) -> None:
    """Raise InputError unless every sample is there once and whole."""
    found = dict(rows.group_by("sample").len().iter_rows())
    for sample in sorted({*found, *recorded.samples}):
        if found.get(sample, 0) != wanted or sample not in recorded.samples:
            raise InputError(
                f"sample {sample} has {found.get(sample, 0)} scored rows",
                where=recorded.place,
                expected=f"{wanted}, in chunks from {recorded.recording.first_chunk} on",
            )
    if rows.select(_KEY).is_duplicated().any():
        raise InputError("a row is there twice", where=recorded.place, expected="each query frame once")


def _check_mass(total: Array, recorded: Recorded) -> None:
    """Raise InputError, naming the first head and pass whose mass does not sum to 1."""
    broken = np.argwhere(~(np.abs(total - 1) < 1e-3))
    if len(broken):
        sample, chunk, step, layer, head = (int(index) for index in broken[0])
        value = total[sample, chunk, step, layer, head]
        raise InputError(
            f"the mass of sample {recorded.samples[sample]} sums to {value:.4g} (chunk"
            f" {recorded.recording.first_chunk + chunk}, step {step}, layer {layer}, head {head};"
            f" {len(broken)} such heads and passes)",
            where=recorded.place,
            expected="1",
            hint="Delete the file of that sample, and run the analysis again.",
        )
