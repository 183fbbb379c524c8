"""The role `tokens`: single tokens of the frames that left the recent ones, those with the best scores.

Deep Forcing scores by recent queries, TriAttention by statistics of queries (docs/method.md, "Tokens by a
score"; docs/decisions/0056).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import check_bounds
from forcingkv.runtime.kv.leaving import (
    KEPT,
    LEAVES,
    check_recent,
    first_recent,
    leaving_frames,
    leaving_rows,
    recent_of,
)
from forcingkv.runtime.kv.roles import Chosen, Cuts, Role, Rows, Span
from forcingkv.runtime.kv.window import first_position
from forcingkv.runtime.spec import MOST_FRAMES, Geometry, ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup

Score = Literal["queries", "similarity", "statistics"]
SCORES: dict[Score, str] = {
    "queries": "those that the newest queries point to most",
    "similarity": "those least like the frame after them",
    "statistics": "those that queries to come will point to most, by statistics of the model's queries",
}
"""What a token is kept for, in words."""
THERE = "there"
"""Kind of what graphs are told: 1 or 0 for each token that is chosen from, those that are kept first."""
FOLLOWS = "follows"
"""Kind of what graphs are told: for each token of `LEAVES` the one in its place a frame later."""
PLACES = "places"
"""Kind of what graphs are told where positions are relative: by how many frames tokens are turned that are
kept, and those of each of the frames that leave."""


@dataclass(frozen=True)
class Tokens(Role):
    """Single tokens of the frames that left the recent ones, as many as a number of frames has.

    What leaves in a clean pass joins what was kept, and those with the best scores stay, in the order of the
    video; of equal scores the newer ones. Each head chooses for itself, or all heads of a group together.
    """

    frames: float
    """Room, in frames' worth of tokens: with a fraction of a frame that is a whole number of tokens."""
    score: Score
    together: bool = False
    """Whether the heads of a layer's group keep the same tokens: those with the best sum of their scores."""

    name: ClassVar[str] = "tokens"
    told_by_chunk: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bounds(self, {"frames": (0, MOST_FRAMES)}, f"the role {self.name}")

    def in_words(self, spec: ModelSpec) -> str:
        room = "a frame has" if self.frames == 1 else f"{self.frames:g} frames have"
        whose = "the same in all heads of a layer" if self.together else "in each head"
        return f"as many tokens as {room}, of frames that left: {SCORES[self.score]}, {whose}"

    @property
    def reads_queries(self) -> bool:
        return self.score == "queries"

    @property
    def reads_statistics(self) -> bool:
        return self.score == "statistics"

    @property
    def remembers(self) -> bool:
        """Whether a token's worth follows, in part, from what is known only as it leaves: it is cached."""
        return self.score != "queries"

    def budget(self, plan: CachePlan) -> int:
        """Tokens that it has room for."""
        return round(self.frames * plan.frame_tokens)

    def came(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        """Tokens that are kept when the chunk comes."""
        left = first_recent(plan, group, chunk) - group.opening_frames(plan.spec)
        return min(self.budget(plan), max(0, left) * plan.frame_tokens)

    def hidden_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        # A number for each token, a head's width of them in each hidden one.
        return -(-self.budget(plan) // plan.spec.head_dim) if self.remembers else 0

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        came = self.came(plan, group, chunk)
        return self.hidden_tokens(plan, group) + came if came else 0

    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return self.hidden_tokens(plan, group) + self.budget(plan)

    def spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        """The frames, up to the first choice. Raises InputError after it: scores alone say which."""
        opening, end = group.opening_frames(plan.spec), first_recent(plan, group, chunk)
        frames = range(opening, end)
        if len(frames) * plan.frame_tokens > self.budget(plan):
            raise InputError(
                f"which tokens the role {self.name} holds for chunk {chunk} depends on keys, in each layer by"
                " itself",
                where=f"policy {plan.policy.name}",
                hint="Take a policy without the role tokens where attention is to be told by frame.",
            )
        return [Span(frame, plan.frame_tokens) for frame in frames]

    def example_spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        """As if of all frames that left as many tokens stayed."""
        frames = range(group.opening_frames(plan.spec), first_recent(plan, group, chunk))
        ends = [self.came(plan, group, chunk) * n // max(len(frames), 1) for n in range(len(frames) + 1)]
        return [Span(f, ends[n + 1] - ends[n]) for n, f in enumerate(frames) if ends[n + 1] > ends[n]]

    def told(self, plan: CachePlan, group: HeadGroup, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        """What leaves (`LEAVES`), which tokens are there to choose from (`THERE`), which the next chunk finds
        (`KEPT`); what is compared with (`FOLLOWS`); and, where positions are relative, `PLACES`."""
        size, tokens = plan.spec.frames_per_chunk, plan.frame_tokens
        leaves, rows = leaving_frames(plan, group, chunk), leaving_rows(plan, group, chunk)
        first = chunk * size - (recent_of(group).frames or 0)
        held = np.arange(self.budget(plan)) < self.came(plan, group, chunk)
        left = np.repeat([frame in leaves for frame in range(first, first + size)], tokens)
        told = {
            KEPT: np.arange(self.tokens(plan, group, chunk + 1), dtype=np.int32),
            LEAVES: rows,
            THERE: np.concatenate([held, left]).astype(np.int32),
        }
        if self.score == "similarity":
            last = (chunk + 1) * size - 1 - first_recent(plan, group, chunk)
            within = rows % tokens
            told[FOLLOWS] = (np.minimum(rows // tokens + 1, last) * tokens + within).astype(np.int32)
        if plan.relative:
            place, following = (self._place(plan, group, count) for count in (chunk, chunk + 1))
            own = first_position(plan, chunk, chunk)
            stands = [own + frame - chunk * size for frame in range(first, first + size)]
            turns = [following - place, *(following - at for at in stands)]
            # What is not there is turned too, and nobody reads it.
            most = plan.window_frames
            told[PLACES] = np.clip(np.array(turns, np.int32), -most, most)
        return told

    @staticmethod
    def _place(plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        """Position of all that is kept, where positions are relative: right before the recent frames."""
        recent = chunk * plan.spec.frames_per_chunk - first_recent(plan, group, chunk)
        return first_position(plan, chunk, chunk) - recent - 1

    def reach(self, plan: CachePlan, group: HeadGroup) -> int:
        return (recent_of(group).frames or 0) + 1

    def rebuilt_from(self, spec: ModelSpec) -> tuple[int, int]:
        # Nobody keeps all that came by: after a switch the newest chunks fill it anew.
        return 0, -(-int(np.ceil(self.frames)) // spec.frames_per_chunk) + 1

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        check_recent(self.name, spec, roles, where)
        budget = self.frames * geometry.frame_tokens
        if abs(budget - round(budget)) > 1e-6 or budget < 1:
            raise InputError(
                f"{self.frames} frames are {budget:g} tokens at {geometry.width}x{geometry.height}",
                where=where,
                expected=f"a whole number of tokens, of which a frame has {geometry.frame_tokens}",
            )
        room = spec.attended_frames - spec.frames_per_chunk
        room -= sum(role.opening_frames(spec) for role in roles)
        if self.frames > room:
            raise InputError(
                f"tokens of {self.frames:g} frames are kept, more than the window has room for",
                where=where,
                expected=f"at most {room}: {spec.name} attends to {spec.attended_frames} frames, those of the"
                " sink and the chunk among them",
            )
