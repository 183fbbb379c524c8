"""Bytes of a session's memory for keys and values on torch, which joins those of a head group.

The memory itself: `runtime/backends/torch_cache.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forcingkv.runtime.kv.roles import Role
from forcingkv.runtime.spec import Dtype

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup

DECODED = "decoded"
"""What a pass reads of groups with a role in fewer bits: one memory that all of them, in all layers, use one
after the other."""


def joined_bytes(plan: CachePlan, compute: Dtype) -> dict[str, int]:
    """By role; the chunk's own is `current`.

    Of each role as attention reads it, in the phase in which its group sees most, and what is cached apart
    from that (`Role.apart_in`). Of groups with a role in fewer bits everything is cached apart: then there is
    a part `decoded`, and no part of it is in the others.
    """
    total = dict.fromkeys([*Role.KINDS, "current"], 0)
    wide, decoded = plan.wide_bytes(compute), 0
    for group, layers in plan.kinds:
        fullest, heads = fullest_chunk(plan, group), layers * group.heads
        seen = {role: role.seen_tokens(plan, group, fullest) for role in group.roles}
        if group.coded:
            decoded = max(decoded, group.heads * (sum(seen.values()) + plan.chunk_tokens) * wide)
        else:
            total["current"] += heads * plan.chunk_tokens * wide
        for role in group.roles:
            if not group.coded:
                total[role.name] += heads * seen[role] * wide
            if role.apart_in(plan, group, compute):
                total[role.name] += heads * apart_tokens(plan, group, role) * plan.token_bytes(role, compute)
    return total | ({DECODED: decoded} if decoded else {})


def fullest_chunk(plan: CachePlan, group: HeadGroup) -> int:
    """The last of the chunks in which the group sees most."""
    chunks = (phase.first_chunk for phase in plan.phases)
    return max(chunks, key=lambda at: (sum(r.seen_tokens(plan, group, at) for r in group.roles), at))


def apart_tokens(plan: CachePlan, group: HeadGroup, role: Role) -> int:
    """Tokens of a role that is cached apart: the most that it ever caches."""
    return max(role.buffer_tokens(plan, group))
