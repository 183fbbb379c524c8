"""Where frames lie in time, for the rotary embedding: in the video, or in the window that moves with it.

Relative to the window, what is kept for ever has the positions 0, 1, ... and every other frame its true
distance to the chunk, which itself stays where the window ends once that is full. docs/method.md,
"Positions"; docs/decisions/0040.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup


def first_position(plan: CachePlan, passes: int, chunk: int) -> int:
    """Position of the first frame of a chunk.

    Args:
        plan: the cache plan.
        passes: clean passes whose keys and values the cache holds, or has held.
        chunk: index of the chunk in the video. The window does not know it: a cache that was made anew is one
            of a video that has just begun.
    """
    frames = plan.spec.frames_per_chunk
    return min(passes * frames, plan.window_frames - frames) if plan.relative else chunk * frames


def scene_shift(plan: CachePlan, cuts: int) -> float:
    """Frames by which positions lie further on after so many cuts to other scenes: those in the video jump
    with each, those in the window do not."""
    return 0.0 if plan.relative else cuts * plan.spec.scene_offset


def moved_by(plan: CachePlan, passes: int) -> int:
    """Frames by which the clean pass after `passes` others moves keys, those of its own chunk among them.

    0 while the window fills, or where positions are absolute; then below 0.
    """
    if not plan.relative:
        return 0
    here, there = (first_position(plan, count, count) for count in (passes, passes + 1))
    return there - here - plan.spec.frames_per_chunk


def in_words(plan: CachePlan) -> str:
    """What positions are counted from, for people."""
    if plan.relative:
        return f"relative to the window of {plan.window_frames} frames"
    return "absolute: from the start of the video"


def window_frames(plan: CachePlan) -> int:
    """Frames of the widest window of all head groups: what it keeps for ever, what moves, and the chunk."""
    return plan.spec.frames_per_chunk + max(_before_the_chunk(plan, group) for group, _ in plan.kinds)


def _before_the_chunk(plan: CachePlan, group: HeadGroup) -> int:
    reach = max((role.reach(plan, group) for role in group.roles if role.moves), default=0)
    return group.opening_frames(plan.spec) + reach
