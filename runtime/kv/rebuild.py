"""Making the cache anew under another prompt: which chunks' clean passes are run again, on what latents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forcingkv.runtime.kv.plan import CachePlan

Floats = npt.NDArray[np.float32]


def replayed(plan: CachePlan, made: int) -> tuple[int, ...]:
    """The chunks whose clean passes, one after the other, make the cache anew after `made` chunks.

    All of them while they are few; then those that leave the cache as full as it was: the first chunk,
    where anything is kept of it, and the newest.
    """
    opening, newest = _kept(plan)
    if made <= opening + newest:
        return tuple(range(made))
    return (*range(opening), *range(made - newest, made))


class LatentHistory:
    """The latents that a rebuild may need: never more chunks than the cache's steady phase asks for."""

    def __init__(self, plan: CachePlan) -> None:
        self._plan = plan
        self._held: dict[int, Floats] = {}

    def add(self, index: int, latents: Floats) -> None:
        """Keep those of the newest chunk, and drop those that no rebuild will ask for again."""
        self._held[index] = latents.copy()  # the caller may change the chunk's own
        needed = set(replayed(self._plan, index + 1))
        self._held = {known: held for known, held in self._held.items() if known in needed}

    def get(self, made: int) -> dict[int, Floats]:
        """Index -> latents of the chunks to replay after `made` chunks, in order."""
        return {index: self._held[index] for index in replayed(self._plan, made)}


def _kept(plan: CachePlan) -> tuple[int, int]:
    """Chunks at the video's start, and newest chunks, that fill the cache as it is in the last phase."""
    needed = [(0, 0), *(role.rebuilt_from(plan.spec) for group in plan.groups for role in group.roles)]
    opening, newest = (max(chunks) for chunks in zip(*needed, strict=True))
    return opening, max(plan.phases[-1].first_chunk - opening, newest)
