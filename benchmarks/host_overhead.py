"""What a pass costs beside the graph itself: noise, positions, copies, bindings, checks.

    python benchmarks/host_overhead.py --bundle bundle
    python benchmarks/host_overhead.py --bundle bundle --chunks 60 --threads 1 --json

For each chunk: the time of everything between asking for the chunk and having it, less the time that ONNX
Runtime is at work (`OnnxPass.run`), divided by the chunk's passes, decoding counted as one.
Medians over `--chunks` chunks in the last phase of the cache. A goal: at most 2% and less than 1 ms a pass.
Times of other programs count where they take the CPU from this one; `cpu_ms` is the host's own work on this
thread, which they do not touch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress

from forcingkv.runtime import Session
from forcingkv.runtime.backends.onnxruntime import OnnxPass


class Timed:
    """Adds up how long ONNX Runtime is at work, by the clock and by this thread's CPU time."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.runs = 0
        inner = OnnxPass.run

        def run(bound: OnnxPass) -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            inner(bound)
            self.wall += time.perf_counter() - wall
            self.cpu += time.thread_time() - cpu
            self.runs += 1

        OnnxPass.run = run  # type: ignore[method-assign]

    def take(self) -> tuple[float, float, int]:
        """What was added up since the last time."""
        taken = self.wall, self.cpu, self.runs
        self.wall, self.cpu, self.runs = 0.0, 0.0, 0
        return taken


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Generate, and compare each chunk's time with the time of its passes."""
    timed = Timed()
    overheads, cpus, shares, passes = [], [], [], []
    with (
        Session.open(given.bundle, threads=given.threads) as session,
        Progress(disable=not sys.stderr.isatty()) as shown,
    ):
        skipped = session.plan.phases[-1].first_chunk + 4
        video = session.generate(given.prompt, seed=0, chunks=skipped + given.chunks)
        task = shown.add_task("generating chunks", total=skipped + given.chunks)
        for index in range(skipped + given.chunks):
            timed.take()
            wall, cpu = time.perf_counter(), time.thread_time()
            next(video)
            wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
            inside, inside_cpu, runs = timed.take()
            if index >= skipped:
                overheads.append((wall - inside) / runs)
                cpus.append((cpu - inside_cpu) / runs)
                shares.append((wall - inside) / inside)
                passes.append(inside / runs)
            shown.update(task, completed=index + 1)
    milliseconds = {"overhead_ms": overheads, "cpu_ms": cpus, "pass_ms": passes}
    return {
        "chunks": given.chunks,
        "runs_a_chunk": runs,
        **{name: round(statistics.median(found) * 1e3, 4) for name, found in milliseconds.items()},
        "percent": round(statistics.median(shares) * 100, 2),
    }


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompt", default="a 3 moving left and a 7 moving up")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a sentence")
    given = parser.parse_args()
    found = measure(given)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{found['overhead_ms']} ms ({found['percent']}%) beside each pass of {found['pass_ms']} ms,"
        f" {found['cpu_ms']} ms of it this thread's own work; medians over {found['chunks']} chunks"
    )


if __name__ == "__main__":
    main()
