"""Cost against the length of a video and against resolution, for each policy: as CSV files and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forcingkv.headmaps.writing import write_bytes
from forcingkv.measure.bench.results import rows
from forcingkv.measure.bench.turns import BenchCase, BenchSetup, BenchTurns, decode_seconds, take_turns
from forcingkv.measure.tables import write_csv
from forcingkv.plotting import figure, png
from forcingkv.runtime.cost import pass_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, DPI = (10.4, 4.0), 130
CHUNKS = 40
"""Of a video of 30 seconds at 16 frames a second."""

Point = dict[str, Any]
"""A row of the CSV file."""


def lengths(
    cases: Sequence[BenchCase],
    setup: BenchSetup,
    *,
    chunks: int = CHUNKS,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[Point]:
    """What each chunk costs. A pass is timed in each phase: chunks of a phase run the same shapes.

    Returns:
        For each policy and `chunk`, counted from 1: `seconds` of all its passes, as many as its schedule
        gives it, measured in its phase; `total_seconds` of all passes so far, and the `fps` of the video that
        far, frames being temporal stride x latent frames; `decode_seconds` of a chunk, the same under every
        policy, None if it was not timed; `kv_bytes` that attention reads; `flops` of a pass.
    """
    begins = {case: {phase.first_chunk for phase in case.bundle.plan.phases} for case in cases}
    took: dict[tuple[str, int], BenchTurns] = {}
    for _ in range(setup.rounds):
        for chunk in sorted(set().union(*begins.values())):
            at = [case for case in cases if chunk in begins[case]]
            for one in take_turns(at, replace(setup, rounds=1), chunk=chunk, progress=progress):
                took.setdefault((one.policy, chunk), BenchTurns(one.case, [])).turns.extend(one.turns)
    points, decoding = [], decode_seconds(took.values())
    for case in cases:
        plan, total = case.bundle.plan, 0.0
        for chunk in range(chunks):
            timed = took[plan.policy.name, plan.phase(chunk).first_chunk]
            # The first chunk of a model that recomputes its context has none, and no clean pass either.
            fills = chunk > 0 or not plan.recomputes
            seconds = timed.seconds_of(plan.spec.schedule.of_chunk(chunk), fills=fills)
            total += seconds
            frames = (chunk + 1) * plan.spec.frames_per_chunk * plan.spec.decoder.temporal_stride
            points.append(
                {
                    "policy": plan.policy.name,
                    "chunk": chunk + 1,
                    "seconds": seconds,
                    "total_seconds": total,
                    "fps": frames / total,
                    "decode_seconds": decoding,
                    "kv_bytes": plan.kv_bytes(chunk=chunk),
                    "flops": pass_flops(plan, chunk).total,
                }
            )
    return points


def resolutions(found: Sequence[tuple[str, Sequence[BenchTurns]]]) -> list[Point]:
    """Points of what was measured at several resolutions, each a name and all its policies.

    Returns:
        For each policy and `resolution`, in the last phase: `chunk_tokens`; `seconds` of all passes of a
        chunk; `speedup`, `speedup_undisturbed`, `flop_limit` and `kv_bytes` as in `BenchRow`.
    """
    same = ("speedup", "speedup_undisturbed", "flop_limit", "kv_bytes")
    return [
        {
            "policy": one.policy,
            "resolution": resolution,
            "chunk_tokens": one.bundle.plan.chunk_tokens,
            "seconds": row["seconds_per_chunk"],
        }
        | {name: row[name] for name in same}
        for resolution, measured in found
        for one, row in zip(measured, rows(measured), strict=True)
    ]


def write_lengths(folder: Path, points: Sequence[Point], title: str) -> list[Path]:
    """`lengths.csv` and `lengths.png`: seconds of each chunk, and keys and values, over the video."""
    drawn = figure(*SIZE, DPI)
    cost, memory = drawn.subplots(1, 2)
    for policy, line in _by_policy(points):
        cost.plot(line["chunk"], line["seconds"], label=policy, linewidth=1.8)
        memory.plot(line["chunk"], np.divide(line["kv_bytes"], 1e6), label=policy, linewidth=1.8)
    if points[0]["decode_seconds"] is not None:
        cost.axhline(points[0]["decode_seconds"], color="0.5", linestyle=":", label="decoding")
    _named(cost, "chunk of the video", "seconds of a chunk's passes")
    _named(memory, "chunk of the video", "keys and values read, MB")
    return _write(folder, "lengths", points, drawn, title)


def write_resolutions(folder: Path, points: Sequence[Point], title: str) -> list[Path]:
    """`resolutions.csv` and `resolutions.png`: seconds of a chunk, and speed-up beside its FLOP limit."""
    drawn = figure(*SIZE, DPI)
    cost, gain = drawn.subplots(1, 2)
    for policy, line in _by_policy(points):
        tokens = line["chunk_tokens"]
        (line_drawn,) = cost.plot(tokens, line["seconds"], marker="o", label=policy)
        gain.plot(tokens, line["speedup_undisturbed"], marker="o", color=line_drawn.get_color())
        gain.plot(tokens, line["flop_limit"], linestyle=":", color=line_drawn.get_color())
    gain.plot([], [], linestyle=":", color="0.3", label="FLOP limit")
    gain.plot([], [], marker="o", color="0.3", label="measured")
    cost.set_yscale("log")
    for axes in (cost, gain):
        names = {point["chunk_tokens"]: point["resolution"] for point in points}
        axes.set_xticks(list(names), list(names.values()))
    _named(cost, "resolution, by tokens of a chunk", "seconds of a chunk's passes")
    _named(gain, "resolution, by tokens of a chunk", "speed-up over the full cache, of least times")
    return _write(folder, "resolutions", points, drawn, title)


def _named(axes: Axes, across: str, up: str) -> None:
    axes.set(xlabel=across, ylabel=up)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", framealpha=0.8, edgecolor="none")


def _by_policy(points: Sequence[Point]) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """For each policy its columns."""
    for policy in dict.fromkeys(point["policy"] for point in points):
        line = [point for point in points if point["policy"] == policy]
        yield policy, {name: [point[name] for point in line] for name in line[0]}


def _write(folder: Path, name: str, points: Sequence[Point], drawn: Figure, title: str) -> list[Path]:
    drawn.suptitle(title, fontsize="medium", parse_math=False)
    table, picture = folder / f"{name}.csv", folder / f"{name}.png"
    write_csv(table, list(points[0]), points)
    write_bytes(picture, png(drawn))
    return [table, picture]
