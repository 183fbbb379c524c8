"""Where the time of a pass goes, by operator, as ONNX Runtime's own profiler has it.

    python benchmarks/pass_profile.py [--geometry 480p] [--policies full,forcing-kv]

Typical layers of `self-forcing` with random weights, in the last phase. Prints a table in Markdown: seconds a
pass of each kind of operator, and its share; matrix products and attention with the rate they run at.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime as ort

from forcingkv.measure.bench.cases import Case, preset_cases
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Session
from forcingkv.runtime.backends import onnxruntime as backend
from forcingkv.runtime.cost import pass_flops
from forcingkv.runtime.memory import give_back

PASSES = 4
PRODUCTS, ATTENTION = "Gemm", "MultiHeadAttention"


def profiled(prefix: Path) -> type[Any]:
    """Options that make each graph write what it ran to a file of its own."""

    class Options(ort.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling = True
            self.profile_file_prefix = str(prefix)

    return Options


def events(case: Case, threads: int) -> list[dict[str, Any]]:
    """Kernels of the passes; those of the first, which takes memory, are left out."""
    with tempfile.TemporaryDirectory() as folder:
        plain, backend.ort.SessionOptions = ort.SessionOptions, profiled(Path(folder) / "ran")
        try:
            _run(case, threads)
        finally:
            backend.ort.SessionOptions = plain
        give_back()  # a graph writes its file when nothing holds it any more
        files = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    runs = max(files, key=len)
    kernels = [e for e in runs if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return kernels[len(kernels) // (PASSES + 1) :]


def _run(case: Case, threads: int) -> None:
    with Session.open(case.bundle, threads=threads) as session:
        rehearsal = session.rehearse(case.bundle.plan.phases[-1].first_chunk)
        for _ in range(PASSES + 1):
            rehearsal.denoise()


def table(case: Case, threads: int) -> str:
    """A row a kind of operator."""
    taken: Counter[str] = Counter()
    for event in events(case, threads):
        taken[event["args"]["op_name"]] += event["dur"] / 1e6 / PASSES
    flops, whole = pass_flops(case.bundle.plan), taken.total()
    rates = {PRODUCTS: flops.linear, ATTENTION: flops.attention + flops.cross}
    lines = [
        f"\n{case.name}: {whole:.2f} s\n",
        "| operator | seconds | share | GFLOP/s |",
        "|---|---|---|---|",
    ]
    for name, seconds in taken.most_common(12):
        rate = f"{rates[name] / seconds / 1e9:.0f}" if name in rates else ""
        lines.append(f"| {name} | {seconds:.3f} | {seconds / whole:.1%} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--geometry", default="480p")
    parser.add_argument("--policies", default="full,forcing-kv")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    spec = load_spec("self-forcing")
    with preset_cases(spec, given.policies.split(","), layers=1, resolution=given.geometry) as cases:
        for case in cases:
            print(table(case, given.threads))


if __name__ == "__main__":
    main()
