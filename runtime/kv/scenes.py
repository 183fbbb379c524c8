"""The role `scene`: newest frames, among which the first of the scene stay until the next one begins.

LongLive 2 pins the first frames of each shot where they lie in its window: they move to the front with the
frames around them, and stay there (its `multi_shot_sink`; docs/decisions/0048).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.kv.roles import Cuts, Recent, Role, Rows, Sink

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup
    from forcingkv.runtime.spec import ModelSpec

KEPT = "kept"
"""Kind of what graphs are told: which tokens stay, of those that are cached with the chunk's behind them."""


@dataclass(frozen=True)
class Scene(Recent):
    """The newest frames, as of `Recent`; but the first `ModelSpec.scene_frames` of the scene stay with them.

    In a video without cuts it holds what `Recent` holds.
    """

    name: ClassVar[str] = "scene"

    def in_words(self, spec: ModelSpec) -> str:
        return (
            f"{super().in_words(spec)}, the first {spec.scene_frames} of the scene among them while it lasts"
        )

    def told(self, plan: CachePlan, group: HeadGroup, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        """What stays of a clean pass (`KEPT`). Where positions are relative to the window, what stays in its
        place is told as its complement, -1 - i: it does not move with the window."""
        held, after = (self.frames_held(plan, group, count, cuts) for count in (chunk, chunk + 1))
        size = plan.spec.frames_per_chunk
        there = [*held, *range(chunk * size, (chunk + 1) * size)]
        places = {frame: place for place, frame in enumerate(there)}
        old = np.array([places[frame] for frame in after], np.int32)
        tokens = np.arange(plan.frame_tokens, dtype=np.int32)
        kept = old[:, None] * np.int32(plan.frame_tokens) + tokens
        if plan.relative:
            stays = old == np.arange(len(old))
            kept[stays] = -1 - kept[stays]
        return {KEPT: kept.reshape(-1)}

    def frames_held(self, plan: CachePlan, group: HeadGroup, passes: int, cuts: Cuts) -> list[int]:
        """The frames that are held after so many clean passes, in order; `cuts` are the passes with which
        scenes begin, rising."""
        size, opening = plan.spec.frames_per_chunk, group.opening_frames(plan.spec)
        pinned = plan.spec.scene_frames if self._count > plan.spec.scene_frames else 0
        begun = list(cuts[: bisect_left(cuts, passes)])
        # After so many passes nothing but the scene itself decides what is held: cuts further back need not
        # be looked at.
        settled, start = self._count // size + 2, passes
        while begun and start - begun[-1] < settled:
            start = begun.pop()
        held = self._newest(range(opening, start * size), self._pins(begun[-1:], size, pinned))
        for done in range(start, passes):
            cut = cuts[: bisect_right(cuts, done)][-1:]
            own = [frame for frame in range(done * size, (done + 1) * size) if frame >= opening]
            held = self._newest([*held, *own], self._pins(cut, size, pinned))
        return held

    @staticmethod
    def _pins(cut: Sequence[int], size: int, pinned: int) -> range:
        """The first frames of the scene that began with that pass, if one did."""
        return range(cut[0] * size, cut[0] * size + pinned) if cut else range(0)

    def _newest(self, frames: Sequence[int], pins: range) -> list[int]:
        newest = list(frames[-self._count :])
        if not pins or newest[0] <= pins[0]:
            return newest
        others = [frame for frame in frames if frame not in pins]
        return [*pins, *others[len(pins) - self._count :]]


def with_scenes(spec: ModelSpec, roles: Sequence[Role]) -> tuple[Role, ...]:
    """The roles of a group, the recent frames as those of scenes where the model keeps some of each.

    Not beside other roles than the sink, which take what leaves the recent frames, nor where these are no
    more than a scene's.
    """
    others = [role for role in roles if not isinstance(role, Sink)]
    if len(others) != 1 or type(others[0]) is not Recent or not spec.scene_frames:
        return tuple(roles)
    recent = others[0]
    scene = Scene(recent.frames, dtype=recent.dtype) if (recent.frames or 0) > spec.scene_frames else recent
    return tuple(scene if role is recent else role for role in roles)


def check_cut(plan: CachePlan) -> None:
    """Raise InputError where a model knows no scenes, or a window cannot keep the first frames of one."""
    spec = plan.spec
    if not spec.scene_frames and not spec.scene_offset:
        raise InputError(
            f"is cut, and {spec.name} was not trained with scenes (scene_frames and scene_offset are 0)",
            where="recache",
            hint="Switch the prompt with recache replay, keep-sink or none.",
        )
    uneven = {
        role.frames
        for group in plan.groups
        for role in group.roles
        if isinstance(role, Scene) and (role.frames or 0) % spec.frames_per_chunk
    }
    if plan.relative and uneven:
        raise InputError(
            f"is cut, and beside sink and chunk the window has {min(f or 0 for f in uneven)} frames, no whole"
            f" chunks of {spec.frames_per_chunk}: a scene's first frames would stop between two places",
            where="recache",
            hint="Choose absolute positions, or a policy whose recent frames are whole chunks.",
        )
