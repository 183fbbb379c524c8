"""Verification: the graphs of a bundle against torch, on the same inputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forcingkv.export.graphs import Graph
from forcingkv.headmaps.errors import InputError
from forcingkv.models.checkpoint import weight_shapes
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.runtime.backends.onnxruntime import OnnxRuntimeBackend
from forcingkv.runtime.memory import available_bytes
from forcingkv.runtime.plan import CachePlan

__all__ = ["check_memory", "graph_difference"]

Array = npt.NDArray[np.float32]
SEED = 0
PROGRAM_BYTES = 2e9
"""torch, ONNX Runtime and the exporter by themselves."""
FEATURES = "next.feature."
"""How the outputs begin that are a decoder's caches."""
HOST_INPUTS = {"sigma", "sigma_next", "time", "cosines", "sines"}


def check_memory(plan: CachePlan, decoder: StreamingDecoder | None = None) -> None:
    """Raise InputError unless a model fits into memory for verification, with what it needs by part.

    torch and ONNX Runtime each hold the weights in float32, and ONNX Runtime also as they are stored.
    The caches of the last phase are inputs and outputs of both, and each joins them with the current chunk.
    ONNX Runtime writes a layer's scores out. Measured with two layers of 1.3B width at 480P and TAEHV:
    14.4 GB where this says 15.9 (full), 7.1 where it says 6.8 (forcing-kv).
    """
    spec = plan.spec
    numbers = sum(math.prod(shape) for shape in weight_shapes(spec).values())
    keys = plan.kv_bytes() / (4 * 2 * spec.layers * spec.dim)  # of a head, on average
    parts = {
        "programs": PROGRAM_BYTES,
        "weights": 4 * 2.5 * numbers,
        "caches": 6.0 * plan.kv_bytes(),
        "attention scores": 4 * spec.heads * plan.chunk_tokens * keys,
    }
    if decoder:
        grid = plan.geometry.latent_height, plan.geometry.latent_width
        state = sum(math.prod(shape) for shape in decoder.state_shapes(*grid).values())
        parts["decoder caches"] = 4 * 4.0 * state
    needed, available = sum(parts.values()), available_bytes()
    if needed > available:
        told = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
        raise InputError(
            f"verifying {spec.name} at {plan.geometry.width}x{plan.geometry.height} needs about"
            f" {needed / 1e9:.1f} GB ({told}), and {available / 1e9:.1f} GB are available",
            where="memory",
            mend="Export with --no-verify, at a smaller resolution, or on a larger machine.",
        )


def graph_difference(graph: Graph, path: Path, plan: CachePlan) -> float:
    """Largest absolute difference of any output, in every phase, for random contents.

    In a decoder's caches it is relative to their largest value where that is above 1: such features have
    no scale of their own.

    ONNX Runtime runs the file at `path`; torch runs the graph's module. Inputs that the host computes
    (positions, times, noise levels) are the graph's examples: random ones would not be angles.
    """
    runnable = OnnxRuntimeBackend(None).load(path)
    generator = np.random.default_rng(SEED)
    # The last phase first: ONNX Runtime keeps what it allocated, and the largest serves the others too.
    phases = plan.phases[::-1] if graph.dynamic else plan.phases[-1:]
    worst = 0.0
    for phase in phases:
        varying = plan.phase_shapes(phase)
        inputs = {
            name: _content(name, tensor, varying.get(name, tuple(tensor.shape)), generator)
            for name, tensor in graph.inputs.items()
        }
        with torch.no_grad():
            out = graph.module({name: torch.from_numpy(array) for name, array in inputs.items()})
        tensors = out if isinstance(out, tuple) else (out,)
        expected = {n: t.numpy() for n, t in zip(graph.outputs, tensors, strict=True)}
        found = {name: np.empty_like(array, order="C") for name, array in expected.items()}
        runnable.run(inputs, found)
        for name, array in expected.items():
            worst = max(worst, _difference(array, found[name], scaled=name.startswith(FEATURES)))
    return worst


def _content(
    name: str, example: Tensor, shape: tuple[int, ...], generator: np.random.Generator
) -> npt.NDArray[Any]:
    if name in HOST_INPUTS:
        return example.numpy()
    if example.dtype == torch.int32:
        return np.arange(shape[0], dtype=np.int32)
    return generator.standard_normal(shape, dtype=np.float32)


def _difference(expected: npt.NDArray[Any], found: npt.NDArray[Any], *, scaled: bool) -> float:
    difference = float(np.abs(expected.astype(np.float64) - found.astype(np.float64)).max(initial=0.0))
    if expected.dtype == np.uint8:
        # A pixel between two levels may be rounded either way; what it is rounded from is compared too.
        return max(difference - 1, 0.0)
    return difference / max(1.0, float(np.abs(expected).max(initial=0.0))) if scaled else difference
