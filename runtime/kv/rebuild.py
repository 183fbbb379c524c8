"""Making the cache anew under another prompt: which chunks' clean passes are run again."""

from __future__ import annotations

from forcingkv.runtime.kv.plan import CachePlan


def replayed(plan: CachePlan, made: int) -> tuple[int, ...]:
    """The chunks whose clean passes, one after the other, make the cache anew after `made` chunks.

    All of them while they are few; then those that leave the cache as full as it was: the first chunk,
    where anything is kept of it, and the newest. A chunk that is left out is not asked for later either.
    """
    needed = [(0, 0), *(role.rebuilt_from(plan.spec) for group in plan.groups for role in group.roles)]
    opening, newest = (max(chunks) for chunks in zip(*needed, strict=True))
    newest = max(plan.phases[-1].first_chunk - opening, newest)
    if made <= opening + newest:
        return tuple(range(made))
    return (*range(opening), *range(made - newest, made))
