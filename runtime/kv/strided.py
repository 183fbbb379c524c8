"""The role `strided`: every k-th frame of the video, the newest of them.

Pyramid Forcing's anchor heads see every 6th frame, its wave heads those that lie whole periods of 6 frames
before their own (docs/method.md, "Strided frames"; docs/decisions/0053).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import check_bounds
from forcingkv.runtime.kv.leaving import KEPT, check_recent, first_recent, recent_of
from forcingkv.runtime.kv.roles import Chosen, Cuts, Role, Rows, Span, counted
from forcingkv.runtime.spec import MOST_FRAMES, Geometry, ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup


@dataclass(frozen=True)
class Strided(Role):
    """Every k-th frame of the video that has left the recent ones and is not in the sink: the newest of them.

    Frames 0, k, 2k, ...; or, `cyclic`, those that lie whole multiples of k before the chunk's first frame.
    The frames that other chunks see in their turn are cached then too, and not attended to.
    """

    every: int
    """k, in frames of the video."""
    frames: int
    """The most that a chunk sees."""
    cyclic: bool = False

    name: ClassVar[str] = "strided"
    why_exact: ClassVar[str] = ""
    told_by_chunk: ClassVar[bool] = True

    def __post_init__(self) -> None:
        most = MOST_FRAMES
        check_bounds(self, {"every": (1, most), "frames": (1, most)}, f"the role {self.name}")
        if self.every * self.frames > most:
            what = f"{self.frames} of every {self.every} frames reach over {self.every * self.frames} frames"
            raise InputError(what, where=f"the role {self.name}", expected=f"at most {most}")

    def in_words(self, spec: ModelSpec) -> str:
        if self.every == 1:
            return f"the {counted(self.frames)} before the recent ones"
        which = (
            f"whole multiples of {self.every} before the chunk" if self.cyclic else f"0, {self.every}, ..."
        )
        newest = f"the newest {self.frames}"
        return f"one in {self.every} of the frames that left ({which}), {newest}"

    def seen_frames(self, plan: CachePlan, group: HeadGroup, chunk: int, ahead: int = 0) -> list[int]:
        """The frames that the chunk sees; of those that are there then, those that the chunk sees that comes
        `ahead` later."""
        first = (chunk + ahead) * plan.spec.frames_per_chunk % self.every if self.cyclic else 0
        there = range(first, first_recent(plan, group, chunk), self.every)
        return [frame for frame in there if frame >= group.opening_frames(plan.spec)][-self.frames :]

    def turns(self, plan: CachePlan) -> int:
        """How many chunks that follow one another see other frames."""
        return self.every // math.gcd(self.every, plan.spec.frames_per_chunk) if self.cyclic else 1

    def hidden_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return plan.frame_tokens * self.frames * (self.turns(plan) - 1)

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        hidden = self.hidden_tokens(plan, group) if chunk else 0
        return hidden + plan.frame_tokens * len(self.seen_frames(plan, group, chunk))

    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return plan.frame_tokens * self.frames * self.turns(plan)

    def spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        return [Span(frame, plan.frame_tokens) for frame in self.seen_frames(plan, group, chunk)]

    def told(self, plan: CachePlan, group: HeadGroup, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        """Which tokens the next chunk finds (`KEPT`), of those that are cached with the recent frames' and
        the chunk's behind them."""
        held = self._cached(plan, group, chunk)
        oldest = first_recent(plan, group, chunk)
        size, recent = plan.spec.frames_per_chunk, recent_of(group)
        assert recent.tokens(plan, group, chunk) == (chunk * size - oldest) * plan.frame_tokens
        there = [*held, *range(oldest, (chunk + 1) * size)]
        places = {frame: place for place, frame in enumerate(there) if frame is not None}
        # Places that are not taken yet hold some frame of the chunk: nobody reads it.
        following = [places[f] if f is not None else len(held) for f in self._cached(plan, group, chunk + 1)]
        tokens = np.arange(plan.frame_tokens, dtype=np.int32)
        rows = np.array(following, np.int32)[:, None] * np.int32(plan.frame_tokens) + tokens
        return {KEPT: rows.reshape(-1)}

    def _cached(self, plan: CachePlan, group: HeadGroup, chunk: int) -> list[int | None]:
        """The frames that are cached when the chunk comes: those that it does not see, in the places that
        they have, and those that it sees."""
        hidden: list[int | None] = []
        for ahead in range(1, self.turns(plan) if chunk else 1):
            frames = self.seen_frames(plan, group, chunk, ahead)
            hidden += [*frames, *[None] * (self.frames - len(frames))]
        return [*hidden, *self.seen_frames(plan, group, chunk)]

    def reach(self, plan: CachePlan, group: HeadGroup) -> int:
        return (recent_of(group).frames or 0) + self.every * self.frames

    def rebuilt_from(self, spec: ModelSpec) -> tuple[int, int]:
        return 0, -(-self.every * self.frames // spec.frames_per_chunk) + 1

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        check_recent(self.name, spec, roles, where)
