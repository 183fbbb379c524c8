"""The results of turns: seconds, speed-up over the full cache, and the limit that arithmetic sets to it."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from forcingkv.measure.bench.turns import BenchSetup, BenchTurns, decode_seconds
from forcingkv.measure.tables import printable
from forcingkv.runtime.cost import pass_flops
from forcingkv.runtime.footprint import footprint
from forcingkv.runtime.processor import processor_name
from forcingkv.runtime.threads import chosen_threads, cpu_threads

BenchRow = dict[str, Any]
"""A policy in the phase that was timed (`_row`)."""


def report(measured: Sequence[BenchTurns], setup: BenchSetup) -> dict[str, Any]:
    """All that was measured and where, for JSON."""
    plan = measured[0].bundle.plan
    schedule = plan.spec.schedule
    headmaps = {one.policy: one.bundle.headmap for one in measured}
    return {
        "machine": machine(setup.threads),
        "backend": ", ".join(dict.fromkeys(one.case.backend for one in measured)),
        "model": plan.spec.name,
        "layers": plan.spec.layers,
        "geometry": plan.geometry.described,
        "rounds": len(measured[0].turns),
        # Of a chunk, and of the first ones where these have others; the clean pass among them, as in `plan`.
        "context": schedule.context,
        "passes": len(schedule.later) + schedule.clean_passes,
        "opening_passes": [
            len(schedule.of_chunk(n)) + schedule.clean_passes for n in range(schedule.opening_chunks)
        ],
        "heads": {name: headmap.counts() for name, headmap in headmaps.items() if headmap},
        "rows": rows(measured),
    }


def rows(measured: Sequence[BenchTurns]) -> list[BenchRow]:
    """A row a case, in the order they were given.

    Policies are compared, on the same backend and in the same dtype, with that of most keys and values; and
    all with ONNX Runtime in float32 under the same policy, where that was timed too.
    """
    made = []
    for one in measured:
        alike = [other for other in measured if other.case.way == one.case.way]
        against = max(alike, key=lambda other: other.bundle.plan.kv_bytes())
        same = [other for other in measured if other.policy == one.policy and other.case.way == REFERENCE]
        over = _ratios(one, same[0])[0] if same else None
        row = _row(one, against, decode_seconds(alike))
        made.append(row | {"speedup_over_onnxruntime_float32": over})
    return made


def machine(threads: int | None) -> dict[str, Any]:
    """Where it was measured. `threads` None: as many as `cpu_threads` says."""
    import onnxruntime

    chosen = chosen_threads(threads)
    return {
        "processor": processor_name(),
        "cores": cpu_threads().number,
        "threads": chosen.number,
        "threads_because": chosen.because,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def title_of(result: Mapping[str, Any], *, resolution: bool = True) -> str:
    """What was timed, and where."""
    where, layers = result["machine"], result["layers"]
    at = f", {result['geometry']}" if resolution else ""
    return (
        f"{result['model']}, {layers} layer{'s'[: layers > 1]}{at}, {result['backend']},"
        f" {where['threads']} thread{'s'[: where['threads'] > 1]}"
        f" of {where['processor']} ({where['threads_because']})"
    )


def results_table(result: Mapping[str, Any]) -> Table:
    """The rows of a report for people."""
    title = f"{title_of(result)}: a pass, median of {result['rounds']} rounds (least to most)"
    ways = {(row["backend"], row["dtype"]) for row in result["rows"]}
    columns = (WAYS_SHOWN if len(ways) > 1 else {}) | SHOWN
    return printable(
        title, list(columns), ([show(row) for show in columns.values()] for row in result["rows"])
    )


REFERENCE = ("onnxruntime", "float32")
"""Backend and dtype that the others are compared with."""

SHOWN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "policy": lambda row: row["policy"],
    "s/pass": lambda row: f"{row['seconds']:.3g} ({row['seconds_least']:.3g} to {row['seconds_most']:.3g})",
    "speed-up": lambda row: f"{row['speedup']:.2f} ({row['speedup_least']:.2f} to {row['speedup_most']:.2f})",
    "undisturbed": lambda row: f"{row['speedup_undisturbed']:.2f}",
    "FLOP limit": lambda row: f"{row['flop_limit']:.2f}",
    "share": lambda row: f"{row['share_of_limit']:.2f}",
    "with decoding": lambda row: f"{row['speedup_with_decoding']:.2f}" if row["seconds_to_decode"] else "-",
    "KV read": lambda row: f"{row['kv_bytes'] / 1e6:.1f} MB",
    "KV held": lambda row: f"{row['cache_bytes'] / 1e6:.1f} MB",
    "memory": lambda row: f"{row['grown_bytes'] / 1e6:.0f} MB",
    "GFLOP/s": lambda row: f"{row['gflops']:.0f}",
}
"""The columns of the table for people."""

WAYS_SHOWN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "backend": lambda row: row["backend"],
    "dtype": lambda row: row["dtype"],
    "over ORT float32": lambda row: _or_dash(row["speedup_over_onnxruntime_float32"]),
}
"""Further columns where there are several backends or dtypes."""


def _or_dash(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _ratios(one: BenchTurns, against: BenchTurns) -> tuple[float, list[float]]:
    """How many times as fast a case was as another in the same round: the median over rounds, and all."""
    pairs = zip(one.turns, against.turns, strict=True)
    ratios = [other.pass_seconds / own.pass_seconds for own, other in pairs]
    return statistics.median(ratios), ratios


def _row(one: BenchTurns, against: BenchTurns, decoding: float | None) -> BenchRow:
    plan = one.bundle.plan
    flops, most = (pass_flops(m.bundle.plan).total for m in (one, against))
    taken, taken_against = ([turn.pass_seconds for turn in m.turns] for m in (one, against))
    speedup, ratios = _ratios(one, against)
    limit, with_decoding = most / flops, None
    if decoding is not None:
        with_decoding = (against.chunk_seconds + decoding) / (one.chunk_seconds + decoding)
    return {
        "backend": one.case.backend,
        "dtype": one.case.dtype,
        "policy": one.policy,
        # A denoising pass, and the baseline's through this policy's of the same round: medians over rounds.
        "seconds": one.pass_seconds,
        "seconds_least": min(taken),
        "seconds_most": max(taken),
        "speedup": speedup,
        "speedup_least": min(ratios),
        "speedup_most": max(ratios),
        # What comes nearest to an idle machine, where other work disturbed some of the turns.
        "speedup_undisturbed": min(taken_against) / min(taken),
        # The speed-up if all operations took equal time; the share of it is above 1 where those that are
        # saved are slower than the others.
        "flop_limit": limit,
        "share_of_limit": speedup / limit,
        # What attention reads, current chunk included; what buffers hold: the sink once, the rest twice, no
        # current chunk.
        "kv_bytes": plan.kv_bytes(),
        "cache_bytes": one.turns[-1].cache_bytes,
        # What the session was expected to take, decoding included, without activations where they are not
        # known; and by how much the process grew at most, without decoding.
        "needed_bytes": sum(footprint(one.bundle.manifest, plan).values()),
        "grown_bytes": max(turn.grown_bytes for turn in one.turns),
        "gflops": flops / one.pass_seconds / 1e9,
        # Of a whole chunk: all its passes, of one without steps of its own.
        "seconds_per_chunk": one.chunk_seconds,
        "seconds_to_decode": decoding,
        "speedup_with_decoding": with_decoding,
    }
