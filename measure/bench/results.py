"""The results of turns: seconds, speed-up over the full cache, and the limit that arithmetic sets to it."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from forcingkv.measure.bench.turns import BenchSetup, BenchTurns, decode_seconds
from forcingkv.measure.tables import printable
from forcingkv.runtime.cost import pass_flops
from forcingkv.runtime.footprint import footprint


@dataclass(frozen=True)
class BenchRow:
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
    """The baseline's shortest turn through this policy's shortest: what comes nearest to an idle machine,
    where other work disturbed some of the turns."""
    flop_limit: float
    """The baseline's operations through this policy's: the speed-up if all operations took equal time."""
    share_of_limit: float
    """speedup / flop_limit. Above 1 where the operations that are saved are slower than the others."""
    kv_bytes: int
    """Keys and values that attention reads, current chunk included, from the plan."""
    cache_bytes: int
    """The session's buffers for keys and values: the sink once, the rest twice, no current chunk."""
    needed_bytes: int
    """What the session was expected to take, decoding included, from the footprint; without activations
    where they are not known."""
    grown_bytes: int
    """By how much the process grew at most while it opened the session and ran passes, without decoding."""
    gflops: float
    """Operations a second, in thousands of millions."""
    seconds_per_chunk: float
    """All denoising passes and the clean one (`BenchTurns.chunk_seconds`)."""
    seconds_to_decode: float | None
    """A chunk; None if it was not timed."""
    speedup_with_decoding: float | None
    """Of a whole chunk, decoding included."""


def report(measured: Sequence[BenchTurns], setup: BenchSetup) -> dict[str, Any]:
    """All that was measured and where, for JSON."""
    plan = measured[0].bundle.plan
    headmaps = {one.policy: one.bundle.headmap for one in measured}
    return {
        "machine": machine(setup.threads),
        "backend": setup.backend,
        "model": plan.spec.name,
        "layers": plan.spec.layers,
        "geometry": f"{plan.geometry.width}x{plan.geometry.height}",
        "rounds": len(measured[0].turns),
        "heads": {name: headmap.counts() for name, headmap in headmaps.items() if headmap},
        "rows": [asdict(row) for row in rows(measured)],
    }


def rows(measured: Sequence[BenchTurns]) -> list[BenchRow]:
    """A row a policy, in the order they were given. They are compared with that of most keys and values."""
    against, decoding = max(measured, key=lambda one: one.bundle.plan.kv_bytes()), decode_seconds(measured)
    return [_row(one, against, decoding) for one in measured]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads: int | None) -> dict[str, Any]:
    """Where it was measured."""
    import onnxruntime

    processor = platform.processor() or platform.machine()
    with suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
    return {
        "processor": processor,
        "cores": cores(),
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def title_of(result: Mapping[str, Any], *, resolution: bool = True) -> str:
    """What was timed, and where."""
    where, layers = result["machine"], result["layers"]
    at = f", {result['geometry']}" if resolution else ""
    return (
        f"{result['model']}, {layers} layer{'s'[: layers > 1]}{at}, {result['backend']},"
        f" {where['threads']} thread{'s'[: where['threads'] > 1]} of {where['processor']}"
    )


def results_table(result: Mapping[str, Any]) -> Table:
    """The rows of a report for people."""
    title = f"{title_of(result)}: a pass, median of {result['rounds']} rounds (least to most)"
    return printable(title, list(SHOWN), ([show(row) for show in SHOWN.values()] for row in result["rows"]))


SHOWN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "policy": lambda row: row["policy"],
    "s/pass": lambda row: f"{row['seconds']:.3g} ({row['seconds_least']:.3g} to {row['seconds_most']:.3g})",
    "speed-up": lambda row: f"{row['speedup']:.2f} ({row['speedup_least']:.2f} to {row['speedup_most']:.2f})",
    "undisturbed": lambda row: f"{row['speedup_undisturbed']:.2f}",
    "FLOP limit": lambda row: f"{row['flop_limit']:.2f}",
    "share": lambda row: f"{row['share_of_limit']:.2f}",
    "with decoding": lambda row: _or_dash(row["speedup_with_decoding"]),
    "KV read": lambda row: f"{row['kv_bytes'] / 1e6:.1f} MB",
    "KV held": lambda row: f"{row['cache_bytes'] / 1e6:.1f} MB",
    "memory": lambda row: f"{row['grown_bytes'] / 1e6:.0f} MB",
    "GFLOP/s": lambda row: f"{row['gflops']:.0f}",
}
"""The columns of the table for people."""


def _or_dash(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _row(one: BenchTurns, against: BenchTurns, decoding: float | None) -> BenchRow:
    plan = one.bundle.plan
    flops, most = (pass_flops(m.bundle.plan).total for m in (one, against))
    taken, taken_against = ([turn.pass_seconds for turn in m.turns] for m in (one, against))
    ratios = [b / a for a, b in zip(taken, taken_against, strict=True)]
    speedup, limit, with_decoding = statistics.median(ratios), most / flops, None
    if decoding is not None:
        with_decoding = (against.chunk_seconds + decoding) / (one.chunk_seconds + decoding)
    return BenchRow(
        policy=one.policy,
        seconds=one.pass_seconds,
        seconds_least=min(taken),
        seconds_most=max(taken),
        speedup=speedup,
        speedup_least=min(ratios),
        speedup_most=max(ratios),
        speedup_undisturbed=min(taken_against) / min(taken),
        flop_limit=limit,
        share_of_limit=speedup / limit,
        kv_bytes=plan.kv_bytes(),
        cache_bytes=one.turns[-1].cache_bytes,
        needed_bytes=sum(footprint(one.bundle.manifest, plan).values()),
        grown_bytes=max(turn.grown_bytes for turn in one.turns),
        gflops=flops / one.pass_seconds / 1e9,
        seconds_per_chunk=one.chunk_seconds,
        seconds_to_decode=decoding,
        speedup_with_decoding=with_decoding,
    )
