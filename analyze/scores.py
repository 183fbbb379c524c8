"""Recency scores and log-ratios of every observation.

From recorded mass, as `docs/method.md`, "Head profile", defines them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from forcingkv.analyze.recording import Recording, told_step
from forcingkv.analyze.scoring import Scored, Scoring, told_numbers
from forcingkv.analyze.storage import Ints, Recorded, by_frame, collect
from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.schedule import CLEAN_PASS

FEATURES = ("score", "current", "transition")
"""The last axis of `Observations.values`: the recency score, and the log-ratios of the mass on the
current chunk and on the transition frame to that on the history (additive log-ratios). Where more frames than
one before the chunk count as recent, they are to the ratios what the transition frame is."""

FLOOR = 1e-6
"""Mass below this counts as this much in a ratio."""

_KEY = ("sample", "chunk", "step", "layer", "head", "query_frame")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observations:
    """What was observed of every head, one by one."""

    values: Array
    """(samples, passes, layers, heads, features), see `FEATURES`. All passes of all chunks are one axis,
    since chunks may have different numbers of them: every mean is one over passes that there are."""
    samples: tuple[int, ...]
    scored: Scored
    """The passes, in the order of the axis, and the frames that a score counts and leaves out."""

    @property
    def scores(self) -> Array:
        """(samples, passes, layers, heads)."""
        return self.values[..., 0]

    def mean(self) -> Array:
        """(layers, heads, features)."""
        means: Array = self.values.mean((0, 1))
        return means

    def parts(self, name: str) -> dict[float, Array]:
        """The features of each step, chunk or clean pass by itself: (samples, layers, heads, features) each.

        `name` is one of `Scored.parts`, and the keys are those that it has there.
        """
        return {value: self.values[:, places].mean(1) for value, places in self.scored.parts[name].items()}


@dataclass(frozen=True)
class FrameMass:
    """The mass on every key frame of every scored row, flat."""

    mass: Array
    key_frame: Ints
    first: Ints
    """The first frame of the current chunk of that row."""
    starts: Ints
    """Where each row begins."""
    shape: tuple[int, ...]
    """(samples, passes, layers, heads, query frames)."""

    def share(self, mask: npt.NDArray[np.bool_]) -> Array:
        """Mass where the mask holds, mean over query frames: (samples, passes, layers, heads)."""
        # Sums are numpy's, row by row: polars may add in another order from run to run.
        sums = np.add.reduceat(np.where(mask, self.mass, 0.0), self.starts)
        means: Array = sums.reshape(self.shape).mean(-1)
        return means


def frame_mass(recorded: Recorded, scored: Scored) -> FrameMass:
    """Read the mass of all scored passes.

    Raises InputError where a sample is incomplete, counted twice, or holds what is not a number.
    """
    spec = recorded.recording.spec
    lazy = recorded.rows.filter(_of_interest(recorded.recording, scored)).select(*_KEY, "key_frame", "mass")
    clean = pl.col("step") == CLEAN_PASS  # it comes after the denoising passes
    rows = collect(lazy.sort("sample", "chunk", clean, *_KEY[2:]), recorded.place)
    shape = (len(recorded.samples), len(scored.passes), spec.layers, spec.heads, spec.frames_per_chunk)
    _check(rows, recorded, scored, int(np.prod(shape[1:])))
    row, key_frame, mass = by_frame(rows)
    first = rows["chunk"].to_numpy().astype(np.int64)[row] * spec.frames_per_chunk
    found = FrameMass(mass, key_frame, first, np.searchsorted(row, np.arange(len(rows))), shape)
    _check_mass(found.share(found.key_frame >= 0), recorded, scored)
    return found


def _of_interest(recording: Recording, scored: Scored) -> pl.Expr:
    """Rows of what is scored, and of what cannot be: the other passes of its chunks were recorded too."""
    known = range(recording.chunks)
    wanted = pl.col("chunk").is_in(scored.chunks) | ~pl.col("chunk").is_between(known[0], known[-1])
    # A column may have lost its values, which is to be found.
    unknown = pl.col("chunk").is_null() | pl.col("step").is_null()
    if recording.recorded == scored.kind:
        return wanted | unknown
    clean = pl.col("step") == CLEAN_PASS
    return (wanted & (clean if scored.kind == "clean" else ~clean)) | unknown


def observe(recorded: Recorded, scoring: Scoring) -> Observations:
    """Score each (sample, pass, layer, head) by itself.

    Score = mass on the newest frames / (total mass - mass on the first `sink_frames`), the newest frames
    being, if nothing else is asked for, the transition frame and the current chunk. Every aggregate anywhere
    is a mean of these. Raises InputError as `Scoring.of` does, and where no head attends to any history.
    """
    recording = recorded.recording
    scored = scoring.of(recording.spec, recording.chunks, recording.recorded)
    found = frame_mass(recorded, scored)
    kept = found.key_frame >= scored.sink_frames
    recent_from = found.first + recording.spec.frames_per_chunk - scored.recent_frames
    old = (found.key_frame < recent_from) & kept
    if not old.any():
        raise InputError(
            f"under the policy {recording.policy} no head has a key frame between the first"
            f" {scored.sink_frames} and the newest {scored.recent_frames}, in the chunks"
            f" {told_numbers(scored.chunks)}",
            where=recorded.place,
            expected="history, without which every score is 1",
        )
    current = found.share(found.key_frame >= found.first)
    transition = found.share((found.key_frame < found.first) & (found.key_frame >= recent_from) & kept)
    history = found.share(old)
    recent = current + transition
    ratios = [np.maximum(part, FLOOR) / np.maximum(history, FLOOR) for part in (current, transition)]
    values = [recent / (recent + history), *(np.log(ratio) for ratio in ratios)]
    return Observations(np.stack(values, -1), recorded.samples, scored)


def _check(rows: pl.DataFrame, recorded: Recorded, scored: Scored, wanted: int) -> None:
    """Raise InputError unless every sample is there once and whole, and each row says what it is of."""
    empty = [name for name in rows.columns if rows[name].null_count()]
    empty += [name for name in ("key_frame", "mass") if rows[name].explode().null_count()]
    if empty:
        raise InputError(f"has rows without a {empty[0]}", where=recorded.place, expected="a value in each")
    found = dict(rows.group_by("sample").len().iter_rows())
    for sample in sorted({*found, *recorded.samples}):
        if found.get(sample, 0) != wanted or sample not in recorded.samples:
            raise InputError(
                f"sample {sample} has {found.get(sample, 0)} scored rows",
                where=recorded.place,
                expected=f"{wanted}, in the chunks {told_numbers(scored.chunks)}",
            )
    if rows.select(_KEY).is_duplicated().any():
        raise InputError("has a row twice", where=recorded.place, expected="each query frame once")
    spec, recording = recorded.recording.spec, recorded.recording
    _check_passes(rows, recorded, scored)
    ends = {
        "layer": (0, spec.layers),
        "head": (0, spec.heads),
        "query_frame": (0, spec.frames_per_chunk),
    }
    frames = recording.chunks * spec.frames_per_chunk
    for name, (first, end) in {**ends, "key_frame": (0, frames)}.items():
        values = rows[name].explode() if name == "key_frame" else rows[name]
        least, most = values.min(), values.max()
        if len(values) and not first <= least <= most < end:  # type: ignore[operator]
            what = f"has a row of the {name} {(least if least < first else most)!s}"  # type: ignore[operator]
            raise InputError(what, where=recorded.place, expected=f"{first} to {end - 1}")
    if not (rows["key_frame"].list.len() == rows["mass"].list.len()).all():
        raise InputError("has a row with more frames than masses", where=recorded.place, expected="one each")


def _check_passes(rows: pl.DataFrame, recorded: Recorded, scored: Scored) -> None:
    """Raise InputError for a row of a chunk or step that is not there."""
    steps: dict[int, list[int]] = {}
    for made in scored.passes:
        steps.setdefault(made.chunk, []).append(made.step)
    for chunk, step in rows.select("chunk", "step").unique().sort("chunk", "step").iter_rows():
        if chunk not in steps:
            what, expected = f"chunk {chunk}", told_numbers(scored.chunks)
        elif step not in steps[chunk]:
            what, expected = f"step {step}", told_numbers(sorted(steps[chunk]))
        else:
            continue
        raise InputError(f"has a row of the {what}", where=recorded.place, expected=expected)


def _check_mass(total: Array, recorded: Recorded, scored: Scored) -> None:
    """Raise InputError, naming the first head and pass whose mass does not sum to 1."""
    broken = np.argwhere(~(np.abs(total - 1) < 1e-3))
    if len(broken):
        sample, place, layer, head = (int(index) for index in broken[0])
        value, made = total[sample, place, layer, head], scored.passes[place]
        raise InputError(
            f"the mass of sample {recorded.samples[sample]} sums to {value:.4g} (chunk {made.chunk},"
            f" {told_step(made.step)}, layer {layer}, head {head}; {len(broken)} such heads and passes)",
            where=recorded.place,
            expected="1",
            hint="Delete the file of that sample, and run the analysis again.",
        )
