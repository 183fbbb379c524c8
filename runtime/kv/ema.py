"""The role `ema`: moving averages of what leaves the recent frames, each as large as a frame.

MemRoPE keeps two of them, each one key and one value a head; Reward Forcing lets its sink be one, token by
token (docs/method.md, "Averages"; docs/decisions/0053).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import check_bounds
from forcingkv.runtime.kv.leaving import KEPT, LEAVES, check_recent, first_full, leaving_rows
from forcingkv.runtime.kv.roles import Chosen, Cuts, Role, Rows, Span, whole_frames
from forcingkv.runtime.spec import MOST_FRAMES, Dtype, Geometry, ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup

UPDATE = "update"
"""Kind of what graphs are told: what becomes of the averages, one of the next three."""
STAYS, STARTS, MIXES = 0, 1, 2
MOST_AVERAGES = 64

Of = Literal["frames", "tokens"]
"""What an average takes in: the mean of all tokens of all frames that leave, one key and one value a head,
which all of its tokens have; or the tokens of one of these frames, each that of its place."""
Starts = Literal["first", "leaving"]
"""What it starts as: the frame of the video's start whose place it has, or the first that it takes in."""


@dataclass(frozen=True)
class Ema(Role):
    """Exponential moving averages of what leaves the recent frames, each in the place of a frame.

    At the video's start they are frames: those after the sink's. From the first clean pass on that lets as
    many frames leave the recent ones as a chunk has, average n becomes `(1 - rates[n]) * average + rates[n] *
    new`. Keys are averaged as they are before rotation, and keep the position of the frame whose place they
    have. They are cached in float32: to a small rate bfloat16 stands still.
    """

    rates: tuple[float, ...]
    """Share of the new in each average: MemRoPE's long one 0.01, its short one 0.1. One frame's worth of
    tokens for each. Of tokens one rate is that of as many averages as a chunk has frames."""
    of: Of = "frames"
    starts: Starts = "leaving"

    name: ClassVar[str] = "ema"
    why_exact: ClassVar[str] = (
        "an average goes on from what is cached, and to a small rate it would stand still"
    )
    moves: ClassVar[bool] = False
    told_by_chunk: ClassVar[bool] = True
    read_as_cached: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bounds(self, {"rates": (0, 1)}, f"the role {self.name}")
        if not 1 <= len(self.rates) <= MOST_AVERAGES:
            what = f"the role {self.name} has {len(self.rates)} rates"
            raise InputError(what, where="rates", expected=f"1 to {MOST_AVERAGES}, one for each average")

    def in_words(self, spec: ModelSpec) -> str:
        shares = " and ".join(f"{rate:g}" for rate in dict.fromkeys(self.rates))
        what = (
            f"{len(self.rates)} moving average{'s'[: len(self.rates) > 1]} of what leaves the recent frames"
        )
        how = {"frames": "", "tokens": ", token by token"}[self.of]
        return (
            f"{what}{how}, {shares} of the new at a time; in the places of the first frames that no sink has"
        )

    def count(self, spec: ModelSpec) -> int:
        """How many averages there are in a model."""
        alike = self.of == "tokens" and len(self.rates) == 1
        return spec.frames_per_chunk if alike else len(self.rates)

    def fitted(self, spec: ModelSpec, layer: int, roles: Sequence[Role]) -> Self | None:
        return replace(self, rates=self.rates * (self.count(spec) // len(self.rates)))

    def first_frame(self, plan: CachePlan, group: HeadGroup) -> int:
        """The frame of the video whose place the first average has: the one after the sink's."""
        return group.opening_frames(plan.spec) - len(self.rates)

    def update(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        """What the clean pass of a chunk makes of the averages: `STAYS`, `STARTS` or `MIXES`."""
        first = first_full(plan, group)
        if chunk < first:
            return STAYS
        return STARTS if chunk == first and self.starts == "leaving" else MIXES

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        there = chunk * plan.spec.frames_per_chunk - self.first_frame(plan, group)
        return plan.frame_tokens * min(max(there, 0), len(self.rates))

    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return plan.frame_tokens * len(self.rates)

    def spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        """The frames whose places the averages have."""
        return whole_frames(plan, self.first_frame(plan, group), self.tokens(plan, group, chunk))

    def told(self, plan: CachePlan, group: HeadGroup, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        """What leaves (`LEAVES`), what becomes of the averages (`UPDATE`), and which tokens the next chunk
        sees (`KEPT`), of the averages with the chunk's behind them."""
        held, after = (self.tokens(plan, group, count) for count in (chunk, chunk + 1))
        # The frames that come in lie in the chunk behind those of the sink.
        begin = plan.frame_tokens * self.first_frame(plan, group) + held - chunk * plan.chunk_tokens
        taken = self.steady_tokens(plan, group) + begin + np.arange(after - held)
        return {
            KEPT: np.concatenate([np.arange(held), taken]).astype(np.int32),
            LEAVES: leaving_rows(plan, group, chunk),
            UPDATE: np.array([self.update(plan, group, chunk)], np.int32),
        }

    def opening_frames(self, spec: ModelSpec) -> int:
        return self.count(spec)

    def rebuilt_from(self, spec: ModelSpec) -> tuple[int, int]:
        # Nobody keeps all that went into an average: after a switch it starts anew.
        first = self.count(spec) if self.starts == "first" else 0
        return -(-first // spec.frames_per_chunk), 1

    def exact_dtype(self, compute: Dtype) -> Dtype:
        return "float32"

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        check_recent(self.name, spec, roles, where)
        opening = sum(role.opening_frames(spec) for role in roles)
        if opening > spec.attended_frames - spec.frames_per_chunk or opening > MOST_FRAMES:
            raise InputError(
                f"sink and averages take the place of {opening} frames",
                where=where,
                expected=f"at most {spec.attended_frames - spec.frames_per_chunk}: {spec.name} attends to"
                f" {spec.attended_frames}, those of the chunk among them",
            )
        if self.count(spec) > MOST_AVERAGES:
            what = f"there are {self.count(spec)} averages, one for each frame of a chunk"
            raise InputError(what, where=where, expected=f"at most {MOST_AVERAGES}")
        if self.of == "tokens" and self.count(spec) != spec.frames_per_chunk:
            raise InputError(
                f"{len(self.rates)} averages are made token by token of the {spec.frames_per_chunk} frames"
                " that leave at a time",
                where=where,
                expected=f"1 rate for all of them, or {spec.frames_per_chunk}, one for each frame of a chunk",
            )
