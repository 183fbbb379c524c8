"""Cost against the length of a video and against resolution, for each policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from forcingkv.measure.bench.cases import Case
from forcingkv.measure.bench.results import rows
from forcingkv.measure.bench.turns import Measured, Setup, decode_seconds, take_turns
from forcingkv.runtime.cost import pass_flops

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
    """Of the least times (`results.Row`)."""
    flop_limit: float
    kv_bytes: int


def lengths(
    cases: Sequence[Case],
    setup: Setup,
    *,
    chunks: int = CHUNKS,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[LengthPoint]:
    """What each chunk costs. A pass is timed in each phase: chunks of a phase run the same shapes."""
    points = []
    begins = {phase.first_chunk for case in cases for phase in case.bundle.plan.phases}
    took: dict[tuple[str, int], Measured] = {}
    once = replace(setup, rounds=1)
    for _ in range(setup.rounds):
        for chunk in sorted(begins):
            at = [case for case in cases if any(p.first_chunk == chunk for p in case.bundle.plan.phases)]
            for one in take_turns(at, once, chunk=chunk, progress=progress):
                took.setdefault((one.case.name, chunk), Measured(one.case, [])).turns.extend(one.turns)
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


def resolutions(found: Sequence[tuple[str, Sequence[Measured]]]) -> list[ResolutionPoint]:
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
