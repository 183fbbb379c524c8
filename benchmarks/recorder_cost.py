"""What recording costs: memory of its own, and time beside a layer of the model, at a real geometry.

    python benchmarks/recorder_cost.py
    python benchmarks/recorder_cost.py --resolution 720p --rows 512 --frames 21

Prints JSON. Memory: the peak that measuring adds to a process that already holds queries and keys, all
query rows measured, with `--frames` key frames and with twice as many, each in a process of its own. Time:
one layer of the model with random weights, attending to `--frames` frames, as one pass of generation, without
recording, with sampled rows, and with all rows; in turn (A B C A B C), medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from forcingkv.analyze.recorder import Recorder
from forcingkv.measure.process import resident
from forcingkv.models.checkpoint import build_model, random_weights
from forcingkv.models.kv import Cache, attend_cache
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import Attend, KeysValues
from forcingkv.runtime import positions
from forcingkv.runtime.kv.plan import CachePlan, HeadGroup, build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.kv.roles import Role


def own_memory(plan: CachePlan) -> int:
    """Bytes that recording all query rows of one layer adds at its peak, over what queries and keys take."""
    chunk = plan.phases[-1].first_chunk
    cache = random_cache(plan, chunk)
    shape = (1, plan.spec.heads, plan.chunk_tokens, plan.spec.head_dim)
    queries, current = torch.randn(shape), KeysValues(torch.randn(shape), torch.randn(shape))
    recorded = Recorder(plan, 0).watch(chunk, 0, cache, lambda layer, queries, current: queries)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmHWM")
    recorded(0, queries, current)
    return resident("VmHWM") - before


def random_cache(plan: CachePlan, chunk: int) -> Cache:
    """A cache of that chunk with random keys and values."""

    def entry(group: HeadGroup, role: Role) -> KeysValues:
        shape = (1, group.heads, plan.tokens(group, role, chunk), plan.spec.head_dim)
        return KeysValues(torch.randn(shape), torch.randn(shape))

    return [
        [{role.name: entry(group, role) for role in group.roles} for group in groups]
        for groups in plan.layers
    ]


def timed_layer(plan: CachePlan, rows: list[int | None], repeats: int) -> dict[str, float]:
    """Median seconds of a pass of one layer in the last phase, without recording and with."""
    spec = plan.spec
    model = build_model(spec, random_weights(spec))
    chunk = plan.phases[-1].first_chunk
    geometry = plan.geometry
    latents = torch.randn(
        1, spec.latent_channels, spec.frames_per_chunk, geometry.latent_height, geometry.latent_width
    )
    angles = positions.rotary(spec, geometry, chunk * spec.frames_per_chunk, spec.frames_per_chunk)
    rotary = (torch.from_numpy(angles[0]), torch.from_numpy(angles[1]))
    time_features = torch.zeros(1, 1, spec.time_width)
    prompt = model.prompt(torch.randn(1, spec.text_length, spec.text_width))
    cache = random_cache(plan, chunk)
    plain = attend_cache(plan, cache)

    def run(attend: Attend) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            model(latents, time_features, rotary, prompt, attend)
        return time.perf_counter() - started

    def recorded(count: int | None) -> float:
        return run(Recorder(plan, 0, rows=count).watch(chunk, 0, cache, plain))

    run(plain)
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        seconds.setdefault("without", []).append(run(plain))
        for count in rows:
            seconds.setdefault(f"{count} rows" if count else "all rows", []).append(recorded(count))
    return {name: statistics.median(found) for name, found in seconds.items()}


def plan_of(model: str, resolution: str, frames: int) -> CachePlan:
    """One layer of a model that attends to so many frames."""
    frames -= frames % (spec := load_spec(model)).frames_per_chunk
    spec = replace(spec, layers=1, attended_frames=frames)
    return build_plan(spec, spec.geometry(resolution), load_policy("full"))


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="self-forcing")
    parser.add_argument("--resolution", default="480p")
    parser.add_argument("--frames", type=int, default=21, help="latent frames attended to")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plan = plan_of(given.model, given.resolution, given.frames)
    if given.memory_only:
        print(own_memory(plan))
        return

    def measured(frames: int) -> int:
        words = [sys.executable, __file__, *sys.argv[1:], "--frames", str(frames), "--memory-only"]
        # With its defaults the allocator keeps what was freed, and what is measured depends on the past.
        exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        ran = subprocess.run(words, check=True, capture_output=True, text=True, env=os.environ | exact)
        return int(ran.stdout)

    memory = {frames: measured(frames) for frames in (given.frames, 2 * given.frames)}
    seconds = timed_layer(plan, [given.rows, None], given.repeats)
    result: dict[str, Any] = {
        "queries": plan.chunk_tokens,
        "heads": plan.spec.heads,
        "threads": given.threads,
        "own_memory_mb": {f"{n * plan.frame_tokens} keys": round(b / 1e6, 1) for n, b in memory.items()},
        "memory_ratio": round(memory[2 * given.frames] / memory[given.frames], 3),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "added": {
            name: round(value / seconds["without"] - 1, 4)
            for name, value in seconds.items()
            if name != "without"
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
