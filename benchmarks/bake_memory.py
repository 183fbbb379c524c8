"""Peak memory of baking against the number of layers: a stream's does not grow.

    python benchmarks/bake_memory.py --model krea-14b --layers 2 --layers 6 --onnx

For each number of layers a checkpoint of random bfloat16 weights is made, then baked in a process of its own,
whose peak resident memory is read; then it traces the graphs. With --onnx the smallest is loaded in ONNX
Runtime. Prints JSON. Needs disk for the checkpoint twice. Processes are forked, so not on Windows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from forcingkv.export.bake import bake_weights
from forcingkv.export.graphs import prompt_graph, step_graph
from forcingkv.export.onnx_writer import write_onnx
from forcingkv.export.precision import Precision
from forcingkv.headmaps import HeadMap, ModelIdentity, Rule
from forcingkv.models.checkpoint import load_weights, weight_shapes
from forcingkv.models.heads import head_orders
from forcingkv.models.presets import load_spec
from forcingkv.models.wan import WanModel
from forcingkv.runtime.backends.onnxruntime import OnnxGraph
from forcingkv.runtime.kv.plan import build_plan
from forcingkv.runtime.kv.policies import load_policy
from forcingkv.runtime.spec import ModelSpec
from forcingkv.runtime.tensors import new_tensors

CHECKPOINT, WEIGHTS, GRAPHS = "checkpoint.safetensors", "weights.safetensors", ("prompt", "step")


def make(spec: ModelSpec, folder: Path) -> None:
    """Write a checkpoint of small random numbers, tensor by tensor."""
    shapes = weight_shapes(spec)
    generator = np.random.default_rng(0)
    planned = {f"model.{name}": ("BF16", shape) for name, shape in shapes.items()}
    with new_tensors(folder / CHECKPOINT, planned) as writer:
        for name, (_, shape) in planned.items():
            # Upper halves of floats between 0.0078 and 0.031, of either sign.
            bits = generator.integers(0x3C00, 0x3D00, shape, np.uint16)
            writer.write(name, bits | generator.integers(0, 2, shape, np.uint16) << 15)


def bake(spec: ModelSpec, folder: Path, trace: bool) -> dict[str, Any]:
    """Bake a map with every second head static, and trace both graphs if asked to."""
    row = tuple("static" if head % 2 else "dynamic" for head in range(spec.heads))
    identity = ModelIdentity(spec.name, spec.layers, spec.heads)
    headmap = HeadMap(identity, (row,) * spec.layers, Rule("every second"))
    policy = load_policy("forcing-kv")
    plan = build_plan(spec, spec.geometry(), policy, headmap)
    started = time.perf_counter()
    weights = load_weights(spec, folder / CHECKPOINT)
    orders, precision = head_orders(spec, policy, headmap), Precision("float32", "bfloat16")
    stored = bake_weights(weights, spec, orders, folder / WEIGHTS, precision)
    seconds, peak = time.perf_counter() - started, peak_bytes()
    row = {
        "layers": spec.layers,
        "file_bytes": (folder / WEIGHTS).stat().st_size,
        "bake_seconds": round(seconds, 1),
        "bake_peak_bytes": peak,
    }
    if not trace:
        return row
    for name in GRAPHS:

        def graph(name: str = name) -> Any:
            model = WanModel(spec).eval().requires_grad_(False)
            return prompt_graph(model) if name == "prompt" else step_graph(model, plan)

        write_onnx(graph, folder / f"{name}.onnx", stored, WEIGHTS)
    onnx_bytes = sum((folder / f"{name}.onnx").stat().st_size for name in GRAPHS)
    return row | {"with_tracing_peak_bytes": peak_bytes(), "onnx_bytes": onnx_bytes}


def load(spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Open both graphs in ONNX Runtime."""
    started = time.perf_counter()
    graphs = [OnnxGraph(folder / f"{name}.onnx") for name in GRAPHS]
    seconds = round(time.perf_counter() - started, 1)
    return {"loaded_graphs": len(graphs), "loaded_seconds": seconds, "loaded_peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def apart(work: Callable[..., Any], *given: object) -> Any:
    """What a function returns that is called in a process of its own, forked with all modules loaded."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(work, *given).result()


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="krea-14b")
    parser.add_argument("--layers", type=int, action="append")
    parser.add_argument("--onnx", action="store_true", help="load the smallest in ONNX Runtime")
    parser.add_argument("--no-graphs", action="store_true", help="bake weights only, trace no graphs")
    given = parser.parse_args()
    counts = sorted(given.layers or [2, 6])
    rows = []
    for layers in counts:
        spec = dataclasses.replace(load_spec(given.model), layers=layers)
        with tempfile.TemporaryDirectory() as room:
            apart(make, spec, Path(room))
            row = apart(bake, spec, Path(room), not given.no_graphs)
            if given.onnx and layers == counts[0]:
                row |= apart(load, spec, Path(room))
        rows.append(row)
    growth = rows[-1]["bake_peak_bytes"] / rows[0]["bake_peak_bytes"]
    print(json.dumps({"model": given.model, "rows": rows, "peak_growth": round(growth, 3)}, indent=1))


if __name__ == "__main__":
    main()
