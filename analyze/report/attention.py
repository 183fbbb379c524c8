"""Which heads are worth a look, and pictures of their frame-wise attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.figure import Figure

from forcingkv.analyze.analysis import Analysis
from forcingkv.analyze.report.page import Picture, Theme, drawn
from forcingkv.analyze.report.pictures import WIDTH
from forcingkv.analyze.stability import Stability
from forcingkv.analyze.storage import Recorded, collect
from forcingkv.runtime.spec import ModelSpec

NUMBERED = 12
"""Key frames up to which each is numbered; of more, the first of each chunk."""

Array = npt.NDArray[np.float64]
Head = tuple[int, int]
Pass = tuple[int, int]
"""(chunk, step)."""


@dataclass(frozen=True)
class Example:
    """A head that stands for a kind of head."""

    kind: str
    head: Head
    over_chunks: bool = False
    """Whether it is shown for what it does at different chunks."""


@dataclass(frozen=True)
class FrameAttention:
    """Frame-wise attention of a head in a pass, mean over samples."""

    frames: tuple[int, ...]
    """Latent frames attended to, by this head or another one."""
    mass: Array
    """(query frames, key frames); NaN where the head does not see the frame."""

    def share(self, first: int, last: int) -> float:
        """Mass on the frames `first` to `last`, mean over query frames."""
        within = [first <= frame <= last for frame in self.frames]
        return float(np.nansum(self.mass[:, within], axis=1).mean())


def examples(stability: Stability) -> list[Example]:
    """A head of each kind, none twice: typical ones, the most borderline one, and those that flip most."""
    decided = ~stability.undecided
    found = [
        _first("typical static head", _typical(stability.margin, stability.static & decided), []),
        _first("typical dynamic head", _typical(stability.margin, ~stability.static & decided), []),
    ]
    every = np.argwhere(np.isfinite(stability.margin))
    kinds = [("head nearest to the boundary", _lowest(np.abs(stability.margin), every))]
    for reason, kept in (
        ("steps", stability.kept_steps),
        ("chunks", stability.kept_chunks),
        ("samples", stability.kept_samples),
    ):
        one = reason.removesuffix("s")
        kinds.append(
            (f"head that changes sides with the {one}", _lowest(kept, np.argwhere(stability.reasons[reason])))
        )
    for kind, heads in kinds:
        found.append(_first(kind, heads, [one.head for one in found if one]))
    return [one for one in found if one]


def frame_attention(
    recorded: Recorded, heads: Sequence[Head], passes: Sequence[Pass]
) -> dict[tuple[Head, Pass], FrameAttention]:
    """Frame-wise attention of those heads in those passes."""
    spec = recorded.recording.spec
    wanted = pl.any_horizontal(
        [(pl.col("layer") == layer) & (pl.col("head") == head) for layer, head in heads]
    )
    at = pl.any_horizontal([(pl.col("chunk") == chunk) & (pl.col("step") == step) for chunk, step in passes])
    keys = ("layer", "head", "chunk", "step", "sample", "query_frame")
    rows = collect(
        recorded.rows.filter(wanted & at).select(*keys, "key_frame", "mass").sort(keys), recorded.place
    )
    frames = {chunk: _frames(rows.filter(chunk=chunk)) for chunk, _ in passes}
    return {
        ((layer, head), (chunk, step)): FrameAttention(
            frames[chunk],
            _mass(
                rows.filter(layer=layer, head=head, chunk=chunk, step=step),
                frames[chunk],
                spec,
                len(recorded.samples),
            ),
        )
        for layer, head in heads
        for chunk, step in passes
    }


def attention_pictures(analysis: Analysis) -> list[tuple[Example, Picture]]:
    """A picture of each example: first and last denoising step of the last chunk, on one scale."""
    recorded = analysis.recorded
    spec, shown = recorded.recording.spec, examples(analysis.stability)
    chunks, steps = analysis.observations.chunks, len(spec.schedule.timesteps)
    ends = sorted({0, steps - 1})
    passes = {
        one: [
            (chunk, step)
            for chunk in sorted({chunks[0 if one.over_chunks else -1], chunks[-1]})
            for step in ends
        ]
        for one in shown
    }
    every = sorted({at for given in passes.values() for at in given})
    found = frame_attention(recorded, [one.head for one in shown], every)
    drawings = {one: {at: found[one.head, at] for at in passes[one]} for one in shown}
    top = max(float(np.nanmax(part.mass)) for parts in drawings.values() for part in parts.values())
    return [(one, _picture(one, parts, spec, top)) for one, parts in drawings.items()]


def _picture(one: Example, parts: dict[Pass, FrameAttention], spec: ModelSpec, top: float) -> Picture:
    def draw(figure: Figure, theme: Theme) -> None:
        rows = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
        for axes, ((chunk, step), part) in zip(rows, parts.items(), strict=True):
            axes.set_facecolor(theme.shade)
            mesh = axes.pcolormesh(
                part.mass, vmin=0, vmax=top, cmap=theme.mass, edgecolors=theme.paper, linewidth=0.6
            )
            axes.invert_yaxis()
            first = chunk * spec.frames_per_chunk
            recent = sum(frame < first - 1 for frame in part.frames)
            axes.axvline(recent, color=theme.labels[0], linewidth=2)
            axes.set_title(f"chunk {chunk}, timestep {spec.schedule.timesteps[step]:.0f}", loc="left")
            places = list(_numbered(part.frames, spec.frames_per_chunk))
            axes.set_xticks([place + 0.5 for place in places], [str(part.frames[place]) for place in places])
            axes.set_yticks(
                np.arange(spec.frames_per_chunk) + 0.5,
                [str(first + frame) for frame in range(spec.frames_per_chunk)],
            )
            axes.tick_params(length=0)
            axes.set_ylabel("query frame")
            axes.spines[:].set_visible(False)
        rows[-1].set_xlabel("key frame")
        figure.colorbar(mesh, ax=list(rows), label="share of attention").outline.set_visible(False)

    said = "; ".join(_said(at, part, spec) for at, part in parts.items())
    height = 0.75 + len(parts) * (0.55 + 0.27 * max(spec.frames_per_chunk, 3))
    layer, head = one.head
    return drawn(
        f"Frame-wise attention of layer {layer} head {head}, {one.kind}: {said}", WIDTH, height, draw
    )


def _said(at: Pass, part: FrameAttention, spec: ModelSpec) -> str:
    chunk, step = at
    first = chunk * spec.frames_per_chunk
    current = part.share(first, first + spec.frames_per_chunk)
    return (
        f"chunk {chunk} at timestep {spec.schedule.timesteps[step]:.0f}: {current:.0%} on the current chunk,"
        f" {part.share(first - 1, first - 1):.0%} on the transition frame, {part.share(0, 0):.0%} on frame 0"
    )


def _numbered(frames: Sequence[int], chunk: int) -> Iterator[int]:
    for place, frame in enumerate(frames):
        if len(frames) <= NUMBERED or frame % chunk == 0:
            yield place


def _typical(margin: Array, mask: npt.NDArray[np.bool_]) -> list[Head]:
    """The head with the median margin."""
    heads = sorted(_heads(mask), key=lambda at: float(margin[at]))
    return heads[len(heads) // 2 :][:1]


def _lowest(values: Array, heads: npt.NDArray[np.int64]) -> list[Head]:
    return sorted(((int(layer), int(head)) for layer, head in heads), key=lambda at: float(values[at]))


def _heads(mask: npt.NDArray[np.bool_]) -> list[Head]:
    return [(int(layer), int(head)) for layer, head in np.argwhere(mask)]


def _first(kind: str, heads: Sequence[Head], taken: Sequence[Head]) -> Example | None:
    spare = [head for head in heads if head not in taken]
    return Example(kind, spare[0], kind.endswith("chunk")) if spare else None


def _frames(rows: pl.DataFrame) -> tuple[int, ...]:
    return tuple(int(frame) for frame in np.unique(rows["key_frame"].explode().to_numpy()))


def _mass(rows: pl.DataFrame, frames: Sequence[int], spec: ModelSpec, samples: int) -> Array:
    lengths = rows["key_frame"].list.len().to_numpy()
    queries = np.repeat(rows["query_frame"].to_numpy(), lengths)
    places = np.searchsorted(frames, rows["key_frame"].explode().to_numpy())
    # A frame can be there twice, once retained in part and once whole.
    total = np.zeros((spec.frames_per_chunk, len(frames)))
    np.add.at(total, (queries, places), rows["mass"].explode().to_numpy().astype(np.float64))
    seen = np.zeros(total.shape, bool)
    seen[queries, places] = True
    return np.where(seen, total / samples, np.nan)
