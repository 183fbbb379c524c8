"""The role `bank`: a few frames of the whole video, chosen so that they resemble each other least.

MemFlow keeps such a bank, and chooses by the prompt (docs/method.md, "A bank of frames";
docs/decisions/0055).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import check_bounds
from forcingkv.runtime.kv.leaving import KEPT, check_recent, first_recent, leaving_frames, recent_of
from forcingkv.runtime.kv.roles import Chosen, Cuts, Role, Rows, Span
from forcingkv.runtime.kv.window import first_position
from forcingkv.runtime.spec import MOST_FRAMES, Geometry, ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup

MOST_AT_A_TIME = 16
POOL = "pool"
"""Kind of what graphs are told: tokens of the frames that are chosen from, the bank's first; in what is
cached of the bank and of the recent frames, with the chunk's behind them."""
THERE = "there"
"""Kind of what graphs are told: how many of these frames are there. Those behind them only fill it up."""
PLACES = "places"
"""Kind of what graphs are told where positions are relative: those of the frames that are chosen from, and
behind them those of the frames that are kept."""


@dataclass(frozen=True)
class Bank(Role):
    """Frames of the whole video, the least redundant of those that came by.

    Frames 0, k, 2k, ... come to the bank as they leave the recent ones; those of the sink do not. Once there
    are more than it has room for, the frame goes whose keys are most like those of all others there (ties:
    the oldest), until they fit. Each layer's group of heads chooses for itself.
    """

    frames: int
    """Room of the bank."""
    every: int = 1
    """k, in frames of the video."""

    name: ClassVar[str] = "bank"
    why_exact: ClassVar[str] = ""
    told_by_chunk: ClassVar[bool] = True

    def __post_init__(self) -> None:
        most = MOST_FRAMES
        check_bounds(self, {"frames": (1, most), "every": (1, most)}, f"the role {self.name}")
        if self.every * self.frames > most:
            reach = self.every * self.frames
            what = f"{self.frames} of every {self.every} frames are there after {reach} frames"
            raise InputError(what, where=f"the role {self.name}", expected=f"at most {most}")

    def in_words(self, spec: ModelSpec) -> str:
        which = f"one in {self.every} of the frames that left" if self.every > 1 else "the frames that left"
        return f"{self.frames} of {which}, those least like each other, of the whole video"

    def at_a_time(self, spec: ModelSpec) -> int:
        """The most frames that come to the bank in one clean pass."""
        return -(-spec.frames_per_chunk // self.every)

    def came(self, plan: CachePlan, group: HeadGroup, chunk: int) -> list[int]:
        """The frames that came to the bank before the chunk, as many as it has room for."""
        opening, end = group.opening_frames(plan.spec), first_recent(plan, group, chunk)
        first = -(-opening // self.every) * self.every
        return [*range(first, end, self.every)[: self.frames]]

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        return plan.frame_tokens * len(self.came(plan, group, chunk))

    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return plan.frame_tokens * self.frames

    def spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        """The frames, up to the first choice. Raises InputError after it: their keys alone say which."""
        came = self.came(plan, group, chunk)
        past = range(first_recent(plan, group, chunk))
        if came and came[-1] + self.every in past:
            raise InputError(
                f"which frames the role {self.name} holds for chunk {chunk} depends on keys, in each layer by"
                " itself",
                where=f"policy {plan.policy.name}",
                hint="Take a policy without a bank where attention is to be told by frame.",
            )
        return [Span(frame, plan.frame_tokens) for frame in came]

    def example_spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        """As if those stayed that lie furthest from each other."""
        first = -(-group.opening_frames(plan.spec) // self.every) * self.every
        frames = range(first, first_recent(plan, group, chunk), self.every)
        held = len(self.came(plan, group, chunk))
        return [Span(frames[n * len(frames) // held], plan.frame_tokens) for n in range(held)]

    def told(self, plan: CachePlan, group: HeadGroup, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        """What is chosen from (`POOL`, `THERE`), which tokens of the chosen frames the next chunk finds
        (`KEPT`), and, where positions are relative, where they stand (`PLACES`)."""
        size, room = plan.spec.frames_per_chunk, self.frames + self.at_a_time(plan.spec)
        held, after = (len(self.came(plan, group, count)) for count in (chunk, chunk + 1))
        oldest = first_recent(plan, group, chunk)
        new = [frame for frame in leaving_frames(plan, group, chunk) if frame % self.every == 0]
        pool = [*range(held), *(held + frame - oldest for frame in new)]
        there = len(pool)
        pool += [held] * (room - there)  # some frame that there is in any chunk
        tokens = np.arange(plan.frame_tokens, dtype=np.int32)
        told = {
            KEPT: np.arange(after * plan.frame_tokens, dtype=np.int32),
            POOL: (np.array(pool, np.int32)[:, None] * np.int32(plan.frame_tokens) + tokens).reshape(-1),
            THERE: np.array([there], np.int32),
        }
        if not plan.relative:
            return told
        own = first_position(plan, chunk, chunk)
        begin = self._first_place(plan, group, chunk, held)
        places = [*range(begin, begin + held), *(own + frame - chunk * size for frame in new)]
        places += [own] * (room - there)
        begin = self._first_place(plan, group, chunk + 1, after)
        kept = [*range(begin, begin + after), *[own] * (self.frames - after)]
        return told | {PLACES: np.array([*places, *kept], np.int32)}

    @staticmethod
    def _first_place(plan: CachePlan, group: HeadGroup, chunk: int, held: int) -> int:
        """Position of the bank's first frame: its frames stand side by side right before the recent ones."""
        recent = chunk * plan.spec.frames_per_chunk - first_recent(plan, group, chunk)
        return first_position(plan, chunk, chunk) - recent - held

    def reach(self, plan: CachePlan, group: HeadGroup) -> int:
        return (recent_of(group).frames or 0) + self.frames

    def rebuilt_from(self, spec: ModelSpec) -> tuple[int, int]:
        # Nobody keeps all that came by: after a switch the newest chunks fill it anew.
        return 0, -(-self.every * self.frames // spec.frames_per_chunk) + 1

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        check_recent(self.name, spec, roles, where)
        opening = sum(role.opening_frames(spec) for role in roles)
        room = spec.attended_frames - spec.frames_per_chunk - opening
        if self.frames > room:
            raise InputError(
                f"the bank has {self.frames} frames, more than the window has room for",
                where=where,
                expected=f"at most {room}: {spec.name} attends to {spec.attended_frames} frames, those of the"
                " sink and the chunk among them",
            )
        if self.at_a_time(spec) > MOST_AT_A_TIME:
            raise InputError(
                f"{self.at_a_time(spec)} frames come to the bank with every chunk",
                where=where,
                expected=f"at most {MOST_AT_A_TIME}",
                hint="Let fewer of them come: a larger every.",
            )
