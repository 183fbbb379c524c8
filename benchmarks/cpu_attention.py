"""Ways to write attention for ONNX Runtime on a CPU: time, and memory beyond inputs and outputs.

    python benchmarks/cpu_attention.py [--shape QUERIES KEYS HEADS HEAD_DIM]... [--only NAME]... [--rounds N]
    python benchmarks/cpu_attention.py --bundle FOLDER [--graph step] [--phase -1] [--rounds N]

Each way joins a cache with the keys and values of the current queries, as a bundle's graphs do, and attends.
Every way and shape runs in a process of its own, the ways in turn, `--rounds` times; the median is printed,
and the largest difference to the standard operator where that was run. Prints a table in Markdown.

With `--bundle` a graph of a bundle for ONNX Runtime runs instead, with several options of a session: what it
takes beyond the caller's arrays, beside what its manifest says.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import parser

from forcingkv.runtime import Bundle
from forcingkv.runtime.bundle import CLEAN

Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [(288, 2016, 4, 32), (1560, 7800, 12, 128), (4680, 32760, 12, 128)]
BLOCK = 512
"""Queries of a block, for the ways that go over blocks of queries."""


def standard(queries: int, keys: int, heads: int, width: int) -> str:
    """The operator of the standard."""
    return "out = Attention(q, k, v)"


def heads_as_batch(queries: int, keys: int, heads: int, width: int) -> str:
    """MultiHeadAttention of one head, with the heads in the place of the batch: no transposition."""
    return f"""
        flat = Constant <value_ints = [{heads}, -1, {width}]> ()
        whole = Constant <value_ints = [1, {heads}, -1, {width}]> ()
        q3 = Reshape (q, flat)   k3 = Reshape (k, flat)   v3 = Reshape (v, flat)
        o3 = com.microsoft.MultiHeadAttention <num_heads = 1> (q3, k3, v3)
        out = Reshape (o3, whole)"""


def transposed(queries: int, keys: int, heads: int, width: int) -> str:
    """MultiHeadAttention as it is documented: (batch, tokens, heads x head_dim)."""
    return f"""
        flat = Constant <value_ints = [1, -1, {heads * width}]> ()
        whole = Constant <value_ints = [1, -1, {heads}, {width}]> ()
        qt = Transpose <perm = [0, 2, 1, 3]> (q)   q3 = Reshape (qt, flat)
        kt = Transpose <perm = [0, 2, 1, 3]> (k)   k3 = Reshape (kt, flat)
        vt = Transpose <perm = [0, 2, 1, 3]> (v)   v3 = Reshape (vt, flat)
        o3 = com.microsoft.MultiHeadAttention <num_heads = {heads}> (q3, k3, v3)
        o4 = Reshape (o3, whole)
        out = Transpose <perm = [0, 2, 1, 3]> (o4)"""


def keys_of_rank_4(queries: int, keys: int, heads: int, width: int) -> str:
    """MultiHeadAttention with keys and values as (batch, heads, tokens, head_dim)."""
    return f"""
        flat = Constant <value_ints = [1, -1, {heads * width}]> ()
        whole = Constant <value_ints = [1, -1, {heads}, {width}]> ()
        qt = Transpose <perm = [0, 2, 1, 3]> (q)   q3 = Reshape (qt, flat)
        o3 = com.microsoft.MultiHeadAttention <num_heads = {heads}> (q3, k, v)
        o4 = Reshape (o3, whole)
        out = Transpose <perm = [0, 2, 1, 3]> (o4)"""


def head_by_head(queries: int, keys: int, heads: int, width: int) -> str:
    """MultiHeadAttention for each head, of parts of the joined keys and values."""
    names = {part: ", ".join(f"{part}{n}" for n in range(heads)) for part in "qkvo"}
    each = "\n".join(
        f"q3{n} = Squeeze (q{n}, zero)  k3{n} = Squeeze (k{n}, zero)  v3{n} = Squeeze (v{n}, zero)\n"
        f"o3{n} = com.microsoft.MultiHeadAttention <num_heads = 1> (q3{n}, k3{n}, v3{n})\n"
        f"o{n} = Unsqueeze (o3{n}, zero)"
        for n in range(heads)
    )
    return f"""
        zero = Constant <value_ints = [0]> ()
        {names["q"]} = Split <axis = 1, num_outputs = {heads}> (q)
        {names["k"]} = Split <axis = 1, num_outputs = {heads}> (k)
        {names["v"]} = Split <axis = 1, num_outputs = {heads}> (v)
        {each}
        out = Concat <axis = 1> ({names["o"]})"""


def grouped(queries: int, keys: int, heads: int, width: int) -> str:
    """GroupQueryAttention without a causal mask, with the heads in the place of the batch."""
    return f"""
        flat = Constant <value_ints = [{heads}, -1, {width}]> ()
        whole = Constant <value_ints = [1, {heads}, -1, {width}]> ()
        q3 = Reshape (q, flat)   k3 = Reshape (k, flat)   v3 = Reshape (v, flat)
        batch = Constant <value_ints = [{heads}]> ()
        last = Constant <value = int32[1] {{{keys - 1}}}> ()
        lengths = Expand (last, batch)
        total = Constant <value = int32[1] {{{keys}}}> ()
        o3, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1, causal = 0>
            (q3, k3, v3, , , lengths, total)
        out = Reshape (o3, whole)"""


def query_blocks(queries: int, keys: int, heads: int, width: int) -> str:
    """The standard operator for each block of queries."""
    sizes = [min(BLOCK, queries - start) for start in range(0, queries, BLOCK)]
    parts = [", ".join(f"{part}{n}" for n in range(len(sizes))) for part in "qo"]
    each = "\n".join(f"o{n} = Attention(q{n}, k, v)" for n in range(len(sizes)))
    return f"""
        sizes = Constant <value_ints = {sizes}> ()
        {parts[0]} = Split <axis = 2> (q, sizes)
        {each}
        out = Concat <axis = 2> ({parts[1]})"""


WAYS: list[Callable[[int, int, int, int], str]] = [
    standard,
    heads_as_batch,
    transposed,
    keys_of_rank_4,
    head_by_head,
    grouped,
    query_blocks,
]


def model(way: Callable[[int, int, int, int], str], shape: Shape) -> onnx.ModelProto:
    """A graph of one attention over a cache and the current chunk."""
    queries, keys, heads, width = shape
    current = min(queries, keys)  # of the prompt there are fewer keys than queries, and no cache
    held, new, own = (
        f"float[1, {heads}, {tokens}, {width}]" for tokens in (keys - current, current, queries)
    )
    return parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'
        f"g ({own} q, {held} kc, {new} kn, {held} vc, {new} vn) => ({own} out) {{\n"
        "k = Concat <axis = 2> (kc, kn)   v = Concat <axis = 2> (vc, vn)\n"
        f"{way(*shape)}\n}}"
    )


def status(field: str) -> int:
    """Bytes that Linux says of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def child(name: str, shape: Shape, out: Path) -> None:
    """Run one way; print seconds, and the peak of memory beyond what was held before."""
    way = next(way for way in WAYS if way.__name__ == name)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    session = ort.InferenceSession(model(way, shape).SerializeToString(), options)
    generator = np.random.default_rng(0)
    binding = session.io_binding()
    arrays = []
    for value in session.get_inputs():
        array = generator.standard_normal(value.shape, dtype=np.float32)
        arrays.append(array)
        binding.bind_input(value.name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    found = np.zeros(session.get_outputs()[0].shape, np.float32)
    binding.bind_output("out", "cpu", 0, np.float32, found.shape, found.ctypes.data)
    before = status("VmRSS")
    times = []
    while not times or (sum(times) < 2 and len(times) < 50):
        began = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(time.perf_counter() - began)
    np.save(out, found[:, :, :: max(1, shape[0] // 64)])
    print(json.dumps({"seconds": statistics.median(times), "bytes": status("VmHWM") - before}))


PLAIN = {"enable_mem_reuse": False, "enable_mem_pattern": False}
EARLY = {"execution_order": ort.ExecutionOrder.PRIORITY_BASED}
OPTIONS: dict[str, dict[str, Any]] = {
    "ONNX Runtime's own": {},
    "by priority": EARLY,
    "by priority, no reuse, no pattern": EARLY | PLAIN,
    "the same without arena": EARLY | PLAIN | {"enable_cpu_mem_arena": False},
}


def bundle_child(name: str, folder: str, graph: str, phase: int, passes: int) -> None:
    """Run a graph on arrays of the caller's; print what loading and running took, and seconds of a pass."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for option, value in OPTIONS[name].items():
        setattr(options, option, value)
    bundle = Bundle.open(folder)
    record, plan = bundle.manifest.graphs[graph], bundle.plan
    before = status("VmRSS")
    session = ort.InferenceSession(str(bundle.graph(graph)), options)
    loaded = status("VmRSS") - before
    shapes = {name: tensor.shape for name, tensor in (record.inputs | record.outputs).items()}
    if graph == "step":
        chosen = plan.phases[phase]
        shapes |= plan.phase_shapes(chosen)
        last = chosen is plan.phases[-1]
        following = chosen.first_chunk if last else plan.phases[plan.phases.index(chosen) + 1].first_chunk
        for entry in plan.entries:
            batch, heads, tokens, width = plan.entry_shape(entry, following)
            if entry.role == "sink":
                tokens = plan.sink_tokens(entry.group.label, chosen.first_chunk)
            elif entry.role == "retained":  # chosen in every pass, whether the next phase sees them or not
                tokens = plan.segment_tokens * entry.group.retained_segments
            shapes[f"next.{entry.name}"] = batch, heads, tokens, width
            if entry.role == "retained":
                shapes["retained_indices"] = (entry.group.retained_segments,)
    binding = session.io_binding()
    arrays = []
    generator = np.random.default_rng(0)
    for names, bind in ((record.inputs, binding.bind_input), (record.outputs, binding.bind_output)):
        for tensor, described in names.items():
            kind = np.dtype(described.dtype)
            array = generator.standard_normal(shapes[tensor], np.float32).astype(kind)
            array = np.arange(array.size, dtype=kind) if tensor.startswith("sink_rows") else array
            array = np.ones(array.shape, kind) if tensor == CLEAN else array
            arrays.append(array)
            bind(tensor, "cpu", 0, kind, array.shape, array.ctypes.data)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    times = []
    usage = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(passes):
        began = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(time.perf_counter() - began)
    system = (resource.getrusage(resource.RUSAGE_SELF).ru_stime - usage.ru_stime) / passes
    held = {"loaded": loaded, "took": status("VmHWM") - before, "kept": status("VmRSS") - before}
    print(json.dumps(held | {"seconds": statistics.median(times), "system": system}))


def measure_bundle(folder: str, graph: str, phase: int, passes: int) -> None:
    """Print what is said, and a line for each set of options."""
    record = Bundle.open(folder).manifest.graphs[graph]
    said = [f"{(size or 0) / 1e6:.0f} MB" for size in (record.weight_bytes, record.activation_bytes)]
    print("| options | loaded | taken by a pass | kept after it | time | of it system |")
    print("|---|---|---|---|---|---|")
    print(f"| as the manifest says | {said[0]} | {said[1]} | | | |", flush=True)
    for name in OPTIONS:
        words = [sys.executable, __file__, "--bundle-child", name, folder, graph, str(phase), str(passes)]
        ran = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
        sizes = " | ".join(f"{ran[part] / 1e6:.0f} MB" for part in ("loaded", "took", "kept"))
        print(f"| {name} | {sizes} | {ran['seconds']:.3g} s | {ran['system']:.2g} s |", flush=True)


def measure(shape: Shape, ways: list[str], rounds: int, room: Path) -> None:
    """Print a line for each way; `room` is a folder for what they give."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    outputs = {name: room / f"{name}.npy" for name in ways}
    for _ in range(rounds):
        for name in ways:
            words = [sys.executable, __file__, "--child", name, *map(str, shape), str(outputs[name])]
            ran = subprocess.run(words, capture_output=True, text=True)
            if ran.returncode == 0:
                found[name].append(json.loads(ran.stdout))
            else:
                print(name, ran.returncode, ran.stderr[-300:], file=sys.stderr)
    for name, runs in found.items():
        if not runs:
            print(f"| {' x '.join(map(str, shape))} | {name} | does not run | | |")
            continue
        seconds = statistics.median(run["seconds"] for run in runs)
        most = max(run["bytes"] for run in runs)
        exact = outputs.get("standard")
        difference = (
            f"{np.abs(np.load(outputs[name]) - np.load(exact)).max():.1e}" if exact and exact.exists() else ""
        )
        told = (
            f"{' x '.join(map(str, shape))} | {name} | {seconds:.4g} s | {most / 1e6:.0f} MB | {difference}"
        )
        print(f"| {told} |", flush=True)


def main() -> None:
    """Parse the arguments and measure."""
    if sys.argv[1:2] == ["--child"]:
        queries, keys, heads, width = map(int, sys.argv[3:7])
        return child(sys.argv[2], (queries, keys, heads, width), Path(sys.argv[7]))
    if sys.argv[1:2] == ["--bundle-child"]:
        name, folder, graph, phase, passes = sys.argv[2:7]
        return bundle_child(name, folder, graph, int(phase), int(passes))
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--shape", type=int, nargs=4, action="append")
    arguments.add_argument("--only", action="append")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--bundle")
    arguments.add_argument("--graph", default="step")
    arguments.add_argument("--phase", type=int, default=-1)
    given = arguments.parse_args()
    if given.bundle:
        return measure_bundle(given.bundle, given.graph, given.phase, given.rounds)
    names = given.only or [way.__name__ for way in WAYS]
    print("| queries x keys x heads x head_dim | way | time | memory | difference |\n|---|---|---|---|---|")
    for shape in given.shape or SHAPES:
        with tempfile.TemporaryDirectory() as room:
            measure(tuple(shape), names, given.rounds, Path(room))
    return None


if __name__ == "__main__":
    main()
