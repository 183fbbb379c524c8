"""Verification: the graphs of a bundle against torch, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from forcingkv.export.graphs import Graph
from forcingkv.runtime.backends.onnxruntime import OnnxGraph
from forcingkv.runtime.bundle import CLEAN, next_name
from forcingkv.runtime.faults import DeviceError
from forcingkv.runtime.graph_records import EDGE, GIVEN_FRAMES, TOP, TURN
from forcingkv.runtime.kv.codes import CODINGS, SCALES
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.rebuild import encoding_shapes, rows_of

Arrays = dict[str, npt.NDArray[Any]]
SEED = 0
FEATURES = (next_name("feature."), next_name(EDGE), "features")
"""How the outputs begin that are a decoder's caches, or go from one part of it to the other."""
SMALL = 1e-4
"""Where rounding changes less than that, differences are in units of that."""
LARGEST_CODE = 119
"""Of keys and values in fewer bits: what all of them have (`runtime.kv.codes`)."""
OTHER_CODES = 1e-3
"""Share of them that may be rounded the other way."""
HOST_INPUTS = {"sigma", "sigma_next", "time", "cosines", "sines", *TURN, TOP}


def graph_difference(graph: Graph, path: Path, plan: CachePlan) -> float:
    """Largest absolute difference of any output between the file in ONNX Runtime and torch, in every phase.

    Inputs are random but for those that the host computes (positions, times, noise levels), which are the
    graph's examples: random ones would not be angles. In the caches of a decoder or an encoder, and in the
    latents that this makes of them, the difference is relative to their largest value where that is above 1:
    such features have no scale of their own. Infinite where a denoising pass of the file gives other latents
    than the clean pass, or makes next caches.
    """
    runnable = OnnxGraph(path, folded=not graph.passes)
    worst = 0.0
    for inputs in _cases(graph, plan):
        expected = _torch(graph, inputs)
        found = {name: np.empty_like(array, order="C") for name, array in expected.items()}
        runnable.run(_given(graph, inputs), found)
        for name, array in expected.items():
            scaled = name.startswith(FEATURES) or (GIVEN_FRAMES in graph.inputs and name == "latents")
            worst = max(worst, _difference(array, found[name], scaled=scaled))
        if graph.clean_outputs and not _denoising_pass_is_equal(graph, runnable, inputs, found):
            return math.inf
    return worst


def quantized_differences(
    graph: Graph,
    path: Path,
    plan: CachePlan,
    without_rounding: Callable[[onnx.ModelProto], None],
    rounded: Callable[[], AbstractContextManager[None]],
) -> tuple[float, float]:
    """The difference of a step graph whose linear layers multiply in FP8 or int8, in two numbers.

    A sum in another order moves a few numbers across the boundary between two codes, which in FP8 are up to
    an eighth apart; each moves what follows, and after a few layers all roundings differ. So a difference of
    1e-7 ends at that of two independent roundings, and a bound on the outputs would show little. Instead:

    1. without the rounding of inputs the graph is compared as any other, by `graph_difference`;
    2. with it, x0 is compared by root mean square in units of what rounding changes. Independent roundings
       are at the square root of 2, and above 2 ONNX Runtime rounds more than torch does.

    The file at `path` rounds inputs until `without_rounding` has changed it; the graph in torch does so while
    what `rounded` returns is open.
    """
    exact = path.with_suffix(".exact.onnx")
    model = onnx.load(path, load_external_data=False)
    without_rounding(model)
    onnx.save_model(model, exact)
    difference = graph_difference(graph, exact, plan)
    exact.unlink()
    runnable = OnnxGraph(path)
    worst = 0.0
    for inputs in _cases(graph, plan):
        plain = _torch(graph, inputs)["x0"]
        with rounded():
            expected = _torch(graph, inputs)["x0"]
        found = np.empty_like(expected, order="C")
        runnable.run(_given(graph, inputs), {"x0": found})
        worst = max(worst, _size(found - expected) / max(_size(expected - plain), SMALL))
    return difference, worst


def _given(graph: Graph, inputs: Arrays, *, clean: bool = True) -> Arrays:
    """The inputs of the file, which unlike the torch module has one for whether the pass is the clean one."""
    return inputs | ({CLEAN: np.array([clean])} if graph.clean_outputs else {})


def _denoising_pass_is_equal(graph: Graph, runnable: OnnxGraph, inputs: Arrays, of_clean: Arrays) -> bool:
    """Whether a denoising pass gives what the clean one does, to the bit, and no next caches.

    These get no room, and ONNX Runtime refuses to write more than there is room for.
    """
    skipped = {name for group in graph.clean_outputs for name in group}
    found = {}
    for name, array in of_clean.items():
        empty = array[..., :0, :] if array.ndim > 1 else array[:0]  # of tokens
        found[name] = np.empty_like(empty if name in skipped else array)
    try:
        runnable.run(_given(graph, inputs, clean=False), found)
    except DeviceError:
        return False
    return all(np.array_equal(of_clean[name], found[name]) for name in found if name not in skipped)


def _cases(graph: Graph, plan: CachePlan) -> Iterator[Arrays]:
    """Random inputs for each phase, in C order."""
    generator = np.random.default_rng(SEED)
    most = _most_of_codes(plan)
    for varying, rows in _phases(graph, plan):
        inputs = {}
        for name, example in graph.inputs.items():
            shape = varying.get(name, tuple(example.shape))
            if name in HOST_INPUTS:
                inputs[name] = example.numpy()[: shape[0]]  # positions: those of as many tokens
            elif example.dtype == torch.uint8:
                inputs[name] = generator.integers(0, 256, shape, np.uint8)
            elif example.dtype == torch.int8:
                inputs[name] = generator.integers(-LARGEST_CODE, LARGEST_CODE, shape, np.int8, endpoint=True)
            elif example.dtype == torch.int32:
                inputs[name] = rows.get(name, np.arange(shape[0], dtype=np.int32))
            else:
                inputs[name] = generator.standard_normal(shape, dtype=np.float32)
            if name in most:  # so that keys and values are of the size that they have where they are exact
                inputs[name] = np.abs(inputs[name]) / np.float32(most[name])
        yield inputs


def _most_of_codes(plan: CachePlan) -> dict[str, float]:
    """Names of the caches that are scales, and the largest number that each of their codes stands for."""
    coded = ((entry, entry.role.dtype) for entry in plan.entries if entry.part in SCALES)
    return {entry.name: CODINGS[dtype].most for entry, dtype in coded if dtype}


def _phases(graph: Graph, plan: CachePlan) -> Iterator[tuple[dict[str, tuple[int, ...]], Arrays]]:
    """The shapes that vary, and rows that roles take, of each phase or pass.

    The largest first: ONNX Runtime keeps what it allocated, and that serves the others too.
    """
    if graph.passes:
        for one in graph.passes:
            yield encoding_shapes(plan, one), dict(rows_of(plan, one))
        return
    for phase in plan.phases[::-1] if graph.dynamic else plan.phases[-1:]:
        yield plan.phase_shapes(phase), plan.rows(phase.first_chunk)


def _torch(graph: Graph, inputs: Arrays) -> Arrays:
    """The outputs of the graph in torch."""
    with torch.no_grad():
        tensors = graph.run({name: torch.from_numpy(array) for name, array in inputs.items()})
    return {name: tensor.numpy() for name, tensor in zip(graph.outputs, tensors, strict=True)}


def _size(array: npt.NDArray[Any]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def _difference(expected: npt.NDArray[Any], found: npt.NDArray[Any], *, scaled: bool) -> float:
    difference = float(np.abs(expected.astype(np.float64) - found.astype(np.float64)).max(initial=0.0))
    if expected.dtype == np.uint8:
        # A pixel between two levels may be rounded either way; what it is rounded from is compared too.
        return max(difference - 1, 0.0)
    if expected.dtype == np.int8:
        # So may what lies between two codes, of which there are many. The rest is far off, or right.
        others = np.count_nonzero(expected != found) - max(1, expected.size * OTHER_CODES)
        return max(others / max(1, expected.size), 0.0)
    return difference / max(1.0, float(np.abs(expected).max(initial=0.0))) if scaled else difference
