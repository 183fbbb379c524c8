"""Sweeps as CSV files and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from forcingkv.headmaps.files import write_bytes
from forcingkv.measure.bench.sweeps import LengthPoint, ResolutionPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Point = TypeVar("Point", LengthPoint, ResolutionPoint)
DPI = 130


def write_lengths(folder: Path, points: Sequence[LengthPoint], title: str) -> list[Path]:
    """`lengths.csv` and `lengths.png`: seconds of each chunk, and keys and values, over the video."""
    figure, (cost, memory) = _axes(2)
    for policy, line in _by_policy(points):
        chunks = [point.chunk for point in line]
        cost.plot(chunks, [point.seconds for point in line], label=policy, linewidth=1.8)
        memory.plot(chunks, [point.kv_bytes / 1e6 for point in line], label=policy, linewidth=1.8)
    if points[0].decode_seconds is not None:
        cost.axhline(points[0].decode_seconds, color="0.5", linestyle=":", label="decoding")
    _named(cost, "chunk of the video", "seconds of a chunk's passes")
    _named(memory, "chunk of the video", "keys and values read, MB")
    return _write(folder, "lengths", points, figure, title)


def write_resolutions(folder: Path, points: Sequence[ResolutionPoint], title: str) -> list[Path]:
    """`resolutions.csv` and `resolutions.png`: seconds of a chunk, and speed-up beside its FLOP limit."""
    figure, (cost, gain) = _axes(2)
    for policy, line in _by_policy(points):
        tokens = [point.chunk_tokens for point in line]
        (drawn,) = cost.plot(tokens, [p.seconds for p in line], marker="o", label=policy)
        gain.plot(tokens, [p.speedup_undisturbed for p in line], marker="o", color=drawn.get_color())
        gain.plot(tokens, [p.flop_limit for p in line], linestyle=":", color=drawn.get_color())
    gain.plot([], [], linestyle=":", color="0.3", label="FLOP limit")
    gain.plot([], [], marker="o", color="0.3", label="measured")
    cost.set_yscale("log")
    for axes in (cost, gain):
        names = {point.chunk_tokens: point.resolution for point in points}
        axes.set_xticks(list(names), list(names.values()))
    _named(cost, "resolution, by tokens of a chunk", "seconds of a chunk's passes")
    _named(gain, "resolution, by tokens of a chunk", "speed-up over the full cache, of least times")
    return _write(folder, "resolutions", points, figure, title)


def _axes(columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(5.2 * columns, 4.0), layout="constrained")
    return figure, [figure.add_subplot(1, columns, place + 1) for place in range(columns)]


def _named(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", framealpha=0.8, edgecolor="none")


def _by_policy(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    ordered = sorted(points, key=lambda point: [p.policy for p in points].index(point.policy))
    return [(policy, list(line)) for policy, line in groupby(ordered, key=lambda point: point.policy)]


def _write(folder: Path, name: str, points: Sequence[Point], figure: Figure, title: str) -> list[Path]:
    figure.suptitle(title, fontsize="medium")
    folder.mkdir(parents=True, exist_ok=True)
    table, drawn = folder / f"{name}.csv", folder / f"{name}.png"
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [field.name for field in fields(points[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    write_bytes(table, lines.getvalue().encode())
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    write_bytes(drawn, picture.getvalue())
    return [table, drawn]
