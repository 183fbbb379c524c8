"""What turns come to: seconds, speed-up over the full cache, and the limit that arithmetic sets to it."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forcingkv.measure.bench.turns import Measured, Setup, decode_seconds
from forcingkv.runtime.cost import pass_flops
from forcingkv.runtime.footprint import footprint


@dataclass(frozen=True)
class Row:
    """A policy, in the phase that was timed. Times are medians over rounds."""

    policy: str
    seconds: float
    """A denoising pass."""
    seconds_least: float
    seconds_most: float
    speedup: float
    """Median over rounds of the baseline's seconds through this policy's, of the same round."""
    speedup_least: float
    speedup_most: float
    speedup_undisturbed: float
    """Of the least seconds of each: nearest to a machine that does nothing else, where other work came and
    went within rounds."""
    flop_limit: float
    """The baseline's operations through this policy's: the speed-up if all operations took equal time."""
    share_of_limit: float
    """speedup / flop_limit. Above 1 where the operations that are saved are slower than the others."""
    kv_bytes: int
    """Keys and values that attention reads, current chunk included, from the plan."""
    cache_bytes: int
    """The session's buffers for keys and values: the sink once, the rest twice, no current chunk."""
    needed_bytes: int
    """What the session was to take, decoding included, from the footprint; without activations where they are
    not known."""
    grown_bytes: int
    """How much the process grew at most by opening the session and its passes, without decoding."""
    gflops: float
    """Operations a second, in thousands of millions."""
    seconds_per_chunk: float
    """All denoising passes and the clean one (`Measured.chunk_seconds`)."""
    seconds_to_decode: float | None
    """A chunk; None if it was not timed."""
    speedup_with_decoding: float | None
    """Of a whole chunk, decoding included."""


def report(measured: Sequence[Measured], setup: Setup) -> dict[str, Any]:
    """All that was measured and where, for JSON."""
    bundles = {one.case.name: one.case.bundle for one in measured}
    plan = next(iter(bundles.values())).plan
    return {
        "machine": machine(setup.threads),
        "backend": setup.backend,
        "model": plan.spec.name,
        "layers": plan.spec.layers,
        "geometry": f"{plan.geometry.width}x{plan.geometry.height}",
        "rounds": len(measured[0].turns),
        "heads": {name: bundle.headmap.counts() for name, bundle in bundles.items() if bundle.headmap},
        "rows": [asdict(row) for row in rows(measured)],
    }


def rows(measured: Sequence[Measured], chunk: int | None = None) -> list[Row]:
    """A row a policy, in the order they were given."""
    against, decoding = baseline(measured), decode_seconds(measured)
    return [_row(one, against, decoding, chunk) for one in measured]


def baseline(measured: Sequence[Measured]) -> Measured:
    """What the others are compared with: the policy with most keys and values."""
    return max(measured, key=lambda one: one.case.bundle.plan.kv_bytes())


def machine(threads: int | None) -> dict[str, Any]:
    """Where it was measured."""
    import onnxruntime

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def _row(one: Measured, against: Measured, decoding: float | None, chunk: int | None) -> Row:
    plan = one.case.bundle.plan
    flops, most = (pass_flops(m.case.bundle.plan, chunk).total for m in (one, against))
    ratios = [b.pass_seconds / a.pass_seconds for a, b in zip(one.turns, against.turns, strict=True)]
    taken = [turn.pass_seconds for turn in one.turns]
    per_chunk, per_chunk_against = one.chunk_seconds, against.chunk_seconds
    speedup, limit = statistics.median(ratios), most / flops
    return Row(
        policy=one.case.name,
        seconds=one.pass_seconds,
        seconds_least=min(taken),
        seconds_most=max(taken),
        speedup=speedup,
        speedup_least=min(ratios),
        speedup_most=max(ratios),
        speedup_undisturbed=min(turn.pass_seconds for turn in against.turns) / min(taken),
        flop_limit=limit,
        share_of_limit=speedup / limit,
        kv_bytes=plan.kv_bytes(),
        cache_bytes=one.turns[-1].cache_bytes,
        needed_bytes=sum(footprint(one.case.bundle.manifest, plan).values()),
        grown_bytes=max(turn.grown_bytes for turn in one.turns),
        gflops=flops / one.pass_seconds / 1e9,
        seconds_per_chunk=per_chunk,
        seconds_to_decode=decoding,
        speedup_with_decoding=None
        if decoding is None
        else (per_chunk_against + decoding) / (per_chunk + decoding),
    )


def _processor() -> str:
    """Its name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
