"""Which frames of a video each group of heads sees, chunk by chunk: read off a cache plan, by role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from forcingkv.measure.nominal import map_with_counts
from forcingkv.runtime.kv.codes import FewerBits
from forcingkv.runtime.kv.plan import CachePlan, HeadGroup, build_plan
from forcingkv.runtime.kv.roles import Chosen

CHUNKS = (1, 2, 3, 5, 8)
"""Whose rows a timeline has, beside that of a chunk at rest."""
MOST_CHUNKS = 40
"""Chunks of a timeline at most: one that comes to rest later is not shown at rest."""


@dataclass(frozen=True)
class Seen:
    """Cached tokens of one frame that a chunk sees: shares of the frame's tokens, in their order."""

    role: str
    frame: int
    """Index of the latent frame in the video."""
    start: float
    stop: float


@dataclass(frozen=True)
class HeadKind:
    """Heads of a label that see the same, in all layers."""

    plan: CachePlan
    group: HeadGroup
    """One of their groups."""
    heads: int
    """0: no head of the model has the label."""
    layers: int
    """In how many layers they are."""


@dataclass(frozen=True)
class Row:
    """What a kind of heads sees in one chunk."""

    chunk: int
    own: range
    """The chunk's own frames."""
    seen: tuple[Seen, ...]
    frames: float
    """Frames' worth of tokens that are attended to, the chunk's own among them."""
    codes: tuple[FewerBits, ...] = ()
    """What is cached in fewer bits of it is cached in."""


def head_kinds(plan: CachePlan) -> list[HeadKind]:
    """The kinds of heads of a plan, and of a policy's labels that no head has, in the order of its groups."""
    found, order = _kinds(plan), list(plan.policy.groups)
    missing = set(order) - {kind.group.label for kind in found}
    if missing:
        # What heads of these labels would see: of a map in which all labels have as many.
        even = map_with_counts(plan.spec, order, dict.fromkeys(order, 1))
        others = _kinds(build_plan(plan.spec, plan.geometry, plan.policy, even))
        found += [replace(kind, heads=0, layers=0) for kind in others if kind.group.label in missing]
    return sorted(found, key=lambda kind: order.index(kind.group.label))


def _kinds(plan: CachePlan) -> list[HeadKind]:
    of: dict[object, list[tuple[HeadGroup, int]]] = {}
    for group, layers in plan.kinds:
        of.setdefault((group.label, group.roles), []).append((group, layers))
    return [
        HeadKind(plan, same[0][0], sum(g.heads * layers for g, layers in same), sum(n for _, n in same))
        for same in of.values()
    ]


def example_choice(plan: CachePlan) -> Chosen:
    """Segments as a clean pass might choose them, evenly spaced: which ones it does, the video decides."""
    if plan.choice is None:
        return None
    return [n * plan.choice.candidates // plan.choice.kept for n in range(plan.choice.kept)]


def chunks_shown(plan: CachePlan) -> list[int]:
    """`CHUNKS`, and the first chunk at rest where that comes later."""
    rest = plan.phases[-1].first_chunk
    return [*CHUNKS, *([rest] if CHUNKS[-1] < rest <= MOST_CHUNKS else [])]


def timeline(kind: HeadKind, chunks: Sequence[int]) -> list[Row]:
    """What heads of a kind see in each of the chunks (`Role.example_spans`)."""
    return [_row(kind.plan, kind.group, chunk) for chunk in chunks]


def _row(plan: CachePlan, group: HeadGroup, chunk: int) -> Row:
    size, chosen = plan.frame_tokens, example_choice(plan)
    seen = [
        Seen(role.name, span.frame, span.offset / size, (span.offset + span.tokens) / size)
        for role in group.roles
        for span in role.example_spans(plan, group, chunk, chosen)
    ]
    tokens = plan.chunk_tokens + sum(role.seen_tokens(plan, group, chunk) for role in group.roles)
    first = chunk * plan.spec.frames_per_chunk
    own = range(first, first + plan.spec.frames_per_chunk)
    held = [role.dtype for role in group.roles if role.seen_tokens(plan, group, chunk)]
    codes = tuple(sorted({dtype for dtype in held if dtype is not None}))
    return Row(chunk, own, tuple(seen), tokens / size, codes)
