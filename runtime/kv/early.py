"""The role `early`: what heads see until they are split, and no longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.kv.roles import Chosen, Recent, Role, Rows, Span, WholeFrames, whole_frames
from forcingkv.runtime.spec import Geometry, ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup
    from forcingkv.runtime.kv.rebuild import Encoding


@dataclass(frozen=True)
class Early(WholeFrames):
    """The frames before those of the role `recent`, until heads are split (`ModelSpec.ar_start`): then none.

    Where all heads are to see alike before the split, those with fewer recent frames than others take this
    beside them (docs/decisions/0042).
    """

    name: ClassVar[str] = "early"

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
        if not self.frames:
            raise InputError("the role early has no frames", where=where, expected="frames = 1 or more")
        if not any(isinstance(role, Recent) and role.frames_of(spec, roles) > 0 for role in roles):
            raise InputError(
                "early frames are those before the recent ones, and there are none",
                where=where,
                expected="the role recent, with at least 1 frame, in the same group",
            )

    def fitted(self, spec: ModelSpec, layer: int, roles: Sequence[Role]) -> Self | None:
        return self

    def _recent(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        """Frames that the role recent holds."""
        found = (role.tokens(plan, group, chunk) for role in group.roles if isinstance(role, Recent))
        return sum(found) // plan.frame_tokens

    @staticmethod
    def _most_recent(group: HeadGroup) -> int:
        return sum(role.frames or 0 for role in group.roles if isinstance(role, Recent))
