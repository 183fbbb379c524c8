"""FP8 (E4M3) for linear layers: how numbers are rounded, in torch and in a graph, and how scales are found.

A weight has a scale for each output channel, an input one scale for the tensor, found ahead of time. A number
x is stored as the E4M3 number nearest to x / scale, at most 448 (`codes`). Products are added up in more than
FP8, and the sum is scaled back. Scales are bfloat16 numbers: with float32 scales TensorRT writes every
product out in float32.

Calibration finds the scales of inputs by running the model: it generates a few chunks for a few texts, with
the policy of the bundle and every pass of its schedule, and the largest absolute value that each linear layer
takes in is kept. That does not depend on the order of heads, but the plan's groups do, so it is the baked
model and not the checkpoint that runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from forcingkv.export.codes import (
    E4M3,
    dequantize,
    hooked,
    insert_before_use,
    matrix_of,
    products_of,
    store_codes,
)
from forcingkv.export.passes import constant, input_of, make, shape_of
from forcingkv.export.precision import Precision
from forcingkv.headmaps.errors import InputError
from forcingkv.models.checkpoint import weight_shapes
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.wan import WanModel
from forcingkv.runtime.bundle import CalibrationRecord
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.segments import Split
from forcingkv.runtime.spec import ModelSpec

LARGEST = E4M3.largest
quantize = E4M3.quantize
weight_scales = E4M3.weight_scales

HEADROOM = 2.0
"""How much larger than any that calibration saw an input may be before it saturates.

It costs next to nothing: E4M3 has three bits of mantissa in each of 15 binades, so a power of two only
moves the numbers that are smaller than a 14,000th of the largest.
"""

FRAME_TOKENS = 400
"""The most tokens of a frame in calibration: 416x240 pixels where a model is made for 832x480."""

CHUNKS = 4
"""With as many Forcing-KV reaches its last phase."""

SEED = 0
"""Of the first text's noise; each text has the next."""


def input_scale(largest: float) -> float:
    """The scale of an input of which calibration saw values up to `largest`; a bfloat16 number."""
    scale = torch.tensor(HEADROOM * largest / LARGEST).bfloat16().item()
    return scale if scale > 0 else 1.0


def rounded_inputs(model: nn.Module, scales: Mapping[str, float]) -> AbstractContextManager[None]:
    """While this is open, linear layers of a model in float32 round their inputs to FP8 and back.

    `scales`: name of each such layer -> the scale of its input. With weights that are dequantized, they
    compute what a graph does after `quantize_linears`.
    """

    def round_input(name: str, x: Tensor) -> Tensor:
        scale = torch.tensor(scales[name])
        return dequantize(quantize(x, scale), scale)

    return hooked(model, scales, round_input)


def quantize_linears(
    graph: ir.Graph, weights: Mapping[str, ir.Value], scales: Mapping[str, float], *, tensorrt: bool
) -> list[ir.Value]:
    """Linear layers multiply in FP8: their inputs pass QuantizeLinear and DequantizeLinear, and their
    weights are FP8 with a scale for each output channel.

    TensorRT makes one FP8 kernel of DequantizeLinear on both sides of a MatMul. ONNX Runtime takes the
    same for an integer product and refuses the graph (1.31), so for it a weight is cast and multiplied,
    which it folds when it loads the graph.

    Requires: by the name of each layer its weight, a graph input whose contents lie elsewhere, as (in, out)
    or (1, in, out), and the right side of MatMul only; and the scale of its input, the same for layers with
    one input.
    Ensures: one QuantizeLinear for each value that quantized layers take, however many take it; the dtype
    of each weight is FP8, that of products and what follows as before.

    Returns the scales of the weights, as new graph inputs: (out,), in the dtype the graph computes in, with
    the names they have in the file of weights.
    """
    rounded: dict[ir.Value, tuple[ir.Value, float]] = {}
    added = []
    for layer, weight in weights.items():
        products = products_of(layer, weight)
        kind = weight.dtype
        assert kind is not None
        matrix, scale_of_weight = _dequantized(graph, weight, kind, tensorrt=tensorrt)
        added.append(scale_of_weight)
        for node in products:
            data, scale = input_of(node, 0), scales[layer]
            if data not in rounded:
                rounded[data] = _rounded(graph, data, f"{layer}.input_scale", scale, kind), scale
            if rounded[data][1] != scale:
                raise ValueError(f"{layer} and another layer have one input and two scales")
            node.replace_input_with(0, rounded[data][0])
            node.replace_input_with(1, matrix)
    return added


def _dequantized(
    graph: ir.Graph, weight: ir.Value, kind: ir.DataType, *, tensorrt: bool
) -> tuple[ir.Value, ir.Value]:
    """Make a weight FP8. Returns the matrix that it stands for, and its scale."""
    assert weight.name is not None
    if not tensorrt:
        return matrix_of(graph, weight, ir.DataType.FLOAT8E4M3FN, kind)
    scale = store_codes(graph, weight, ir.DataType.FLOAT8E4M3FN, kind)
    attributes = {"axis": len(shape_of(weight)) - 1, "output_dtype": int(kind)}
    named = f"{weight.name}.dequantizelinear"
    node, matrix = make("DequantizeLinear", [weight, scale], weight, None, named, attributes, dtype=kind)
    graph.insert_before(graph[0], node)
    return matrix, scale


def _rounded(graph: ir.Graph, data: ir.Value, name: str, scale: float, kind: ir.DataType) -> ir.Value:
    """A value rounded to FP8 and back, before the first node that takes it."""
    stored = constant(graph, name, np.array(scale, kind.numpy()))
    nodes, value = [], data
    for op_type, dtype in (("QuantizeLinear", ir.DataType.FLOAT8E4M3FN), ("DequantizeLinear", kind)):
        attributes, named = {"output_dtype": int(dtype)}, f"{data.name}.{op_type.lower()}"
        node, value = make(op_type, [value, stored], data, None, named, attributes, dtype=dtype)
        nodes.append(node)
    insert_before_use(graph, data, nodes)
    return value


def without_rounding(model: onnx.ModelProto) -> None:
    """Take QuantizeLinear and the DequantizeLinear after it out of a graph: inputs stay as they are.

    Requires: what `quantize_linears` wrote for ONNX Runtime.
    Ensures: the same graph, but for the rounding of inputs.
    """
    kept: list[onnx.NodeProto] = []
    origins: dict[str, str] = {}
    for node in model.graph.node:
        node.input[:] = [origins.get(name, name) for name in node.input]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            origins[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


@dataclass(frozen=True)
class CalibrationTexts:
    """What to generate for."""

    kind: Literal["prompts", "embeddings", "random"]
    """The model's own prompts or others that it encodes; embeddings from a file; drawn at random."""
    prompts: tuple[str, ...]
    arrays: tuple[npt.NDArray[np.float32], ...]
    """One a prompt: (1, text_length, text_width)."""


def random_texts(spec: ModelSpec) -> CalibrationTexts:
    """Two random embeddings, for models with random weights: they stand for no text."""
    shape = (2, 1, spec.text_length, spec.text_width)
    drawn = np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)
    return CalibrationTexts("random", (), tuple(drawn))


def calibrate(
    model: WanModel,
    plan: CachePlan,
    precision: Precision,
    texts: CalibrationTexts,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, float], CalibrationRecord]:
    """Find the scale of the input of each linear layer that is quantized.

    The model is the baked one, in float32, weights rounded to FP8 already; it runs at a smaller geometry than
    the bundle's (`calibration_plan`). The same model, plan and texts give the same scales on one machine.

    Returns the name of each layer -> the scale of its input, and what it was found with, for the manifest.
    """
    small = calibration_plan(plan)
    chunks = min(CHUNKS, small.phases[-1].first_chunk + 1)
    largest = dict.fromkeys(precision.linears(weight_shapes(plan.spec)), 0.0)

    def see(name: str, x: Tensor) -> None:
        value = float(x.abs().amax())
        if not math.isfinite(value):
            raise InputError(
                f"{name} takes values that are not finite",
                where="calibration",
                hint="Look at the checkpoint and the embeddings: the model does not run with them.",
            )
        largest[name] = max(largest[name], value)

    with hooked(model, largest, see):
        for place, text in enumerate(texts.arrays):
            made = generate(model, small, torch.from_numpy(text), seeded_noise(small, SEED + place), chunks)
            for chunk in made:
                done = f"text {place + 1} of {len(texts.arrays)}, chunk {chunk.index + 1} of {chunks}"
                progress(f"calibrating: {done}")
    size = small.geometry.width, small.geometry.height
    record = CalibrationRecord(texts.kind, texts.prompts, chunks, SEED, size, largest)
    return {layer: input_scale(value) for layer, value in largest.items()}, record


def calibration_plan(plan: CachePlan) -> CachePlan:
    """The plan at a geometry that a CPU can run: both sides divided by the smallest whole number that
    leaves at most `FRAME_TOKENS` tokens a frame, and segments that are even if the plan's are. The plan
    itself where that is so already, where there is no such number, and for models that run at one resolution
    only.
    """
    spec, (rows, columns) = plan.spec, plan.geometry.grid
    split = plan.choice.split if plan.choice else Split(plan.frame_tokens, 1)
    if spec.position_table:
        return plan
    cell = spec.decoder.spatial_stride * spec.patch
    for divisor in range(1, min(rows, columns) + 1):
        height, width = rows // divisor, columns // divisor
        smaller = Split(height * width, split.segments)
        fits = smaller.is_even if split.is_even else smaller.kept_tokens
        if height * width <= FRAME_TOKENS and fits:
            return replace(plan, geometry=spec.geometry(f"{width * cell}x{height * cell}"))
    return plan
