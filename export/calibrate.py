"""Calibration: the scales of what linear layers take in FP8, from running the model.

The baked model generates a few chunks for a few texts, with the policy of the bundle and every pass of its
schedule, and the largest absolute value that each linear layer takes in is kept. That does not depend on
the order of heads, but the plan's groups do, so it is the baked model and not the checkpoint that runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from forcingkv.export.fp8 import input_scale
from forcingkv.export.precision import Precision
from forcingkv.headmaps.errors import InputError
from forcingkv.models.checkpoint import weight_shapes
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.wan import WanModel
from forcingkv.runtime.bundle import CalibrationRecord
from forcingkv.runtime.memory import require_memory
from forcingkv.runtime.plan import CachePlan
from forcingkv.runtime.spec import ModelSpec

FRAME_TOKENS = 400
"""The most tokens of a frame in calibration: 416x240 pixels where a model is made for 832x480."""

CHUNKS = 4
"""As many as Forcing-KV needs to come to its last phase."""

SEED = 0
"""Of the first text's noise; each text has the next."""

PROGRAM_BYTES = 1.5e9
"""torch and the exporter by themselves."""


@dataclass(frozen=True)
class CalibrationTexts:
    """What to generate for."""

    kind: Literal["prompts", "embeddings", "random"]
    """The model's own prompts or others that it encodes; embeddings from a file; drawn at random."""
    prompts: tuple[str, ...]
    arrays: tuple[npt.NDArray[np.float32], ...]
    """One a prompt: (1, text_length, text_width)."""


def random_texts(spec: ModelSpec, count: int = 2) -> CalibrationTexts:
    """Random embeddings, for models with random weights: they stand for no text."""
    generator = np.random.default_rng(SEED)
    shape = (1, spec.text_length, spec.text_width)
    arrays = tuple(generator.standard_normal(shape, dtype=np.float32) for _ in range(count))
    return CalibrationTexts("random", (), arrays)


def calibrate(
    model: WanModel,
    plan: CachePlan,
    precision: Precision,
    texts: CalibrationTexts,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, float], CalibrationRecord]:
    """Find the scale of the input of each linear layer that is quantized.

    The same model, plan and texts give the same scales on the same machine.

    Args:
        model: the baked model, in float32, weights rounded to FP8 already.
        plan: the bundle's cache plan; a smaller geometry is derived from it (`calibration_plan`).
        precision: says which layers are quantized.
        texts: what to generate for.
        progress: told what is being done.

    Returns:
        Name of each layer -> the scale of its input; and what it was found with, for the manifest.
    """
    small = calibration_plan(plan)
    chunks = min(CHUNKS, small.phases[-1].first_chunk + 1)
    layers = [n.removesuffix(".weight") for n in weight_shapes(plan.spec) if precision.quantizes(n)]
    largest = _largest_inputs(model, small, layers, texts.arrays, chunks, progress)
    record = CalibrationRecord(
        texts=texts.kind,
        prompts=texts.prompts,
        chunks=chunks,
        seed=SEED,
        resolution=(small.geometry.width, small.geometry.height),
        largest=largest,
    )
    return {layer: input_scale(value) for layer, value in largest.items()}, record


def _largest_inputs(
    model: WanModel,
    plan: CachePlan,
    layers: Sequence[str],
    texts: Sequence[npt.NDArray[np.float32]],
    chunks: int,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Name of each layer -> the largest absolute value that it takes; InputError where one is not finite."""
    seen: dict[str, float] = defaultdict(float)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(_see, seen, name)) for name in layers
    ]
    try:
        for place, text in enumerate(texts):
            made = generate(model, plan, torch.from_numpy(text), seeded_noise(plan, SEED + place), chunks)
            for chunk in made:
                progress(
                    f"calibrating: text {place + 1} of {len(texts)}, chunk {chunk.index + 1} of {chunks}"
                )
    finally:
        for hook in hooks:
            hook.remove()
    return {name: seen[name] for name in layers}


def _see(seen: dict[str, float], name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    value = float(inputs[0].abs().amax())
    if not math.isfinite(value):
        raise InputError(
            f"{name} takes values that are not finite",
            where="calibration",
            hint="Look at the checkpoint and the embeddings: the model does not run with them.",
        )
    seen[name] = max(seen[name], value)


def calibration_plan(plan: CachePlan) -> CachePlan:
    """The plan at a geometry that a CPU can run: both sides divided by the smallest whole number that
    leaves at most `FRAME_TOKENS` tokens a frame, and whole segments. The plan itself where that is so
    already, where there is no such number, and for models that run at one resolution only.
    """
    spec, (rows, columns) = plan.spec, plan.geometry.grid
    segments = plan.choice.role.segments if plan.choice else 1
    if spec.position_table:
        return plan
    cell = spec.decoder.spatial_stride * spec.patch
    for divisor in range(1, min(rows, columns) + 1):
        height, width = rows // divisor, columns // divisor
        if height * width <= FRAME_TOKENS and height * width % segments == 0:
            return replace(plan, geometry=spec.geometry(f"{width * cell}x{height * cell}"))
    return plan


def check_calibration(plan: CachePlan) -> None:
    """Raise InputError unless the model fits into memory for calibration.

    torch holds the weights in float32, one layer's activations, and three caches: those that are read, those
    that are made of them, and what attention joins.
    """
    small = calibration_plan(plan)
    numbers = sum(math.prod(shape) for shape in weight_shapes(plan.spec).values())
    parts: Mapping[str, float] = {
        "programs": PROGRAM_BYTES,
        "weights": 4.0 * numbers,
        "caches": 3.0 * small.kv_bytes(),
    }
    hint = "Export with --dtype bfloat16, or on a larger machine."
    require_memory(f"calibrating {plan.spec.name} for FP8", parts, hint)
