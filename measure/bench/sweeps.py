"""Cost against the length of a video and against resolution, for each policy: as CSV files and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from forcingkv.headmaps.files import write_bytes, write_text
from forcingkv.measure.bench.cases import BenchCase
from forcingkv.measure.bench.results import rows
from forcingkv.measure.bench.turns import BenchSetup, BenchTurns, decode_seconds, take_turns
from forcingkv.plotting import figure, png
from forcingkv.runtime.cost import pass_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130

CHUNKS = 40
"""Of a video of 30 seconds at 16 frames a second."""


@dataclass(frozen=True)
class LengthPoint:
    """A chunk of a video under a policy."""

    policy: str
    chunk: int
    """Counted from 1."""
    seconds: float
    """All passes of this chunk; measured in its phase."""
    total_seconds: float
    """All passes of the video so far."""
    decode_seconds: float | None
    """This chunk; the same under every policy. None if it was not timed."""
    kv_bytes: int
    """Keys and values that attention reads in this chunk."""
    flops: int
    """Operations of a pass."""


@dataclass(frozen=True)
class ResolutionPoint:
    """A policy at a resolution, in the last phase."""

    policy: str
    resolution: str
    chunk_tokens: int
    seconds: float
    """All passes of a chunk."""
    speedup: float
    speedup_undisturbed: float
    """Of the least times (`results.BenchRow`)."""
    flop_limit: float
    kv_bytes: int


Point = TypeVar("Point", LengthPoint, ResolutionPoint)


def lengths(
    cases: Sequence[BenchCase],
    setup: BenchSetup,
    *,
    chunks: int = CHUNKS,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[LengthPoint]:
    """What each chunk costs. A pass is timed in each phase: chunks of a phase run the same shapes."""
    points = []
    begins = {phase.first_chunk for case in cases for phase in case.bundle.plan.phases}
    took: dict[tuple[str, int], BenchTurns] = {}
    once = replace(setup, rounds=1)
    for _ in range(setup.rounds):
        for chunk in sorted(begins):
            at = [case for case in cases if any(p.first_chunk == chunk for p in case.bundle.plan.phases)]
            for one in take_turns(at, once, chunk=chunk, progress=progress):
                took.setdefault((one.case.name, chunk), BenchTurns(one.case, [])).turns.extend(one.turns)
    decoding = decode_seconds(took.values())
    for case in cases:
        plan, total = case.bundle.plan, 0.0
        for chunk in range(chunks):
            seconds = took[case.name, plan.phase(chunk).first_chunk].chunk_seconds
            total += seconds
            points.append(
                LengthPoint(
                    case.name,
                    chunk + 1,
                    seconds,
                    total,
                    decoding,
                    plan.kv_bytes(chunk=chunk),
                    pass_flops(plan, chunk).total,
                )
            )
    return points


def resolutions(found: Sequence[tuple[str, Sequence[BenchTurns]]]) -> list[ResolutionPoint]:
    """Points of what was measured at several resolutions, each a name and all its policies."""
    points = []
    for resolution, measured in found:
        for one, row in zip(measured, rows(measured), strict=True):
            points.append(
                ResolutionPoint(
                    row.policy,
                    resolution,
                    one.case.bundle.plan.chunk_tokens,
                    row.seconds_per_chunk,
                    row.speedup,
                    row.speedup_undisturbed,
                    row.flop_limit,
                    row.kv_bytes,
                )
            )
    return points


def write_lengths(folder: Path, points: Sequence[LengthPoint], title: str) -> list[Path]:
    """`lengths.csv` and `lengths.png`: seconds of each chunk, and keys and values, over the video."""
    drawn, (cost, memory) = _panels()
    for policy, line in _by_policy(points):
        chunks = [point.chunk for point in line]
        cost.plot(chunks, [point.seconds for point in line], label=policy, linewidth=1.8)
        memory.plot(chunks, [point.kv_bytes / 1e6 for point in line], label=policy, linewidth=1.8)
    if points[0].decode_seconds is not None:
        cost.axhline(points[0].decode_seconds, color="0.5", linestyle=":", label="decoding")
    _named(cost, "chunk of the video", "seconds of a chunk's passes")
    _named(memory, "chunk of the video", "keys and values read, MB")
    return _write(folder, "lengths", points, drawn, title)


def write_resolutions(folder: Path, points: Sequence[ResolutionPoint], title: str) -> list[Path]:
    """`resolutions.csv` and `resolutions.png`: seconds of a chunk, and speed-up beside its FLOP limit."""
    drawn, (cost, gain) = _panels()
    for policy, line in _by_policy(points):
        tokens = [point.chunk_tokens for point in line]
        (line_drawn,) = cost.plot(tokens, [p.seconds for p in line], marker="o", label=policy)
        gain.plot(tokens, [p.speedup_undisturbed for p in line], marker="o", color=line_drawn.get_color())
        gain.plot(tokens, [p.flop_limit for p in line], linestyle=":", color=line_drawn.get_color())
    gain.plot([], [], linestyle=":", color="0.3", label="FLOP limit")
    gain.plot([], [], marker="o", color="0.3", label="measured")
    cost.set_yscale("log")
    for axes in (cost, gain):
        names = {point.chunk_tokens: point.resolution for point in points}
        axes.set_xticks(list(names), list(names.values()))
    _named(cost, "resolution, by tokens of a chunk", "seconds of a chunk's passes")
    _named(gain, "resolution, by tokens of a chunk", "speed-up over the full cache, of least times")
    return _write(folder, "resolutions", points, drawn, title)


def _panels() -> tuple[Figure, list[Axes]]:
    drawn = figure(10.4, 4.0, DPI)
    return drawn, [drawn.add_subplot(1, 2, place) for place in (1, 2)]


def _named(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", framealpha=0.8, edgecolor="none")


def _by_policy(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point.policy, []).append(point)
    return list(lines.items())


def _write(folder: Path, name: str, points: Sequence[Point], drawn: Figure, title: str) -> list[Path]:
    drawn.suptitle(title, fontsize="medium")
    table, picture = folder / f"{name}.csv", folder / f"{name}.png"
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [field.name for field in fields(points[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    write_text(table, lines.getvalue())
    write_bytes(picture, png(drawn))
    return [table, picture]
