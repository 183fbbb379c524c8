"""Which heads are worth a look, and pictures of their frame-wise attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.figure import Figure

from forcingkv.analyze.analysis import Analysis
from forcingkv.analyze.recording import Pass
from forcingkv.analyze.report.page import Picture, Theme, drawn
from forcingkv.analyze.report.pictures import WIDTH
from forcingkv.analyze.scoring import Scored
from forcingkv.analyze.stability import Stability
from forcingkv.analyze.storage import Recorded, by_frame, collect

NUMBERED = 12
"""Key frames up to which each is numbered; of more, the first of each chunk."""

Array = npt.NDArray[np.float64]
Head = tuple[int, int]
Place = tuple[int, int]
"""(chunk, step)."""


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


Parts = dict[str, tuple[int, FrameAttention]]
"""Name of a pass -> its chunk, and what the head did in it."""


def examples(stability: Stability) -> dict[Head, str]:
    """A head of each kind and its kind: typical ones, the most borderline one, and those that flip most."""
    margin, static, decided = stability.margin, stability.static, ~stability.undecided
    kinds: dict[str, list[Head]] = {}
    for side, mask in (("static", static), ("dynamic", ~static)):
        heads = _ordered(margin, mask & decided)
        kinds[f"typical {side} head"] = heads[len(heads) // 2 :][:1]
    kinds["head nearest to the boundary"] = _ordered(np.abs(margin), np.isfinite(margin))
    for parts in ("steps", "clean pass", "chunks", "samples"):
        if parts in stability.reasons:
            flipping = _ordered(stability.kept_parts[parts], stability.reasons[parts])
            kinds[f"head that changes sides with the {parts.removesuffix('s')}"] = flipping
    found: dict[Head, str] = {}
    for kind, heads in kinds.items():
        spare = [head for head in heads if head not in found]
        if spare:
            found[spare[0]] = kind
    return found


def _ordered(values: Array, mask: npt.NDArray[np.bool_]) -> list[Head]:
    """The heads where the mask holds, the lowest value first."""
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(mask)]
    return sorted(heads, key=lambda at: float(values[at]))


def frame_attention(
    recorded: Recorded, heads: Iterable[Head], passes: Sequence[Place]
) -> dict[tuple[Head, Place], FrameAttention]:
    """Frame-wise attention of those heads in those passes."""
    wanted = pl.DataFrame(
        [(*head, *at) for head in heads for at in passes],
        dict.fromkeys(("layer", "head", "chunk", "step"), pl.Int32),
        orient="row",
    )
    keys = (*wanted.columns, "sample", "query_frame")
    lazy = recorded.rows.join(wanted.lazy(), on=wanted.columns, how="semi")
    rows = collect(lazy.select(*keys, "key_frame", "mass").sort(keys), recorded.place)
    queries = recorded.recording.spec.frames_per_chunk
    frames = {
        chunk: tuple(np.unique(rows.filter(chunk=chunk)["key_frame"].explode().to_numpy()).tolist())
        for chunk, _ in passes
    }
    return {
        ((layer, head), (chunk, step)): FrameAttention(
            frames[chunk],
            _mass(rows.filter(layer=layer, head=head, chunk=chunk, step=step), frames[chunk], queries)
            / len(recorded.samples),
        )
        for layer, head, chunk, step in wanted.iter_rows()
    }


def _mass(rows: pl.DataFrame, frames: Sequence[int], query_frames: int) -> Array:
    """Mass by query and key frame, summed over samples; NaN where no row has the key frame."""
    row, key_frame, mass = by_frame(rows)
    cells = rows["query_frame"].to_numpy()[row], np.searchsorted(frames, key_frame)
    total = np.full((query_frames, len(frames)), np.nan)
    total[cells] = 0
    np.add.at(total, cells, mass)  # a frame can be there twice, once retained in part and once whole
    return total


def attention_pictures(analysis: Analysis) -> dict[Head, tuple[str, Picture]]:
    """Head -> its kind and picture, on one scale: of the last chunk that is scored the first and the last
    denoising step and the clean pass, as far as they are scored."""
    recorded, scored = analysis.recorded, analysis.observations.scored
    spec, shown = recorded.recording.spec, examples(analysis.stability)
    first, last = scored.chunks[0], scored.chunks[-1]
    passes = {
        head: [
            (made.chunk, made.step)
            for chunk in sorted({first if kind.endswith("chunk") else last, last})
            for made in shown_passes(scored, chunk)
        ]
        for head, kind in shown.items()
    }
    names = {(made.chunk, made.step): _named(made) for made in scored.passes}
    found = frame_attention(recorded, shown, sorted({at for given in passes.values() for at in given}))
    parts = {head: {at: found[head, at] for at in given} for head, given in passes.items()}
    top = max(float(np.nanmax(part.mass)) for given in parts.values() for part in given.values())
    frames = spec.frames_per_chunk, scored.recent_frames
    return {
        head: (
            kind,
            _picture(head, kind, {names[at]: (at[0], part) for at, part in given.items()}, frames, top),
        )
        for (head, kind), given in zip(shown.items(), parts.values(), strict=True)
    }


def shown_passes(scored: Scored, chunk: int) -> list[Pass]:
    """The first and the last denoising step of a chunk, and its clean pass, as far as they are scored."""
    made = [one for one in scored.passes if one.chunk == chunk]
    denoising = [one for one in made if not one.clean]
    return [*dict.fromkeys(denoising[:1] + denoising[-1:]), *(one for one in made if one.clean)]


def _named(made: Pass) -> str:
    what = "clean pass at timestep" if made.clean else "timestep"
    return f"chunk {made.chunk}, {what} {made.timestep:.0f}"


def _picture(head: Head, kind: str, parts: Parts, frames_counted: tuple[int, int], top: float) -> Picture:
    """One head; `frames_counted` are those of a chunk, and those that count as recent."""
    queries, recent = frames_counted

    def draw(figure: Figure, theme: Theme) -> None:
        rows = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
        for axes, (name, (chunk, part)) in zip(rows, parts.items(), strict=True):
            axes.set_facecolor(theme.shade)
            mesh = axes.pcolormesh(
                part.mass, vmin=0, vmax=top, cmap=theme.mass, edgecolors=theme.paper, linewidth=0.6
            )
            axes.invert_yaxis()
            first, frames = chunk * queries, part.frames
            old = sum(frame < first + queries - recent for frame in frames)
            axes.axvline(old, color=theme.labels[0], linewidth=2)
            axes.set_title(name, loc="left")
            numbered = [at for at, f in enumerate(frames) if len(frames) <= NUMBERED or f % queries == 0]
            axes.set_xticks([at + 0.5 for at in numbered], [str(frames[at]) for at in numbered])
            axes.set_yticks(np.arange(queries) + 0.5, [str(first + frame) for frame in range(queries)])
            axes.tick_params(length=0)
            axes.set_ylabel("query frame")
            axes.spines[:].set_visible(False)
        rows[-1].set_xlabel("key frame")
        figure.colorbar(mesh, ax=list(rows), label="share of attention").outline.set_visible(False)

    said = "; ".join(_said(name, *part, queries) for name, part in parts.items())
    alt = f"Frame-wise attention of layer {head[0]} head {head[1]}, {kind}: {said}"
    return drawn(alt, WIDTH, 0.75 + len(parts) * (0.55 + 0.27 * max(queries, 3)), draw)


def _said(name: str, chunk: int, part: FrameAttention, queries: int) -> str:
    first = chunk * queries
    current = part.share(first, first + queries)
    return (
        f"{name}: {current:.0%} on the current chunk,"
        f" {part.share(first - 1, first - 1):.0%} on the transition frame, {part.share(0, 0):.0%} on frame 0"
    )
