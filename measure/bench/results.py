"""The results of turns: seconds, speed-up over the full cache, and the limit that arithmetic sets to it."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from forcingkv.measure.bench.turns import BenchSetup, BenchTurns, decode_seconds
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


def rows(measured: Sequence[BenchTurns], chunk: int | None = None) -> list[BenchRow]:
    """A row a policy, in the order they were given."""
    against, decoding = baseline(measured), decode_seconds(measured)
    return [_row(one, against, decoding, chunk) for one in measured]


def baseline(measured: Sequence[BenchTurns]) -> BenchTurns:
    """What the others are compared with: the policy with most keys and values."""
    return max(measured, key=lambda one: one.case.bundle.plan.kv_bytes())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads: int | None) -> dict[str, Any]:
    """Where it was measured."""
    import onnxruntime

    return {
        "processor": _processor(),
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
    table = Table(title=f"{title_of(result)}: a pass, median of {result['rounds']} rounds (least to most)")
    for name in (
        "policy",
        "s/pass",
        "speed-up",
        "undisturbed",
        "FLOP limit",
        "share",
        "with decoding",
        "KV read",
        "KV held",
        "memory",
        "GFLOP/s",
    ):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in result["rows"]:
        whole = row["speedup_with_decoding"]
        table.add_row(
            row["policy"],
            f"{row['seconds']:.3g} ({row['seconds_least']:.3g} to {row['seconds_most']:.3g})",
            f"{row['speedup']:.2f} ({row['speedup_least']:.2f} to {row['speedup_most']:.2f})",
            f"{row['speedup_undisturbed']:.2f}",
            f"{row['flop_limit']:.2f}",
            f"{row['share_of_limit']:.2f}",
            "-" if whole is None else f"{whole:.2f}",
            f"{row['kv_bytes'] / 1e6:.1f} MB",
            f"{row['cache_bytes'] / 1e6:.1f} MB",
            f"{row['grown_bytes'] / 1e6:.0f} MB",
            f"{row['gflops']:.0f}",
        )
    return table


def _row(one: BenchTurns, against: BenchTurns, decoding: float | None, chunk: int | None) -> BenchRow:
    plan = one.case.bundle.plan
    flops, most = (pass_flops(m.case.bundle.plan, chunk).total for m in (one, against))
    ratios = [b.pass_seconds / a.pass_seconds for a, b in zip(one.turns, against.turns, strict=True)]
    taken = [turn.pass_seconds for turn in one.turns]
    per_chunk, per_chunk_against = one.chunk_seconds, against.chunk_seconds
    speedup, limit = statistics.median(ratios), most / flops
    return BenchRow(
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
    """The name of the processor, where the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
