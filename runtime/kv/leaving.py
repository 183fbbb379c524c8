"""Which frames leave the recent ones of a group in a clean pass: what roles that remember are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.kv.roles import Recent, Role, Rows
from forcingkv.runtime.spec import ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup

KEPT = "kept"
"""Kind of what graphs are told: which tokens the next chunk finds, of those that a role's torch half puts one
behind the other."""
LEAVES = "leaves"
"""Kind of what graphs are told: tokens of the frames that leave, as many as a chunk has; in the recent frames
as they are cached, with the chunk's tokens behind them."""


def recent_of(group: HeadGroup) -> Recent:
    """The role that frames leave (`check_recent`)."""
    return next(role for role in group.roles if isinstance(role, Recent))


def first_recent(plan: CachePlan, group: HeadGroup, chunk: int) -> int:
    """The oldest frame that is recent to a chunk, or the chunk's own first where none is."""
    held = recent_of(group).tokens(plan, group, chunk) // plan.frame_tokens
    return chunk * plan.spec.frames_per_chunk - held


def leaving_frames(plan: CachePlan, group: HeadGroup, chunk: int) -> range:
    """The frames that the clean pass of a chunk finds, and that the next chunk does not see as recent."""
    after = first_recent(plan, group, chunk + 1)
    return range(min(max(first_recent(plan, group, chunk), group.opening_frames(plan.spec)), after), after)


def first_full(plan: CachePlan, group: HeadGroup) -> int:
    """The first chunk whose clean pass lets as many frames leave as a chunk has; so does every later one."""
    held = group.opening_frames(plan.spec) + (recent_of(group).frames or 0)
    return -(-held // plan.spec.frames_per_chunk)


def leaving_rows(plan: CachePlan, group: HeadGroup, chunk: int) -> Rows:
    """What is told as `LEAVES`: the chunk's worth of frames up to the first that stays recent. Of those that
    are not there, early in a video, the oldest that is: nobody takes what is made of it."""
    size, recent = plan.spec.frames_per_chunk, recent_of(group).frames or 0
    first = chunk * size - recent - first_recent(plan, group, chunk)
    frames = np.maximum(np.arange(first, first + size, dtype=np.int32), 0)
    tokens = np.arange(plan.frame_tokens, dtype=np.int32)
    return (frames[:, None] * np.int32(plan.frame_tokens) + tokens).reshape(-1)


def check_recent(name: str, spec: ModelSpec, roles: Sequence[Role], where: str) -> None:
    """Raise InputError in a group that has no recent frames."""
    if not any(isinstance(role, Recent) and role.frames_of(spec, roles) > 0 for role in roles):
        raise InputError(
            f"the role {name} is made of frames that leave the recent ones, and there are none",
            where=where,
            expected="the role recent, with at least 1 frame, in the same group",
        )
