"""A pass in ONNX Runtime against torch, eagerly: the same graph, the same shapes, as many threads.

    python benchmarks/step_against_torch.py [--geometry 480p] [--layers 1] [--policies full,forcing-kv]

Typical layers of `self-forcing` with random weights, in float32, in the last phase. Both take turns in one
process. A turn of ONNX Runtime is a clean pass of a session, which makes all outputs, as torch does;
denoising passes make no next caches and are shorter. Prints JSON: medians over rounds, the ratio of each
round's times, and the least and most of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from forcingkv.export.graphs import step_graph
from forcingkv.measure.bench.cases import preset_cases
from forcingkv.measure.bench.results import machine
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import WanModel
from forcingkv.runtime import Bundle, Session
from forcingkv.runtime.kv.plan import CachePlan

PASSES = 3
"""Of each in a round; the first of a round is not counted."""


class TorchStep:
    """The graph that export traces, with random weights and empty caches."""

    def __init__(self, plan: CachePlan) -> None:
        model = WanModel(plan.spec).float().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        graph = step_graph(model, plan)
        rows = set(plan.rows(0))  # none: the sink is made by the first chunk
        self._run = graph.run
        self._inputs = {name: tensor[:0] if name in rows else tensor for name, tensor in graph.inputs.items()}

    def seconds(self) -> float:
        """Of a pass."""
        started = time.perf_counter()
        with torch.inference_mode():
            self._run(self._inputs)
        return time.perf_counter() - started


def compare(bundle: Bundle, rounds: int, threads: int) -> dict[str, Any]:
    """Both in turn."""
    plan = bundle.plan
    eager = TorchStep(plan)
    taken: dict[str, list[float]] = {"onnxruntime": [], "torch": []}
    with Session.open(bundle, threads=threads) as session:
        timer = session.pass_timer(plan.phases[-1].first_chunk)
        for number in range(rounds):
            for name, run in (("onnxruntime", timer.clean), ("torch", eager.seconds)):
                passes = [run() for _ in range(PASSES)][1:]
                taken[name].append(statistics.median(passes))
            print(f"{plan.policy.name} {number + 1}/{rounds}", file=sys.stderr, flush=True)
    ratios = [ours / theirs for ours, theirs in zip(*taken.values(), strict=True)]
    return {
        "policy": plan.policy.name,
        **{f"{name}_seconds": round(statistics.median(seconds), 4) for name, seconds in taken.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--geometry", default="480p")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--policies", default="full,forcing-kv")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    spec = load_spec("self-forcing")
    with preset_cases(
        spec, given.policies.split(","), layers=given.layers, resolution=given.geometry
    ) as cases:
        rows = [compare(case.bundle, given.rounds, given.threads) for case in cases]
    print(json.dumps({"machine": machine(given.threads), "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
