"""The work of a pass: operations, and bytes that move between device memory and the chip, by kind.

Operations come from `runtime.cost`. Bytes are derived from the plan and the model here, for a transformer
that runs operator by operator, as PyTorch does: each operator reads its inputs and writes its output once.
An engine that fuses neighbours moves less; how much less has not been measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from forcingkv.runtime.cost import pass_flops
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.spec import Dtype

KINDS: dict[str, str] = {
    "linear": "projections and feed-forward: weights, inputs and outputs of each product",
    "attention": "self-attention: queries, keys, values, result",
    "cross": "attention to the prompt",
    "elementwise": "norms, rotation, modulation, gates, activation: no operations counted, bytes alone",
    "cache": "keys and values joined to be attended to, and the next caches",
}
"""The kinds of work, and what is in each."""

MODEL_TRIPS: dict[str, int] = {
    "three layer norms": 6,
    "modulation before attention and feed-forward: a product and a sum each": 8,
    "queries, keys and queries to the prompt, read to be normalised": 3,
    "queries to the prompt, written": 1,
    "rotated queries and keys, written": 2,
    "two gates and three sums with the residual stream": 13,
    "heads of both attentions laid side by side": 4,
}
"""How often a block reads or writes a tensor (tokens, width) of the model's dtype, beside its products and
attentions. Counted in `models/wan.py`; tests compare the sum with what torch does."""

FLOAT_TRIPS: dict[str, int] = {
    "three RMS norms: cast, square, mean, two products": 24,
    "queries to the prompt, read to be cast back": 1,
    "two rotations: four products of halves, a difference, a sum, halves laid together": 18,
    "rotated queries and keys, read to be cast back": 2,
}
"""The same for tensors in float32, which norms and rotation compute in."""

HIDDEN_TRIPS = 2
"""The same for the feed-forward's hidden tensor (tokens, ffn_width): its activation reads and writes it."""


@dataclass(frozen=True)
class Work:
    """Work of one kind."""

    flops: int
    """Floating-point operations, a multiply-add counted as two."""
    bytes: int
    """Bytes read and written."""


PassWork = dict[str, Work]
"""Kind (a name of `KINDS`) -> its work in one pass over a chunk."""


def pass_work(plan: CachePlan, chunk: int | None = None, dtype: Dtype = "bfloat16") -> PassWork:
    """The work of one pass of a chunk; None: of a chunk of the last phase.

    The clean pass does the same work as a denoising pass: engines compute all outputs of the step graph in
    every pass, the next caches too (docs/decisions/0004).
    """
    spec, size = plan.spec, DTYPES[dtype].bytes
    at = plan.phases[-1].first_chunk if chunk is None else chunk
    flops, tokens = pass_flops(plan, at), plan.chunk_tokens
    stream = tokens * spec.dim * size
    held = _held_bytes(plan, at, size)
    prompt = 2 * spec.text_length * spec.dim * size
    return {
        "linear": Work(flops.linear, _linear_bytes(plan, size)),
        # Queries in and the result out; keys and values of the cache and of the chunk in.
        "attention": Work(flops.attention, spec.layers * 4 * stream + held),
        "cross": Work(flops.cross, spec.layers * (2 * stream + prompt)),
        "elementwise": Work(0, spec.layers * elementwise_bytes(plan, dtype)),
        "cache": Work(0, _joined_bytes(plan, at, size) + 2 * _next_bytes(plan, at, size)),
    }


def elementwise_bytes(plan: CachePlan, dtype: Dtype = "bfloat16") -> int:
    """Bytes that one block moves beside its products, attentions and caches."""
    size, wide = DTYPES[dtype].bytes, DTYPES["float32"].bytes
    trips = sum(MODEL_TRIPS.values()) * size + sum(FLOAT_TRIPS.values()) * wide
    hidden = HIDDEN_TRIPS * size * plan.spec.ffn_width
    return plan.chunk_tokens * (trips * plan.spec.dim + hidden)


def _linear_bytes(plan: CachePlan, size: int) -> int:
    """Of six products (dim, dim), the two of the feed-forward, patch embedding and head."""
    spec, tokens = plan.spec, plan.chunk_tokens
    weights = 6 * spec.dim**2 + 2 * spec.dim * spec.ffn_width
    moved = tokens * (6 * 2 * spec.dim + 2 * (spec.dim + spec.ffn_width))
    cell = spec.latent_channels * spec.patch**2
    ends = 2 * (cell * spec.dim + tokens * (cell + spec.dim))
    return size * (spec.layers * (weights + moved) + ends)


def _held_bytes(plan: CachePlan, chunk: int, size: int) -> int:
    """Keys and values in the cache, of all layers."""
    return size * sum(math.prod(plan.entry_shape(entry, chunk)) for entry in plan.entries)


def _joined_bytes(plan: CachePlan, chunk: int, size: int) -> int:
    """Read and written where the cache's keys and values are laid before those of the chunk."""
    own = 2 * size * plan.chunk_tokens * plan.spec.head_dim
    total = 0
    for group in plan.groups:
        cached = sum(plan.tokens(group, role, chunk) for role in group.roles)
        held = 2 * size * group.heads * plan.spec.head_dim * cached
        total += 2 * (held + own * group.heads) if cached else 0
    return total


def _next_bytes(plan: CachePlan, chunk: int, size: int) -> int:
    """The next cache as the graph gives it (`CacheBuffers`): segments whether the next chunk sees them or
    not, the sink in the first chunk alone."""
    return size * sum(math.prod(plan.next_shape(entry, chunk)) for entry in plan.entries)
