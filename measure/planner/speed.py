"""The work of a pass, and how long it takes: seconds of a pass, of a chunk and of a video, without decoding.

Operations come from `runtime.cost`. Bytes between device memory and the chip are derived here, for a
transformer that runs operator by operator, as PyTorch does: each operator reads its inputs and writes its
output once. An engine that fuses neighbours moves less; how much less has not been measured.

A pass takes, for each kind of work, the longer of computing it and moving its bytes: the roofline of
Williams, Waterman and Patterson (2009), with one change: kernels reach a share of the peak, the
**efficiency**, one constant for each class of GPUs (`published.py`). Kinds of work follow one another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from forcingkv.measure.planner.gpus import Gpu
from forcingkv.runtime.cost import pass_flops
from forcingkv.runtime.dtypes import DTYPES
from forcingkv.runtime.kv.plan import PARTS, CachePlan
from forcingkv.runtime.spec import Dtype

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

FLOAT_TURNS: dict[str, int] = {
    "cast to float32, written": 1,
    "numbers of a pair swapped": 2,
    "two products": 4,
    "their sum": 3,
    "read to be cast back": 1,
}
"""How often moving cached keys with the window reads or writes each of their numbers in float32
(`models/kv.py`, `turned`). Engines make all outputs, and so do this, in every pass."""

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
"""The work of one pass over a chunk, by kind.

linear: projections and feed-forward: weights, inputs and outputs of each product.
attention: self-attention: queries, keys, values, result.
cross: attention to the prompt.
elementwise: norms, rotation, modulation, gates, activation: no operations counted, bytes alone.
cache: keys and values joined to be attended to, codes read for it, and the next caches, with what moves them
    with the window.
"""


def pass_work(plan: CachePlan, chunk: int | None = None, dtype: Dtype = "bfloat16") -> PassWork:
    """The work of one pass of a chunk; None: of a chunk of the last phase.

    The clean pass does the same work as a denoising pass: engines compute all outputs of the step graph in
    every pass, the next caches too (docs/decisions/0004).
    """
    spec, size, tokens = plan.spec, DTYPES[dtype].bytes, plan.chunk_tokens
    at = plan.phases[-1].first_chunk if chunk is None else chunk
    flops, stream = pass_flops(plan, at), tokens * spec.dim * size
    held = coded = following = joined = turned = 0
    for group, layers in plan.kinds:
        numbers = layers * len(PARTS) * group.heads * spec.head_dim  # of a token
        seen = sum(role.seen_tokens(plan, group, at) for role in group.roles)
        held += numbers * seen
        # The next cache as the graph gives it (`CacheBuffers`): segments whether the next chunk sees them or
        # not, the sink in the first chunk alone.
        for role in group.roles:
            following += size * numbers * role.next_tokens(plan, group, at)
            if role.dtype is not None:
                spared = size * numbers - layers * group.heads * plan.token_bytes(role, dtype)
                following -= spared * role.next_tokens(plan, group, at)
                coded += (size * numbers - spared) * role.seen_tokens(plan, group, at)
        # Read and written where the cache's keys and values are laid before those of the chunk.
        joined += 2 * numbers * (seen + tokens) if seen else 0
        if plan.relative:
            moving = sum(role.next_tokens(plan, group, at) for role in group.roles if role.moves)
            turned += layers * group.heads * spec.head_dim * moving
    prompt = 2 * spec.text_length * spec.dim * size
    return {
        "linear": Work(flops.linear, _linear_bytes(plan, size)),
        # Queries in and the result out; keys and values of the cache and of the chunk in.
        "attention": Work(flops.attention, spec.layers * 4 * stream + size * held),
        "cross": Work(flops.cross, spec.layers * (2 * stream + prompt)),
        "elementwise": Work(0, spec.layers * elementwise_bytes(plan, dtype)),
        "cache": Work(0, size * joined + coded + 2 * following + turned * turn_bytes(size)),
    }


def context_work(plan: CachePlan, dtype: Dtype = "bfloat16") -> PassWork:
    """The work of the pass over newest frames before a chunk (`CachePlan.recomputes`): that of a chunk of so
    many frames that finds nothing cached."""
    frames = plan.spec.context_frames
    spec = replace(plan.spec, frames_per_chunk=frames, attended_frames=2 * frames)
    return pass_work(replace(plan, spec=spec), 0, dtype)


def turn_bytes(size: int) -> int:
    """Bytes that moving a number of a key takes: cast to float32 and back, and what `FLOAT_TURNS` says."""
    return 2 * size + sum(FLOAT_TURNS.values()) * DTYPES["float32"].bytes


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


def pass_seconds(works: PassWork, gpu: Gpu, efficiency: float) -> dict[str, float]:
    """Seconds of a pass by kind of work; their sum is the pass.

    `efficiency` is the share of the peak that is reached, above 0.
    """
    computing, moving = efficiency * gpu.peak_flops, gpu.bandwidth
    return {kind: max(work.flops / computing, work.bytes / moving) for kind, work in works.items()}


class PhaseWork(NamedTuple):
    """The chunks of a video that are in one phase, whose passes do the same work."""

    chunks: int
    work: PassWork
    """Of one pass."""
    passes: int
    """Of all these chunks together, clean passes included."""


@dataclass(frozen=True)
class VideoWork:
    """The work of a video: that of a pass in each phase, and how many passes are in the phase."""

    phases: tuple[PhaseWork, ...]
    """In order; phases that the video does not reach are left out. Passes that make a chunk's context anew
    come last, of no chunks of their own."""
    steady: PassWork
    """Work of a pass in the last phase of the plan, reached or not."""
    filling: PassWork
    """Of the pass that fills the cache there: the clean pass or the last one, which is as any other; or that
    over newest frames before a chunk."""
    passes: int
    """Passes a chunk, the one that fills the cache included, of chunks without steps of their own."""
    frames: int
    """Pixel frames a chunk, as published figures count them: the decoder's temporal stride x latent frames,
    in the first chunk too."""

    @property
    def chunks(self) -> int:
        return sum(phase.chunks for phase in self.phases)


def video_work(plan: CachePlan, chunks: int, dtype: Dtype = "bfloat16") -> VideoWork:
    """The work of a video of so many chunks."""
    begins = [phase.first_chunk for phase in plan.phases]
    ends = [min(end, chunks) for end in (*begins[1:], chunks)]
    schedule, phases = plan.spec.schedule, []
    for begin, end in zip(begins, ends, strict=True):
        if end > begin:
            passes = schedule.passes(end) - schedule.passes(begin)
            passes += 0 if plan.recomputes else schedule.clean_passes * (end - begin)
            phases.append(PhaseWork(end - begin, pass_work(plan, begin, dtype), passes))
    steady = pass_work(plan, None, dtype)
    filling = context_work(plan, dtype) if plan.recomputes else steady
    if plan.recomputes and chunks > 1:
        phases.append(PhaseWork(0, filling, chunks - 1))
    return VideoWork(
        phases=tuple(phases),
        steady=steady,
        filling=filling,
        passes=len(schedule.later) + schedule.clean_passes,
        frames=plan.spec.frames_per_chunk * plan.spec.decoder.temporal_stride,
    )


def predict(video: VideoWork, gpu: Gpu, efficiency: float) -> dict[str, Any]:
    """Predict a video on a GPU whose kernels reach that share of the peak; decoding and text are left out.

    Returns:
        Of the last phase `pass_seconds`, `pass_seconds_by_kind` of work and `chunk_seconds`, denoising passes
        and the clean pass of a chunk without steps of its own. Of the whole video, whose caches grow over its
        first chunks and whose first chunks may have other steps, `mean_chunk_seconds` and `fps`, frames being
        temporal stride x latent frames. Of a pass of the last phase self-attention's
        `attention_time_share` and `attention_flop_share`. Blocks take all of that time but some 0.1%, so the
        first is a block's share too.
    """
    kinds = pass_seconds(video.steady, gpu, efficiency)
    steady = sum(kinds.values())
    filling = sum(pass_seconds(video.filling, gpu, efficiency).values())
    total = sum(
        phase.passes * sum(pass_seconds(phase.work, gpu, efficiency).values()) for phase in video.phases
    )
    mean_chunk = total / video.chunks
    flops = {kind: work.flops for kind, work in video.steady.items()}
    return {
        "pass_seconds": steady,
        "pass_seconds_by_kind": kinds,
        "chunk_seconds": (video.passes - 1) * steady + filling,
        "mean_chunk_seconds": mean_chunk,
        "fps": video.frames / mean_chunk,
        "attention_time_share": kinds["attention"] / steady,
        "attention_flop_share": flops["attention"] / sum(flops.values()),
    }
