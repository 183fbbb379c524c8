"""Recency scores and log-ratios of every observation, and where their variance comes from.

From recorded mass, as `docs/method.md`, "Head profile", defines them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from forcingkv.analyze.storage import Ints, Recorded, by_frame, collect
from forcingkv.headmaps.errors import InputError

FEATURES = ("score", "current", "transition")
"""The last axis of `Observations.values`: the recency score, and the log-ratios of the mass on the
current chunk and on the transition frame to that on the history (additive log-ratios)."""

FLOOR = 1e-6
"""Mass below this counts as this much in a ratio."""

SOURCES = ("layer", "head", "sample", "step", "chunk", "head x sample", "head x step", "head x chunk", "rest")
"""What scores may vary with, in the order in which it is shown."""

NOISE = 1e-12
"""Values between 0 and 1 that lie so close are equal."""

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
    key_frame: Ints
    first: Ints
    """The first frame of the current chunk of that row."""
    starts: Ints
    """Where each row begins."""
    shape: tuple[int, ...]
    """(samples, chunks, steps, layers, heads, query frames)."""

    def share(self, mask: npt.NDArray[np.bool_]) -> Array:
        """Mass where the mask holds, mean over query frames: (samples, chunks, steps, layers, heads)."""
        # Sums are numpy's, row by row: polars may add in another order from run to run.
        sums = np.add.reduceat(np.where(mask, self.mass, 0.0), self.starts)
        means: Array = sums.reshape(self.shape).mean(-1)
        return means


@dataclass(frozen=True)
class Divergence:
    """How spread frame-wise attention is within heads and between them; the two sum to 1."""

    intra: float
    """Share of the squared distances from the common mean that lies within heads."""
    inter: float
    """Share that lies between the heads' means."""


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
    steps = len(recording.steps)
    shape = (len(recorded.samples), chunks, steps, spec.layers, spec.heads, spec.frames_per_chunk)
    _check(rows, recorded, int(np.prod(shape[1:])))
    row, key_frame, mass = by_frame(rows)
    first = rows["chunk"].to_numpy().astype(np.int64)[row] * spec.frames_per_chunk
    found = FrameMass(mass, key_frame, first, np.searchsorted(row, np.arange(len(rows))), shape)
    _check_mass(found.share(found.key_frame >= 0), recorded)
    return found


def observe(recorded: Recorded, sink_frames: int) -> Observations:
    """Score each (sample, chunk, step, layer, head) by itself.

    Score = mass on the last frames / (total mass - mass on the first `sink_frames`), the last frames
    being the transition frame and the current chunk. Every aggregate anywhere is a mean of these.
    Raises InputError for so many sink frames that no history is left.
    """
    oldest = (recorded.recording.chunks - 1) * recorded.recording.spec.frames_per_chunk - 1
    if not 0 <= sink_frames < oldest:
        what = f"{sink_frames} frames are left out, which leaves no history to any chunk"
        raise InputError(what, where="sink_frames", expected=f"0 to {oldest - 1}")
    found = frame_mass(recorded)
    kept = found.key_frame >= sink_frames
    current = found.share(found.key_frame >= found.first)
    transition = found.share((found.key_frame == found.first - 1) & kept)
    history = found.share((found.key_frame < found.first - 1) & kept)
    recent = current + transition
    ratios = [np.maximum(part, FLOOR) / np.maximum(history, FLOOR) for part in (current, transition)]
    values = [recent / (recent + history), *(np.log(ratio) for ratio in ratios)]
    chunks = tuple(range(recorded.recording.first_chunk, recorded.recording.chunks))
    return Observations(np.stack(values, -1), recorded.samples, chunks, sink_frames)


def variance_split(observations: Observations) -> dict[str, float]:
    """Share of the variance of scores that each source explains; they sum to 1.

    Analysis of variance of the balanced design samples x chunks x steps x heads, heads nested in
    layers: `layer`, `head` (within its layer), `sample`, `step`, `chunk`, the interactions of a head
    with the last three, and the `rest`. What endangers a fixed label are the interactions: a main
    effect of step or chunk moves all heads alike.
    """
    scores = observations.scores
    samples, chunks, steps, layers, heads = scores.shape
    values = scores.reshape(samples, chunks, steps, layers * heads)
    grand = values.mean()
    total = float(((values - grand) ** 2).sum())
    if total <= values.size * NOISE**2:
        return dict.fromkeys(SOURCES, 0.0) | {"rest": 1.0}
    axes = {"sample": 0, "chunk": 1, "step": 2}
    by_head = values.mean((0, 1, 2)) - grand
    by_layer = by_head.reshape(layers, heads).mean(1)
    size = values.size
    split = {
        "layer": float((by_layer**2).mean()) * size,
        "head": float(((by_head.reshape(layers, heads) - by_layer[:, None]) ** 2).mean()) * size,
    }
    for name, axis in axes.items():
        others = tuple(other for other in (0, 1, 2) if other != axis)
        main = values.mean((*others, 3)) - grand
        together = values.mean(others) - grand - main[:, None] - by_head[None]
        split[name] = float((main**2).mean()) * size
        split[f"head x {name}"] = float((together**2).mean()) * size
    split["rest"] = total - sum(split.values())
    return {name: max(split[name], 0.0) / total for name in SOURCES}


def divergence(recorded: Recorded) -> Divergence:
    """Intra- and inter-head divergence of the frame-wise attention in the last chunk.

    The feature of an observation (sample, step) of a head is its frame-wise attention (query frames x
    key frames), as in the paper (`docs/method.md`, "Head profile"), which gives no formula for its 0.16
    within and 0.83 between; as those sum to 1, shares of the total squared distance are computed here.
    """
    keys = ("layer", "head", "sample", "step", "query_frame")
    last = recorded.recording.chunks - 1
    lazy = recorded.rows.filter(pl.col("chunk") == last)
    rows = collect(lazy.select(*keys, "key_frame", "mass").sort(keys), recorded.place)
    spec = recorded.recording.spec
    heads = spec.layers * spec.heads
    row, key_frame, mass = by_frame(rows)
    # Under policies that prune, heads see different frames: those not seen have no mass.
    features = np.zeros((len(rows), int(key_frame.max()) + 1))
    np.add.at(features, (row, key_frame), mass)
    points = features.reshape(heads, len(recorded.samples) * len(recorded.recording.steps), -1)
    means = points.mean(1)
    within = float(((points - means[:, None]) ** 2).sum(-1).mean())
    between = float(((means - means.mean(0)) ** 2).sum(-1).mean())
    total = within + between
    return Divergence(within / total, between / total) if total > NOISE**2 else Divergence(0.0, 0.0)


def _check(rows: pl.DataFrame, recorded: Recorded, wanted: int) -> None:
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
                expected=f"{wanted}, in chunks from {recorded.recording.first_chunk} on",
            )
    if rows.select(_KEY).is_duplicated().any():
        raise InputError("has a row twice", where=recorded.place, expected="each query frame once")
    spec, recording = recorded.recording.spec, recorded.recording
    ends = {
        "chunk": (recording.first_chunk, recording.chunks),
        "step": (0, len(recording.steps)),
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
