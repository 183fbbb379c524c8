"""The roles `early` and `opening`: what heads see until they are split, and no longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.kv.roles import (
    Chosen,
    Cuts,
    Recent,
    Role,
    Rows,
    Sink,
    Span,
    WholeFrames,
    counted,
    left_of_chunk,
    whole_frames,
)
from forcingkv.runtime.spec import Geometry, ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup
    from forcingkv.runtime.kv.rebuild import Encoding


@dataclass(frozen=True)
class Early(WholeFrames):
    """The frames before those of the role `recent`, until heads are split (`ModelSpec.ar_start`): then none.

    Where all heads are to see alike before the split, those with fewer recent frames than others take this
    beside them (docs/decisions/0042), and it alone where they keep none afterwards (docs/decisions/0052).
    `frames` None: the whole history, as far as the model attends to it.
    """

    name: ClassVar[str] = "early"
    why_exact: ClassVar[str] = ""

    def in_words(self, spec: ModelSpec) -> str:
        return f"the {counted(self._count)} before the recent ones, up to chunk {spec.ar_start}; then none"

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        if chunk > plan.spec.ar_start:
            return 0
        past = chunk * plan.spec.frames_per_chunk
        before = past - min(group.opening_frames(plan.spec), past) - self._recent(plan, group, chunk)
        return plan.frame_tokens * min(self._count, before)

    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return 0

    def rests_from(self, plan: CachePlan, group: HeadGroup) -> int:
        return plan.spec.ar_start + 1

    def buffer_tokens(self, plan: CachePlan, group: HeadGroup) -> tuple[int, ...]:
        return (plan.frame_tokens * self._count,) * self.buffers

    def spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        tokens = self.tokens(plan, group, chunk)
        end = chunk * plan.spec.frames_per_chunk - self._recent(plan, group, chunk)
        return whole_frames(plan, end - tokens // plan.frame_tokens, tokens)

    def told(self, plan: CachePlan, group: HeadGroup, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        beside = any(isinstance(role, Recent) for role in group.roles)  # it is told the same
        return {} if beside else left_of_chunk(plan, group, chunk)

    def next_tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        # A graph does not know when heads are split: it makes them in every pass of what there is, and the
        # session leaves them.
        opening = group.opening_frames(plan.spec)
        size = plan.spec.frames_per_chunk
        to_sink = min(opening, (chunk + 1) * size) - min(opening, chunk * size)
        held = self.tokens(plan, group, chunk) // plan.frame_tokens + self._recent(plan, group, chunk)
        there = held + size - to_sink - self._most_recent(group)
        return plan.frame_tokens * max(0, min(self._count, there))

    def tokens_of_hollow(self, plan: CachePlan, group: HeadGroup, passes: int) -> int:
        there = plan.spec.frames_per_chunk - self._most_recent(group)
        return plan.frame_tokens * max(0, min(self._count, there))

    def rebuilt_from(self, spec: ModelSpec) -> tuple[int, int]:
        return 0, -(-self._count // spec.frames_per_chunk) + 1

    def encoded_rows(self, plan: CachePlan, group: HeadGroup, encoding: Encoding) -> Rows | None:
        if self.tokens(plan, group, encoding.passes):
            return super().encoded_rows(plan, group, encoding)
        return np.arange(0, dtype=np.int32)  # heads are split at once

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        if self.frames == 0:
            what, expected = "the role early has no frames", "frames = 1 or more, or none said: all"
            raise InputError(what, where=where, expected=expected)

    def fitted(self, spec: ModelSpec, layer: int, roles: Sequence[Role]) -> Self | None:
        """With no more frames than there ever are of them before the split: memory is taken for so many."""
        opening = sum(role.opening_frames(spec) for role in roles)
        others = opening + sum(role.frames_of(spec, roles) for role in roles if isinstance(role, Recent))
        ever = spec.ar_start * spec.frames_per_chunk - others
        attended = spec.attended_frames - spec.frames_per_chunk - others
        count = min(ever, attended if self.frames is None else self.frames)
        return replace(self, frames=count) if count > 0 else None

    def _recent(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        """Frames that the role recent holds."""
        found = (role.tokens(plan, group, chunk) for role in group.roles if isinstance(role, Recent))
        return sum(found) // plan.frame_tokens

    @staticmethod
    def _most_recent(group: HeadGroup) -> int:
        return sum(role.frames or 0 for role in group.roles if isinstance(role, Recent))


@dataclass(frozen=True)
class Opening(Sink):
    """The video's first frames until heads are split (`ModelSpec.ar_start`), as a sink has them: then none.

    They stay its own: recent frames of the same group are never among them, as if there were a sink.
    """

    name: ClassVar[str] = "opening"

    def in_words(self, spec: ModelSpec) -> str:
        return f"the video's first {counted(self._count)}, up to chunk {spec.ar_start}; then none"

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        return super().tokens(plan, group, chunk) if chunk <= plan.spec.ar_start else 0

    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return 0

    def rests_from(self, plan: CachePlan, group: HeadGroup) -> int:
        return plan.spec.ar_start + 1

    def rows(self, plan: CachePlan, group: HeadGroup, chunk: int) -> Rows:
        taken = self.tokens(plan, group, chunk + 1) - self.tokens(plan, group, chunk)
        return np.arange(max(0, taken), dtype=np.int32)

    def held_rows(self, plan: CachePlan, group: HeadGroup, chunk: int) -> Rows:
        stays = chunk < min(self.filled_by(plan.spec), plan.spec.ar_start)
        return np.arange(self.tokens(plan, group, chunk) if stays else 0, dtype=np.int32)

    def most_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return self.tokens(plan, group, plan.spec.ar_start)

    def encoded_rows(self, plan: CachePlan, group: HeadGroup, encoding: Encoding) -> Rows | None:
        if not self.tokens(plan, group, encoding.passes):
            return np.arange(0, dtype=np.int32)  # heads are split at once
        if encoding.hollow:
            return Role.encoded_rows(self, plan, group, encoding)  # refused
        return super().encoded_rows(plan, group, encoding)

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        super().check(spec, geometry, roles, where)
        if any(role.opening_frames(spec) for role in roles if role is not self):
            what = "the group has a sink, which keeps the video's first frames, and an opening"
            raise InputError(what, where=where, expected="one of the two")

    def fitted(self, spec: ModelSpec, layer: int, roles: Sequence[Role]) -> Self | None:
        return super().fitted(spec, layer, roles) if spec.ar_start else None
