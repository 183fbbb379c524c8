"""What an export needs of memory and disk, checked before anything is written.

The factors count what programs hold at once, in multiples of what a plan or a model counts. They are meant to
be a little too large: measured with two layers of 1.3B width at 480P and TAEHV, a verification took 14.4 GB
where this says 15.9 (`full`), and 7.1 where it says 6.8 (`forcing-kv`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from forcingkv.export.fp8 import calibration_plan
from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.folders import built_in
from forcingkv.models.checkpoint import weight_shapes
from forcingkv.models.decoders import StreamingDecoder
from forcingkv.models.decoders.strips import strip_shapes
from forcingkv.models.encoders import StreamingEncoder
from forcingkv.runtime.decode_strips import Strips
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.memory import require_memory
from forcingkv.runtime.spec import ModelSpec

TORCH_BYTES = 1.5e9
"""torch and the exporter by themselves."""
ORT_BYTES = 0.5e9
"""ONNX Runtime by itself."""
VERIFIED_WEIGHTS = 2.5
"""In float32: torch's and ONNX Runtime's, which also holds them as they are stored."""
VERIFIED_CACHES = 6.0
"""Those of the last phase are inputs and outputs of both programs, and each joins them with the chunk."""
VERIFIED_STATES = 4.0
"""A decoder's caches are inputs and outputs of both programs."""
CALIBRATED_CACHES = 3.0
"""Those that are read, those that are made of them, and what attention joins."""
OTHER_FILES = 64_000_000
"""Bytes on the disk for what is not weights: graphs, kernels, manifest, and blocks that are not full."""
ENGINE_WEIGHTS = 1.1
"""An engine holds the weights of its graph again, and little else."""


def check_memory_to_verify(
    plan: CachePlan,
    decoder: StreamingDecoder | None = None,
    strips: Strips | None = None,
    encoder: StreamingEncoder | None = None,
) -> None:
    """Raise InputError unless a model fits into memory for verification, with what it needs by part.

    A decoder in strips is compared a strip at a time. Attention scores are those of one layer, which ONNX
    Runtime writes out.
    """
    spec = plan.spec
    keys = plan.kv_bytes() / (4 * 2 * spec.layers * spec.dim)  # of a head, on average
    parts = {
        "programs": TORCH_BYTES + ORT_BYTES,
        "weights": 4 * VERIFIED_WEIGHTS * _weight_count(spec),
        "caches": VERIFIED_CACHES * plan.kv_bytes(),
        "attention scores": 4 * spec.heads * plan.chunk_tokens * keys,
    }
    grid = plan.geometry.latent_height, plan.geometry.latent_width
    states = [_numbers(module.state_shapes(*grid)) for module in (decoder, encoder) if module]
    if decoder and strips:
        shapes = strip_shapes(decoder, strips, *grid)
        states[0] = max(_numbers(shapes.whole), _numbers(shapes.state | shapes.edges))
    if states:  # graphs are verified one after the other
        parts["decoder caches"] = 4 * VERIFIED_STATES * max(states)
    require_memory(
        f"verifying {spec.name} at {plan.geometry.width}x{plan.geometry.height}",
        parts,
        "Export with --no-verify, at a smaller resolution, or on a larger machine.",
    )


def _numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def check_memory_to_calibrate(plan: CachePlan) -> None:
    """Raise InputError unless the model fits into memory for calibration: torch alone runs, in float32."""
    parts = {
        "programs": TORCH_BYTES,
        "weights": 4.0 * _weight_count(plan.spec),
        "caches": CALIBRATED_CACHES * calibration_plan(plan).kv_bytes(),
    }
    hint = "Export with --dtype bfloat16, or on a larger machine."
    require_memory(f"calibrating {plan.spec.name} for FP8", parts, hint)


def check_disk(out: Path, weights: int, engines: int) -> None:
    """Raise InputError unless a bundle fits on the disk of the folder `out`.

    `weights` are bytes, which the engines for each GPU hold again; `engines` is for how many GPUs.
    """
    place = built_in(out)
    needed, free = int(weights * (1 + ENGINE_WEIGHTS * engines)) + OTHER_FILES, shutil.disk_usage(place).free
    if needed > free:
        again = f" and as much again in the engines for each of {engines} GPUs" if engines else ""
        raise InputError(
            f"has {free / 1e9:.1f} GB free, and the bundle needs about {needed / 1e9:.1f} GB:"
            f" {weights / 1e9:.1f} GB of weights{again}",
            where=str(place),
            hint="Choose another disk" + (", or build for fewer GPUs at a time." if engines else "."),
        )


def _weight_count(spec: ModelSpec) -> int:
    """The number of a model's weights."""
    return sum(math.prod(shape) for shape in weight_shapes(spec).values())
