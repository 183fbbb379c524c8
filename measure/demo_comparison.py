"""Policies side by side on the demo model: the same prompts and seeds through each, in turn, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from forcingkv.headmaps.writing import write_bytes
from forcingkv.measure.fidelity.pairs import mean_psnr
from forcingkv.measure.tables import printable
from forcingkv.models.demo.data import moves_of
from forcingkv.models.demo.judge import READ_CHUNK, grey, verdict
from forcingkv.plotting import figure, png
from forcingkv.runtime import Session, Timing
from forcingkv.runtime.video import Mp4Writer

Frames = npt.NDArray[np.uint8]

SHOWN_PROMPTS = 4
"""Prompts in the video and on the sheet."""
SHOWN_FRAMES = (0, 5, 10, 15, 20)
"""Frames of a video on the sheet."""


@dataclass
class PolicyRun:
    """All videos of one policy."""

    videos: list[Frames] = field(default_factory=list)
    timings: list[list[Timing]] = field(default_factory=list)


def compare_policies(
    sessions: Mapping[str, Session],
    prompts: Sequence[str],
    chunks: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, PolicyRun]:
    """Generate every prompt with every policy; policies take turns, since machines slow down and recover."""
    runs = {name: PolicyRun() for name in sessions}
    for number, prompt in enumerate(prompts):
        for name, session in sessions.items():
            made = list(session.generate(prompt, seed=seed + number, chunks=chunks))
            runs[name].videos.append(np.concatenate([chunk.frames for chunk in made]))
            runs[name].timings.append([chunk.timing for chunk in made])
        progress(number + 1)
    return runs


def comparison_rows(
    runs: Mapping[str, PolicyRun], sessions: Mapping[str, Session], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """The comparison, a row a policy. Shares are of digits; times are medians.

    Times are those of the last chunk of each video, when the caches are as long as they get here;
    `seconds_per_chunk` and `frames_per_second` include decoding.
    """
    rows = []
    for name, run in runs.items():
        spec = sessions[name].spec
        seen = [
            verdict(grey(video), moves_of(prompt), spec.frames_per_chunk, READ_CHUNK)
            for video, prompt in zip(run.videos, prompts, strict=True)
        ]
        last = [timings[-1] for timings in run.timings]
        seconds = float(np.median([timing.total for timing in last]))
        undecoded = float(np.median([timing.total - timing.decode for timing in last]))
        rows.append(
            {
                "policy": name,
                "kv_bytes": sessions[name].plan.kv_bytes(),
                "seconds_per_chunk": seconds,
                "seconds_per_chunk_without_decoding": undecoded,
                "frames_per_second": spec.frames_per_chunk / seconds,
                "psnr_to_full": None if name == "full" else mean_psnr(run.videos, runs["full"].videos),
                "digits_read": float(np.mean([v.digits for v in seen])),
                "prompts_read": float(np.mean([all(v.digits) for v in seen])),
                "direction_right": float(np.mean([v.directions for v in seen])),
            }
        )
    return rows


def comparison_table(rows: Sequence[Mapping[str, Any]], chunks: int) -> Table:
    """The rows of `comparison_rows` for people."""
    title = f"policies, same prompts and seeds; times of chunk {chunks}, decoding included"
    columns = ("policy", "KV MB", "s/chunk", "frames/s", "PSNR to full", "digits read", "direction right")
    cells = (
        (
            row["policy"],
            f"{row['kv_bytes'] / 1e6:.2f}",
            f"{row['seconds_per_chunk']:.3f}",
            f"{row['frames_per_second']:.1f}",
            "-" if row["psnr_to_full"] is None else f"{row['psnr_to_full']:.1f} dB",
            f"{row['digits_read']:.0%}",
            f"{row['direction_right']:.0%}",
        )
        for row in rows
    )
    return printable(title, columns, cells)


def write_comparison_video(runs: Mapping[str, PolicyRun], path: Path, fps: float) -> None:
    """An mp4: policies from left to right, the first prompts from top to bottom, with lines between."""
    framed = ((0, 0), (1, 1), (1, 1), (0, 0))
    columns = [
        np.concatenate([np.pad(v, framed, constant_values=96) for v in run.videos[:SHOWN_PROMPTS]], axis=1)
        for run in runs.values()
    ]
    with Mp4Writer(path, fps, enlarge=4) as writer:
        writer.write(np.concatenate(columns, axis=2))


def write_comparison_sheet(runs: Mapping[str, PolicyRun], prompts: Sequence[str], path: Path) -> None:
    """A PNG of some frames of the first prompts: policies from left to right, prompts from top to bottom."""
    prompts = prompts[: min(SHOWN_PROMPTS, *(len(run.videos) for run in runs.values()))]
    sheet = figure(4.6 * len(runs), 0.68 * len(prompts) + 0.4, dpi=100)
    axes = sheet.subplots(len(prompts), len(runs), squeeze=False)
    for column, (policy, run) in enumerate(runs.items()):
        for row, (prompt, video) in enumerate(zip(prompts, run.videos[: len(prompts)], strict=True)):
            strip = [np.pad(video[f], ((1, 1), (1, 1), (0, 0)), constant_values=96) for f in SHOWN_FRAMES]
            shown = axes[row][column]
            shown.imshow(np.concatenate(strip, 1), interpolation="nearest")
            shown.set_axis_off()
            shown.set_title(policy if row == 0 else "", fontsize=11)
            if column == 0:
                shown.text(-3, 16, prompt.replace(" and ", "\nand "), fontsize=8, ha="right", va="center")
    write_bytes(path, png(sheet))
