"""The role `retained`: segments of the frames that leave the cache, chosen anew at every clean pass.

docs/method.md, "Segment similarity and retention".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import check_bounds
from forcingkv.headmaps.headmap import MOST
from forcingkv.runtime.kv.roles import Chosen, Recent, Role, Rows, Span
from forcingkv.runtime.kv.segments import Split
from forcingkv.runtime.spec import Geometry, ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup
    from forcingkv.runtime.kv.rebuild import Encoding


@dataclass(frozen=True)
class Choice:
    """Which segments of the frames that leave the cache are kept."""

    role: Retained
    layer: int
    """The first layer that chooses."""
    candidates: int
    """Segments of the frames that leave the recent ones: of the old transition frame, and of all frames of
    the finished chunk but its last."""
    kept: int
    split: Split


Choose = Literal["least-similar", "uniform", "random"]
"""Which candidate segments are kept: those least similar to the same place one frame later; evenly spaced
ones, the same at every chunk; or ones drawn anew at every chunk."""

CHOSEN: dict[Choose, str] = {
    "least-similar": "those least like the frame after them",
    "uniform": "evenly spaced",
    "random": "drawn anew for each chunk",
}
"""In words."""


@dataclass(frozen=True)
class Retained(Role):
    """Segments of the frames that leave the cache, chosen anew at every clean pass after the split.

    docs/method.md, "Segment similarity and retention".
    """

    segments: int
    """Runs that a frame's tokens are split into, as even as they go (`Split`)."""
    ratio: float
    """Share of the candidate segments that is kept (the retention ratio)."""
    score_layer: int = 0
    """First layer that retains and chooses; later layers use its choice."""
    choose: Choose = "least-similar"
    shared: bool = True
    """Whether later layers use the first one's choice. False: every layer chooses for itself."""
    seed: int = 0
    """What `random` draws from, with the index of the chunk."""

    name: ClassVar[str] = "retained"
    why_exact: ClassVar[str] = ""
    chooses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        bounds = {
            "segments": (1, 4096),
            "ratio": (0, 1),
            "score_layer": (0, MOST),
            "seed": (0, (1 << 63) - 1),
        }
        check_bounds(self, bounds, "the role retained")

    def in_words(self, spec: ModelSpec) -> str:
        there, kept = self.segments * spec.frames_per_chunk, self.kept(spec.frames_per_chunk)
        each = "" if self.shared else ", chosen in each layer"
        return f"{kept} of the {there} segments of the frames that left last, {CHOSEN[self.choose]}{each}"

    def choice(self, plan: CachePlan, layer: int) -> Choice:
        """What is chosen in a plan whose first layer with this role is `layer`."""
        frames = plan.spec.frames_per_chunk
        return Choice(self, layer, self.segments * frames, self.kept(frames), self.split(plan))

    def split(self, plan: CachePlan) -> Split:
        """How a frame is split."""
        return Split(plan.frame_tokens, self.segments)

    def can_choose(self, plan: CachePlan, group: HeadGroup, chunk: int) -> bool:
        """Whether the chunk finds a transition frame in the cache of the group."""
        return any(isinstance(role, Recent) and role.tokens(plan, group, chunk) for role in group.roles)

    def kept(self, frames_per_chunk: int) -> int:
        """Segments kept of those of a chunk's worth of frames."""
        return round(self.segments * frames_per_chunk * self.ratio)

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        return self.steady_tokens(plan, group) if plan.chooses(chunk - 1) else 0

    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return self.split(plan).kept_tokens * self.kept(plan.spec.frames_per_chunk)

    def spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        if not self.tokens(plan, group, chunk):
            return []
        assert chosen is not None, "the clean pass before this chunk chose segments"
        split = self.split(plan)
        # Candidate frames begin with the oldest recent frame of the chunk that was then current.
        recent = sum(r.tokens(plan, group, chunk - 1) for r in group.roles if isinstance(r, Recent))
        oldest = (chunk - 1) * plan.spec.frames_per_chunk - recent // plan.frame_tokens
        places = [divmod(index, self.segments) for index in chosen]
        return [Span(oldest + frame, split.kept_tokens, split.start(place)) for frame, place in places]

    def reach(self, plan: CachePlan, group: HeadGroup) -> int:
        recent = sum(role.frames or 0 for role in group.roles if isinstance(role, Recent))
        return plan.spec.frames_per_chunk + recent  # the chunk before, and the recent frames that it had

    def encoded_rows(self, plan: CachePlan, group: HeadGroup, encoding: Encoding) -> Rows | None:
        return np.arange(0, dtype=np.int32)

    def next_tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        # In the graph in every phase; the session takes it when it is due.
        return self.steady_tokens(plan, group)

    def tokens_of_hollow(self, plan: CachePlan, group: HeadGroup, passes: int) -> int:
        return self.steady_tokens(plan, group)

    def fitted(self, spec: ModelSpec, layer: int, roles: Sequence[Role]) -> Self | None:
        return self if layer >= self.score_layer else None

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        if not any(isinstance(role, Recent) and role.frames_of(spec, roles) > 0 for role in roles):
            raise InputError(
                "segments are retained without a transition frame",
                where=where,
                expected="the role recent, with at least 1 frame, in the same group",
            )
        if not 1 <= self.segments <= geometry.frame_tokens:
            raise InputError(
                f"{self.segments} segments are asked of the {geometry.frame_tokens} tokens of a frame"
                f" at {geometry.width}x{geometry.height}",
                where=where,
                expected=f"1 to {geometry.frame_tokens}, so that each has a token",
                hint="Take a larger resolution, or a policy of fewer segments.",
            )
        if not self.kept(spec.frames_per_chunk) >= 1:
            candidates = self.segments * spec.frames_per_chunk
            raise InputError(f"ratio {self.ratio} of {candidates} segments keeps none", where=where)

    def in_any_layer(self) -> Self:
        return replace(self, score_layer=0)
