"""What a session holds in memory, part by part: for reports, and for a check before loading.

Nothing is measured: what builders reported of engines, the shapes of the manifest and what the cache plan
derives are added up. The sum is a lower bound: CUDA's own context, the code of kernels and what an allocator
rounds up are said nowhere before an engine is loaded. `DEVICE_RESERVE` stands for them where it matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias

from forcingkv.runtime.bundle import GRAPHS, Manifest, TensorRecord
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.engines import EngineRecord
from forcingkv.runtime.graph_records import (
    ALL_GRAPHS,
    FEATURES,
    FIRST,
    GIVEN_FRAMES,
    STREAMING,
    STRIP,
    latent_shape,
)
from forcingkv.runtime.kv.joined import DECODED
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.rebuild import encodings, most_encoded, rows_of
from forcingkv.runtime.kv.roles import Role
from forcingkv.runtime.spec import ENCODED, Dtype
from forcingkv.runtime.strip_decoder import StripRecords

DEVICE_RESERVE = 700_000_000
"""Bytes that a process takes of a GPU besides what `footprint` counts, about: CUDA's context takes 300 to
600 MB, then come kernels, what TensorRT keeps for each context, and CUDA graphs. Not measured here."""
EngineSet: TypeAlias = tuple[EngineRecord, ...]
"""The engines that one TensorRT runs on one kind of GPU, in the order of `ALL_GRAPHS`."""


def part_notes(
    plan: CachePlan | None = None, *, joined: bool = False, strips: bool = False
) -> dict[str, str]:
    """The parts of a session's memory, and why each has its size; `joined`: on the backend torch; `strips`:
    of a bundle that decodes frames in strips.

    Without a plan what is said of a role is what holds of it in most models.

    weights, activations: from the builder's log of engines; of graphs on ONNX Runtime as export derived them
        (`export/activations.py`); of torch as they are stored, and as `torch_activations` estimates and
        export found of decoding and encoding (`export/live_memory.py`). Engines of `prompt` and `step` run
        one after another in one block of activation memory, `decode` and `encode` in another; ONNX Runtime
        gives it back after each graph. The keys and values of the current chunk are among them, a layer at a
        time.
    kv_...: a part for each role, from the cache plan: its buffers are as large as it ever needs. torch has
        one of each, and writes the chunk's own behind them.
    decoder_caches: the inputs that decoding carries from call to call, and where a frame is decoded in strips
        what is handed from one to the other.
    encoder_caches: those that `encode` does, in bundles that have it.
    frames: those of all calls of `decode` for a chunk, and of a call of `encode`.
    text: the inputs and outputs of `prompt`; the latter are inputs of `step`.
    latents: all else that goes into `step` and `decode`, and the next latents.
    recache: inputs of the pass that encodes newest frames anew, at a switch of the prompt or (a model that
        recomputes its context) before each chunk, and what that pass
        takes beyond the others; where sessions take it when they open (`has_recache`). On a CPU the graph
        reads the weights where their file is mapped: pages that the system takes back.
    """
    buffers = {1: "one buffer: written once", 2: "two buffers: read and written in turn"}
    roles = {name: buffers[1 if joined else role.buffers] for name, role in Role.KINDS.items()}
    if plan:
        for kind, role in {(group, role) for group in plan.groups for role in group.roles}:
            if role.buffers == 1 and len(role.buffer_tokens(plan, kind)) > 1:
                roles[role.name] = "two buffers: it is collected over the first chunks"
    if joined:
        roles = dict.fromkeys(roles, "read and written in place") | {"current": "of the chunk itself"}
    if joined and plan and any(group.coded for group in plan.groups):
        roles[DECODED] = "of all roles as they are attended to, a layer at a time"
    of_decoder = "of each strip one buffer, and one that all share" if strips else buffers[2]
    return {
        "weights": "of all graphs: they stay loaded",
        "activations": "of a pass, and of decoding beside it",
        **{f"kv_{name}": note for name, note in roles.items()},
        "decoder_caches": "read and written in place" if joined else of_decoder,
        "frames": "of a chunk, or of two if they overlap",
        "text": "of the prompt, with its keys and values",
        "latents": "with noise, positions and noise levels",
        **(_OF_SOME if plan else {}),
    }


_OF_SOME = {
    "encoder_caches": "two buffers: read and written in turn",
    "recache": "of encoding newest frames anew",
}
"""Notes on parts that some bundles have."""


def engine_sets(manifest: Manifest) -> list[EngineSet]:
    """The engines of a bundle by flavour, version and GPU."""

    def runs_on(engine: EngineRecord) -> tuple[str, str, int]:
        return engine.flavour, engine.version, engine.sm

    in_order = sorted(manifest.engines, key=lambda e: (*runs_on(e), (*ALL_GRAPHS, e.graph).index(e.graph)))
    return [tuple(engines) for _, engines in groupby(in_order, runs_on)]


def grouped_by_need(sets: Iterable[EngineSet]) -> list[list[EngineSet]]:
    """The sets grouped by the memory that they need: one report serves a group."""
    groups: dict[tuple[tuple[str, int, int], ...], list[EngineSet]] = {}
    for one in sets:
        needs = tuple((e.graph, e.weight_bytes, e.activation_bytes) for e in one)
        groups.setdefault(needs, []).append(one)
    return list(groups.values())


def named(sets: Iterable[EngineSet]) -> str:
    """What sets are for, in words: tensorrt-rtx 1.7.1 for sm_89, sm_120."""
    sms: dict[str, list[str]] = {}
    for first, *_ in sets:
        sms.setdefault(f"{first.flavour} {first.version}", []).append(f"sm_{first.sm}")
    return "; ".join(f"{made} for {', '.join(of)}" for made, of in sms.items())


def footprint(
    manifest: Manifest,
    plan: CachePlan,
    engines: Sequence[EngineRecord] = (),
    *,
    on_cpu: bool = True,
) -> dict[str, int]:
    """Bytes of memory that a session on those engines holds, by part (see `part_notes`).

    Without engines it is a session on ONNX Runtime, and without graphs one on torch; `on_cpu` says where that
    one runs. Of graphs that ONNX Runtime does not run `weights` and `activations` are not known then, and
    left out.
    """
    parts: dict[str, int] = {}
    joined = not manifest.has_graphs
    if engines:
        parts["weights"] = sum(engine.weight_bytes for engine in engines)
        needs = {engine.graph: engine.activation_bytes for engine in engines}
        streaming = max(needs.pop(graph, 0) for graph in STREAMING)
        parts["activations"] = max(needs.values(), default=0) + streaming
    else:
        graphs = [manifest.graphs[name] for name in (*GRAPHS, STRIP, "encode") if name in manifest.graphs]
        weights = [graph.weight_bytes for graph in graphs]
        activations = [graph.activation_bytes for graph in graphs]
        if joined:
            activations = [torch_activations(plan, manifest.compute), *_torch_streaming(manifest, on_cpu)]
        if None not in weights and None not in activations:
            parts["weights"] = sum(size or 0 for size in weights)
            parts["activations"] = max(size or 0 for size in activations)
    parts |= kv_parts(plan, manifest.compute, joined=joined)
    prompt, step, decode = (manifest.graphs[name] for name in GRAPHS)
    calls, strips = plan.spec.frames_per_chunk // decode.inputs["latents"].shape[2], manifest.strips
    parts["decoder_caches"] = (1 if joined else 2) * _bytes(decode.carried)
    if strips:
        parts["decoder_caches"] = StripRecords(manifest.graphs).nbytes(strips, in_place=joined)
        features = decode.outputs[FEATURES]
        parts["decoder_caches"] += _bytes({FEATURES: features}) // features.shape[0] * strips.feature_rows
        shown = manifest.graphs[STRIP].outputs["frames"]
        parts["frames"] = _bytes({"frames": shown})
        decoded = shown.shape[0] * math.prod(manifest.frame_size) * shown.shape[3]
    else:
        parts["frames"], decoded = 0, _bytes(decode.outputs, ["frames"])
    parts["frames"] += calls * (2 if engines else 1) * decoded
    parts["text"] = _bytes(prompt.inputs) + _bytes(prompt.outputs)
    counted = {entry.name for entry in plan.entries} | set(prompt.outputs)
    # The inputs that vary by phase are as long as in the phase where they are longest.
    rows = [plan.rows(phase.first_chunk) for phase in plan.phases]
    longest = {name: max((one[name].shape for one in rows), key=math.prod) for name in rows[0]}
    parts["latents"] = _bytes(step.inputs, step.inputs.keys() - counted, longest)
    parts["latents"] += _bytes(step.outputs, ["next_latents"])
    parts["latents"] += _bytes(decode.inputs, decode.inputs.keys() - decode.carried.keys())
    if encode := manifest.graphs.get("encode"):
        parts["encoder_caches"] = 2 * _bytes(encode.carried)
        parts["frames"] += _bytes(encode.inputs, [GIVEN_FRAMES])
        parts["latents"] += _bytes(encode.outputs, ["latents"]) + 2 * _bytes(encode.inputs, [FIRST])
    if not engines and has_recache(manifest, plan):
        taken = torch_activations(plan, manifest.compute, encoding=True)
        if "recache" in manifest.graphs:
            taken = manifest.graphs["recache"].activation_bytes or 0
        parts["recache"] = encoder_bytes(plan) + max(0, taken - parts.get("activations", 0))
    return parts


def has_recache(manifest: Manifest, plan: CachePlan) -> bool:
    """Whether a session takes the memory for encoding newest frames anew when it opens: where a graph of the
    bundle does that, and on torch, which needs none, where it is the model's own way."""
    asked = plan.recomputes or plan.spec.recache in ENCODED
    own = not manifest.has_graphs and asked and bool(encodings(plan))
    return "recache" in manifest.graphs or own


def encoder_bytes(plan: CachePlan) -> int:
    """Bytes of the inputs of a pass that encodes newest frames (`newest_frames.RecachePass`)."""
    spec, frames, wide = plan.spec, most_encoded(plan), DTYPES["float32"].bytes
    numbers = math.prod(latent_shape(plan, frames)) + frames * plan.frame_tokens * spec.head_dim
    numbers += spec.time_width + (2 * spec.head_dim if plan.relative else 0)
    rows = sum(made.nbytes for one in encodings(plan) for made in rows_of(plan, one).values())
    return wide * numbers + rows


def kv_parts(plan: CachePlan, compute: Dtype, *, joined: bool = False) -> dict[str, int]:
    """Bytes of cached keys and values by role, as `footprint` has them; `joined`: on the backend torch."""
    sizes = plan.joined_bytes_by_role(compute) if joined else plan.buffer_bytes_by_role(compute)
    return {f"kv_{role}": size for role, size in sizes.items()}


def torch_activations(plan: CachePlan, compute: Dtype, *, encoding: bool = False) -> int:
    """Estimate of what a pass of torch needs beside weights, caches, inputs and outputs, in bytes.

    With `encoding` it is the pass that encodes most newest frames anew, which joins the keys and values of a
    layer with those of the sink.

    In a block's feed-forward: the hidden tensor before and after its activation, the residual stream, the
    input and the result; beside them two of the width in float32, which norms compute in. Attention is
    fused: its scores are nowhere, and it reads the cache where it lies.
    """
    spec, tokens, seen = plan.spec, plan.chunk_tokens, 0
    size, wide = DTYPES[compute].bytes, DTYPES["float32"].bytes
    if encoding:
        tokens = most_encoded(plan) * plan.frame_tokens
        seen = tokens + plan.frame_tokens * max(group.opening_frames(spec) for group in plan.groups)
    layer = tokens * (size * (2 * spec.ffn_width + 3 * spec.dim) + 2 * wide * spec.dim)
    return layer + 2 * size * spec.dim * seen


def _torch_streaming(manifest: Manifest, on_cpu: bool) -> Iterator[int]:
    """What torch needs beside all else in a call of each graph that decodes or encodes. On a CPU it computes
    those in float32 whatever the model computes in, from copies of the caches."""
    wide, size = DTYPES["float32"].bytes, DTYPES[manifest.compute].bytes
    for graph in (manifest.graphs[name] for name in STREAMING if name in manifest.graphs):
        copied = _bytes(graph.carried) * wide // size if on_cpu and size < wide else 0
        yield (graph.torch_bytes or 0) * (wide if on_cpu else size) // wide + copied


def readable(size: int) -> str:
    """A number of bytes to three digits: 6.02 GB, 118 MB, 4 B. Units are powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        value = size / scale
        if value >= 0.9995:
            digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
            return f"{value:.{digits}f} {unit}"
    return f"{size} B"


def _bytes(
    records: Mapping[str, TensorRecord], names: Iterable[str] | None = None, shapes: Mapping[str, Any] = {}
) -> int:
    """Of the named tensors (None: all), which have other shapes than recorded where `shapes` says so."""
    chosen = {name: records[name] for name in (records if names is None else names)}
    numbers = {name: math.prod(shapes.get(name, record.shape)) for name, record in chosen.items()}
    return sum(numbers[name] * DTYPES[record.dtype].bytes for name, record in chosen.items())
