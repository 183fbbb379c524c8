"""What recording needs of memory, checked before the weights are read.

Counted is the larger of two moments: a pass, with the activations of a block beside keys and values; and the
end of a clean pass, when the cache that was read and the one that follows are both there. docs/headmaps.md
compares it with what was taken.
"""

from __future__ import annotations

import math

import torch

from forcingkv.analyze.recording import Passes
from forcingkv.models.checkpoint import weight_shapes
from forcingkv.runtime.backends.torch_device import free_bytes
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.memory import available_bytes, require_memory
from forcingkv.runtime.spec import Dtype

PROGRAM_BYTES = 0.2e9
"""What torch and the recorder take beside what is counted: threads, blocks of logits, drawing the report."""
WORKER_BYTES = 0.6e9
"""What a Ray worker takes, which loads torch itself."""
ON_THE_HOST = ("program", "statistics")
"""Parts that are not in a GPU's memory."""
SLOT_BYTES = 40
"""Of a row's mass on a key frame: as recorded, and in the columns of the file."""


def recording_memory(
    plan: CachePlan, dtype: Dtype, chunks: int, passes: Passes = "denoise"
) -> dict[str, float]:
    """Bytes by part that recording a video of so many chunks takes, in a process that has loaded torch.

    Weights and keys and values are exact up to what torch rounds up; activations are an estimate.
    """
    spec, size = plan.spec, DTYPES[dtype].bytes
    attended = plan.kv_bytes(dtype, chunks - 1)
    current = plan.kv_bytes_by_role(dtype, chunks - 1)["current"]
    held = attended - current
    wide = plan.chunk_tokens * spec.dim
    hidden = 2 * size * plan.chunk_tokens * spec.ffn_width
    # Queries, keys and values, rotated in float32; keys and values of a layer laid together.
    attention = 3 * size * wide + 2 * DTYPES["float32"].bytes * wide + attended / spec.layers
    # A pass makes keys and values while those of the pass before are still there, and so may be those that
    # the cache was cut from.
    in_a_pass = {
        "keys and values": float(held + 3 * current),
        "activations": 3 * size * wide + max(hidden, attention),
    }
    after_a_clean_pass = {"keys and values": float(2 * held + 3 * current)}
    moment = max(in_a_pass, after_a_clean_pass, key=lambda parts: sum(parts.values()))
    made = spec.schedule.passes(chunks) if passes != "clean" else 0
    made += chunks if passes != "denoise" else 0
    rows = made * spec.layers * spec.heads * spec.frames_per_chunk
    slots = min(chunks * spec.frames_per_chunk, spec.attended_frames)
    return {
        "program": PROGRAM_BYTES,
        "weights": float(size * sum(math.prod(shape) for shape in weight_shapes(spec).values())),
        **moment,
        "text": float(size * 2 * spec.layers * spec.text_length * spec.dim),
        "statistics": float(SLOT_BYTES * rows * slots),
    }


def check_memory_to_record(
    plan: CachePlan,
    dtype: Dtype,
    chunks: int,
    device: str = "cpu",
    workers: int = 0,
    passes: Passes = "denoise",
) -> None:
    """Raise InputError, with what is needed by part, unless recording a video fits into memory.

    On a GPU what lies there has to fit into what it has free. With `workers`, that many processes of this
    machine record at a time, besides this one.
    """
    parts = recording_memory(plan, dtype, chunks, passes)
    size = f"{plan.geometry.width}x{plan.geometry.height}"
    doing = f"recording {plan.spec.name} under {plan.policy.name} at {size}, {chunks} chunks,"
    hint = "Choose a smaller --resolution, --dtype bfloat16, fewer --chunks, or a larger machine."
    if workers:
        parts["program"] += WORKER_BYTES
        parts = {name: workers * part for name, part in parts.items()}
        doing += f" with {workers} workers"
        hint = f"Take fewer --workers. Or: {hint}"
    if device == "cpu":
        require_memory(doing, parts, hint)
    elif not workers:
        of_gpu = {name: part for name, part in parts.items() if name not in ON_THE_HOST}
        require_memory(f"{doing} on the GPU", of_gpu, hint, free_bytes(torch.device(device)))


def workers_that_fit(plan: CachePlan, dtype: Dtype, chunks: int, passes: Passes = "denoise") -> int:
    """How many workers this machine has memory for, at least one."""
    one = sum(recording_memory(plan, dtype, chunks, passes).values()) + WORKER_BYTES
    return max(1, int(available_bytes() // one))
