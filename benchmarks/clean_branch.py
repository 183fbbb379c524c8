"""What a denoising pass gains by not making next caches (docs/decisions/0018).

    python benchmarks/clean_branch.py
    python benchmarks/clean_branch.py --policy window --passes 300

The demo model is exported with branches and without, and one process loads both graphs, one thread each.
They run in random order, in the last phase; each run is timed after one of its own kind, since a graph that
follows another finds the processor's caches full of the other's weights. Medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from forcingkv.export import export_bundle, passes
from forcingkv.headmaps import HeadMap
from forcingkv.models.checkpoint import load_weights
from forcingkv.models.presets import load_spec
from forcingkv.runtime import Bundle
from forcingkv.runtime.backends.onnxruntime import HostTensor, OnnxGraph
from forcingkv.runtime.bundle import CLEAN
from forcingkv.runtime.policies import load_policy

Arrays = dict[str, npt.NDArray[Any]]
MAP = Path(__file__).parents[1] / "headmaps" / "maps" / "demo.json"


def export_both(policy: str, room: Path) -> tuple[Bundle, Bundle]:
    """The bundle as it is, and as it was before there were branches."""
    spec = load_spec("demo")
    weights, chosen = load_weights(spec), load_policy(policy)
    headmap = HeadMap.read(MAP) if chosen.needs_headmap else None
    export_bundle(spec, weights, chosen, room / "branched", headmap=headmap, verify=False)
    with mock.patch.object(passes, "branch_on_clean"):
        export_bundle(spec, weights, chosen, room / "plain", headmap=headmap, verify=False)
    return Bundle.open(room / "branched"), Bundle.open(room / "plain")


def arrays_of(bundle: Bundle) -> tuple[Arrays, Arrays]:
    """Random inputs without `clean`, and room for the outputs that a clean pass has."""
    plan, records = bundle.plan, bundle.manifest.graphs["step"]
    phase, generator = plan.phases[-1], np.random.default_rng(0)
    shapes = plan.phase_shapes(phase)
    inputs: Arrays = {
        name: np.arange(shapes[name][0], dtype=np.int32)
        if record.dtype == "int32"
        else generator.standard_normal(shapes.get(name, record.shape), dtype=np.float32)
        for name, record in records.inputs.items()
        if name != CLEAN
    }
    outputs: Arrays = {"next_latents": np.empty(records.outputs["next_latents"].shape, np.float32)}
    for entry in plan.entries:
        batch, heads, tokens, width = plan.entry_shape(entry, phase.first_chunk)
        size = (batch, heads, 0 if entry.role == "sink" else tokens, width)
        outputs[f"next.{entry.name}"] = np.empty(size, np.float32)
    return inputs, outputs


def measure(policy: str, passes: int, room: Path) -> None:
    """Print a line for a policy."""
    branched, plain = export_both(policy, room)
    inputs, outputs = arrays_of(plain)
    latents = {"next_latents": outputs["next_latents"]}
    empty = latents | {n: np.empty_like(a[:, :, :0]) for n, a in outputs.items() if n not in latents}
    old, new = (OnnxGraph(bundle.graph("step"), 1) for bundle in (plain, branched))
    denoising, clean = ({**inputs, CLEAN: np.array([told])} for told in (False, True))
    ways = {
        "before": (old, inputs, outputs),
        "denoising": (new, denoising, latents),
        "places of length 0": (new, denoising, empty),
        "clean": (new, clean, outputs),
    }
    bound = []
    for name, (graph, *arrays) in ways.items():
        given, taken = ({key: HostTensor(array) for key, array in each.items()} for each in arrays)
        bound.append((name, graph, graph.bind(given, taken)))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(passes):
        for name, graph, binding in random.sample(bound, len(bound)):
            graph.run_bound(binding)
            began = time.perf_counter()
            graph.run_bound(binding)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    before = medians.pop("before")
    shown = [f"{1e3 * median:.2f} ({median / before - 1:+.1%})" for median in medians.values()]
    print(f"| {policy} | {1e3 * before:.2f} ms | {' | '.join(shown)} |", flush=True)


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--policy", action="append", help="full, window and forcing-kv if not given")
    parser.add_argument("--passes", type=int, default=200)
    given = parser.parse_args()
    print("| | before | denoising pass | with places of length 0 | clean pass |\n|---|---|---|---|---|")
    for policy in given.policy or ["full", "window", "forcing-kv"]:
        with tempfile.TemporaryDirectory() as room:
            measure(policy, given.passes, Path(room))


if __name__ == "__main__":
    main()
