"""Policies side by side: the same prompts and seeds through each bundle, in turn, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.measure.fidelity.pairs import grey, mean_psnr
from forcingkv.models.demo.data import Moves, prompt_of
from forcingkv.models.demo.judge import Judge, verdict
from forcingkv.runtime import Session, Timing

Frames = npt.NDArray[np.uint8]


@dataclass
class PolicyRun:
    """All videos of one policy."""

    videos: list[Frames] = field(default_factory=list)
    timings: list[list[Timing]] = field(default_factory=list)


def compare_policies(
    sessions: Mapping[str, Session],
    prompts: Sequence[Moves],
    chunks: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, PolicyRun]:
    """Generate every prompt with every policy; policies take turns, so that drift hits all alike."""
    runs = {name: PolicyRun() for name in sessions}
    for number, moves in enumerate(prompts):
        for name, session in sessions.items():
            made = list(session.generate(prompt_of(moves), seed=seed + number, chunks=chunks))
            runs[name].videos.append(np.concatenate([chunk.frames for chunk in made]))
            runs[name].timings.append([chunk.timing for chunk in made])
        progress(number + 1)
    return runs


def results(
    runs: Mapping[str, PolicyRun],
    sessions: Mapping[str, Session],
    prompts: Sequence[Moves],
    read_chunk: int,
    reference: str = "full",
) -> list[dict[str, Any]]:
    """The comparison, a row a policy. Shares are of digits; times are medians.

    Times are those of the last chunk of each video, when the caches are as long as they get here;
    `seconds_per_chunk` and `frames_per_second` include decoding.
    """
    judge = Judge.fit()
    rows = []
    for name, run in runs.items():
        spec = sessions[name].spec
        seen = [
            verdict(judge, grey(video), moves, spec.frames_per_chunk, read_chunk)
            for video, moves in zip(run.videos, prompts, strict=True)
        ]
        last = [timings[-1] for timings in run.timings]
        seconds = float(np.median([timing.total for timing in last]))
        rows.append(
            {
                "policy": name,
                "kv_bytes": sessions[name].plan.kv_bytes(),
                "seconds_per_chunk": seconds,
                "seconds_per_chunk_without_decoding": float(
                    np.median([timing.total - timing.decode for timing in last])
                ),
                "frames_per_second": spec.frames_per_chunk / seconds,
                "psnr_to_full": None if name == reference else mean_psnr(run.videos, runs[reference].videos),
                "digits_read": float(np.mean([v.digits for v in seen])),
                "prompts_read": float(np.mean([all(v.digits) for v in seen])),
                "direction_right": float(np.mean([v.directions for v in seen])),
            }
        )
    return rows
