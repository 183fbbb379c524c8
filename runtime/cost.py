"""What a cache plan costs in arithmetic: floating-point operations of a pass and of a chunk.

A multiply-add counts as two. Counted are matrix products and attention; norms, RoPE and activation
functions are left out (below 1% at the sizes of public models).
"""

from __future__ import annotations

from dataclasses import dataclass

from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.rebuild import Encoding, context_encoding
from forcingkv.runtime.spec import ModelSpec


@dataclass(frozen=True)
class PassFlops:
    """Operations of one pass over a chunk's tokens."""

    linear: int
    """Projections, feed-forward, patch embedding and head."""
    attention: int
    """Self-attention to the cache and the current chunk."""
    cross: int
    """Attention to the prompt, whose keys and values are computed once a video."""

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.cross

    @property
    def attention_share(self) -> float:
        """Share of self-attention in all operations."""
        return self.attention / self.total


def pass_flops(plan: CachePlan, chunk: int | None = None) -> PassFlops:
    """Operations of one pass of a chunk; None: of a chunk of the last phase."""
    at = plan.phases[-1].first_chunk if chunk is None else chunk
    keys = sum(
        layers
        * group.heads
        * (plan.chunk_tokens + sum(role.seen_tokens(plan, group, at) for role in group.roles))
        for group, layers in plan.kinds
    )
    return _pass_flops(plan, plan.chunk_tokens, keys)


def encoding_flops(plan: CachePlan, one: Encoding) -> int:
    """Operations of a pass that encodes newest frames anew: as of a whole pass, though of its last layer
    nothing but keys and values is of use."""
    tokens = one.frames * plan.frame_tokens
    keys = 0
    for group, layers in plan.kinds:
        stay = (role for role in group.roles if role.encoded_rows(plan, group, one) is None)
        seen = tokens + sum(role.seen_tokens(plan, group, one.passes) for role in stay)
        keys += layers * group.heads * seen
    return _pass_flops(plan, tokens, keys).total


def _pass_flops(plan: CachePlan, tokens: int, keys: int) -> PassFlops:
    """Of a pass over so many tokens, each of which meets so many keys in all heads and layers."""
    spec = plan.spec
    cell = spec.latent_channels * spec.patch**2
    # q, k, v, o of self-attention; q, o of cross-attention; two of the feed-forward.
    block = 6 * spec.dim**2 + 2 * spec.dim * spec.ffn_width
    return PassFlops(
        linear=2 * tokens * (spec.layers * block + 2 * cell * spec.dim),
        attention=4 * tokens * keys * spec.head_dim,
        cross=4 * tokens * spec.text_length * spec.dim * spec.layers,
    )


def chunk_flops(plan: CachePlan, chunk: int | None = None) -> int:
    """Operations of all passes of a chunk, the clean pass included, if it has one, or the pass over newest
    frames before it; None: of one of the last phase, with the passes of all chunks that have none of their
    own."""
    schedule = plan.spec.schedule
    steps = schedule.later if chunk is None else schedule.of_chunk(chunk)
    step = pass_flops(plan, chunk).total
    if plan.recomputes:
        return step * len(steps) + (encoding_flops(plan, context_encoding(plan, 1)) if chunk != 0 else 0)
    return step * (len(steps) + schedule.clean_passes)


def prompt_flops(spec: ModelSpec) -> int:
    """Operations of the keys and values of a prompt: two layers for the text, and two a block."""
    return 2 * spec.text_length * (spec.text_width + spec.dim + 2 * spec.layers * spec.dim) * spec.dim
