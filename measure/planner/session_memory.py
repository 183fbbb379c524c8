"""Bytes that a session on a GPU will hold, by part, before there is a bundle or an engine.

The parts are those of `runtime.footprint`, which knows a bundle's own figures; here all are derived from the
model and the plan. Keys and values are the same to the byte. Weights are every parameter once. Activations
are an estimate: docs/planning.md compares it with engines that were built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from forcingkv.measure.planner.decoding import decoder_costs
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.footprint import kv_parts
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.spec import Dtype, ModelSpec

RESERVE_BYTES = 1 << 30
"""Left free for what cannot be derived: CUDA's own context, the code of kernels, rounding by allocators. An
assumption: it has not been measured."""


@dataclass(frozen=True)
class SessionMemory:
    """Bytes by part, and what is not among them."""

    parts: dict[str, int]
    unknown: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes of all parts that are known."""
        return sum(self.parts.values())

    def missing(self, capacity: int) -> int:
        """Bytes by which a GPU of that capacity is too small, the reserve kept free; 0: it fits."""
        return max(0, self.total + RESERVE_BYTES - capacity)


def parameters(spec: ModelSpec) -> int:
    """Numbers in a model's weights, norms and biases included (`models/wan.py`)."""

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    dim, ffn = spec.dim, spec.ffn_width
    cell = spec.latent_channels * spec.patch**2
    attention = 4 * linear(dim, dim) + 2 * dim
    block = 2 * attention + 2 * dim + linear(dim, ffn) + linear(ffn, dim) + 6 * dim
    ends = linear(cell, dim) + linear(dim, cell) + 2 * dim
    text = linear(spec.text_width, dim) + linear(dim, dim)
    time = linear(spec.time_width, dim) + linear(dim, dim) + linear(dim, 6 * dim)
    places = spec.geometry().frame_tokens * dim if spec.position_table else 0
    return spec.layers * block + ends + text + time + places


def engine_activations(plan: CachePlan, dtype: Dtype) -> int:
    """Estimate of what one pass needs beside weights, caches, inputs and outputs, in bytes.

    The larger of two moments of a block. In the feed-forward: the hidden tensor before and after its
    activation, the residual stream, the input and the result. In attention: all keys and values of a layer
    laid together, the residual stream, queries, the chunk's own keys and values, and the result. At both one
    tensor of the width in float32, which norms compute in. Attention itself is fused: its scores are nowhere.
    """
    spec, size = plan.spec, DTYPES[dtype].bytes
    tokens, last = plan.chunk_tokens, plan.phases[-1].first_chunk
    wide = DTYPES["float32"].bytes * tokens * spec.dim
    seen = max(
        sum(
            2 * group.heads * spec.head_dim * (tokens + sum(plan.tokens(group, r, last) for r in group.roles))
            for group in groups
        )
        for groups in plan.layers
    )
    forward = tokens * (2 * spec.ffn_width + 3 * spec.dim)
    return size * max(forward, seen + 5 * tokens * spec.dim) + wide


def session_memory(
    plan: CachePlan, dtype: Dtype = "bfloat16", decode_strips: int | None = None
) -> SessionMemory:
    """What a session with engines holds, by part: `runtime.footprint.part_notes`, decoding's activations
    apart. `decode_strips`: in how many strips frames are decoded; None: as export chooses it.

    Raises InputError for a number of strips that cannot be.
    """
    spec, size, geometry = plan.spec, DTYPES[dtype].bytes, plan.geometry
    decoder = decoder_costs(spec.decoder.kind, spec.latent_channels)
    pixels = geometry.latent_height * geometry.latent_width
    wide = DTYPES["float32"].bytes
    chunk = spec.latent_channels * spec.frames_per_chunk * pixels
    frames = spec.frames_per_chunk * spec.decoder.temporal_stride * math.prod(geometry.shown) * 3
    caches, activations = 2 * size * decoder.cached * pixels, (decoder.activation_bytes or 0) * pixels
    strips = decoder.strips_of(geometry, decode_strips)
    if strips and decoder.strips:
        caches = decoder.strips.cache_bytes(strips, geometry, decoder.cached, size)
        activations = decoder.strips.activation_bytes(strips, geometry)
        frames += spec.decoder.temporal_stride * strips.pixel_rows * geometry.shown[0] * 3 // 2
    prompt = spec.layers * 2 * spec.text_length * spec.dim * size
    parts = {
        "weights": size * (parameters(spec) + decoder.parameters),
        "activations": engine_activations(plan, dtype),
        "decode_activations": activations,
        **kv_parts(plan, dtype),
        # Two buffers, read and written in turn; of strips one each, and one that all share.
        "decoder_caches": caches,
        # uint8, those of a chunk and of the one before it, and those of a strip.
        "frames": 2 * frames,
        "text": prompt + wide * spec.text_length * spec.text_width,
        # Latents, noise, next latents, those being decoded; cosines and sines.
        "latents": wide * (4 * chunk + plan.chunk_tokens * spec.head_dim),
    }
    unknown = [
        "CUDA's own context and what allocators round up: a reserve is kept for them",
        "the text encoder: prompts are encoded ahead, or it is loaded beside",
    ]
    of_strips = decoder.strips.strip_activation_bytes if strips and decoder.strips else None
    if (of_strips if strips else decoder.activation_bytes) is None:
        unknown.append(f"activations of the decoder {spec.decoder.kind}: never built")
    return SessionMemory(parts, tuple(unknown))
