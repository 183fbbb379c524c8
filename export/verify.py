"""Verification: the graphs of a bundle against torch, on the same inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from forcingkv.export.graphs import Graph
from forcingkv.runtime.backends.onnxruntime import OnnxRuntimeBackend
from forcingkv.runtime.plan import CachePlan

__all__ = ["graph_difference"]

Array = npt.NDArray[np.float32]
SEED = 0
HOST_INPUTS = {"sigma", "sigma_next", "time", "cosines", "sines"}


def graph_difference(graph: Graph, path: Path, plan: CachePlan) -> float:
    """Largest absolute difference of any output, in every phase, for random contents.

    ONNX Runtime runs the file at `path`; torch runs the graph's module. Inputs that the host computes
    (positions, times, noise levels) are the graph's examples: random ones would not be angles.
    """
    runnable = OnnxRuntimeBackend(None).load(path)
    generator = np.random.default_rng(SEED)
    phases = plan.phases if graph.dynamic else plan.phases[-1:]
    worst = 0.0
    for phase in phases:
        shapes = {name: list(tensor.shape) for name, tensor in graph.inputs.items()}
        for entry in plan.entries:
            if entry.name in shapes:
                shapes[entry.name][2] = phase.length(entry.group.label, entry.role)
        inputs = {
            name: tensor.numpy()
            if name in HOST_INPUTS
            else generator.standard_normal(shapes[name], dtype=np.float32)
            for name, tensor in graph.inputs.items()
        }
        with torch.no_grad():
            out = graph.module({name: torch.from_numpy(array) for name, array in inputs.items()})
        tensors = out if isinstance(out, tuple) else (out,)
        expected = {n: t.numpy() for n, t in zip(graph.outputs, tensors, strict=True)}
        found = {name: np.empty_like(array, order="C") for name, array in expected.items()}
        runnable.run(inputs, found)
        for name, array in expected.items():
            difference = np.abs(array.astype(np.float64) - found[name].astype(np.float64))
            worst = max(worst, float(difference.max(initial=0.0)))
    return worst
