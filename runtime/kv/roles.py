"""Roles: what a cached token is to a head. A policy gives each group of heads an ordered list of them.

A role is one class here and one in `models/kv_roles.py`. This one knows all that can be said without looking
at keys; the other one how keys and values follow from a pass. Everything else asks them: nothing knows a role
by its name. `docs/extending.md` shows how a role is added.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import LEFT_OUT_IF_NONE, Tagged, check_bounds
from forcingkv.runtime.kv.codes import FewerBits
from forcingkv.runtime.spec import MOST_FRAMES, Dtype, Geometry, ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup
    from forcingkv.runtime.kv.rebuild import Encoding


Rows = npt.NDArray[np.int32]
ROWS, HELD = "rows", "held"
"""Kinds of what graphs are told of a chunk: its tokens that a role takes; of a role's own those that stay."""
Cuts: TypeAlias = Sequence[int]
"""The clean passes with which scenes begin, but the first: rising, counted as `KvCache.passes` is."""
Chosen: TypeAlias = Sequence[int] | None
"""Indices of the segments that the clean pass before a chunk chose, if it did."""


@dataclass(frozen=True)
class Span:
    """Cached tokens that lie side by side in one latent frame."""

    frame: int
    """Index of the latent frame in the video."""
    tokens: int
    offset: int = 0
    """Tokens of the frame before them."""


@dataclass(frozen=True)
class Role(Tagged, ABC):
    """One kind of cached tokens of a group of heads. Its fields are its parameters in policy files.

    `chunk` is the index of a chunk; lengths are in tokens of one head.
    """

    dtype: FewerBits | None = field(default=None, kw_only=True, metadata=LEFT_OUT_IF_NONE)
    """Fewer bits than the model computes in, which its keys and values are cached in (`runtime.kv.codes`)."""

    TAG: ClassVar[str] = "role"
    KINDS: ClassVar[dict[str, type[Role]]] = {}

    buffers: ClassVar[int] = 2
    """2: read and written in turn. 1: no pass that reads it writes it. See `buffer_tokens`."""
    takes_rows: ClassVar[bool] = False
    """Whether the step graph has an input that says which tokens of the chunk it takes (see `rows`)."""
    told_by_chunk: ClassVar[bool] = False
    """Whether what graphs are told (`told`) differs from chunk to chunk of a phase; its lengths never do."""
    chooses: ClassVar[bool] = False
    """Whether it keeps what a `Choice` says."""
    moves: ClassVar[bool] = True
    """Whether its keys move with the window, where positions are relative to it. False: they are those of the
    video's first frames for ever."""
    read_as_cached: ClassVar[bool] = True
    """False: its torch half has a `read` of its own, which makes what is attended to of what is cached."""
    why_exact: ClassVar[str] = "what it makes of codes was never tried"
    """Why it cannot be cached in fewer bits; empty: it can."""

    @abstractmethod
    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        """Tokens that are cached when the chunk comes. It sees them, all but `hidden_tokens`."""

    @abstractmethod
    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        """What it caches at rest: once `tokens` is there, from `rests_from` on, it stays there."""

    @abstractmethod
    def spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        """Which frames the tokens that the chunk sees are of, in the order in which they are cached."""

    def example_spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        """`spans`, or, where keys alone say which they are, such as they might be: for pictures."""
        return self.spans(plan, group, chunk, chosen)

    @property
    def reads_queries(self) -> bool:
        """Whether what it keeps depends on the queries of clean passes."""
        return False

    @property
    def reads_statistics(self) -> bool:
        """Whether what it keeps depends on statistics of the model's queries (`CachePlan.statistics`)."""
        return False

    def hidden_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        """How many of the first cached tokens are for later chunks: attention does not read them."""
        return 0

    def seen_tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        """Cached tokens that attention reads in the chunk."""
        return max(0, self.tokens(plan, group, chunk) - self.hidden_tokens(plan, group))

    def next_tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        """Tokens that a pass of the chunk writes: what the next chunk sees, unless a role says otherwise."""
        return self.tokens(plan, group, chunk + 1)

    def tokens_of_hollow(self, plan: CachePlan, group: HeadGroup, passes: int) -> int:
        """Tokens that a clean pass writes which finds the sink alone (`KvCache.hollow`): what there is to be
        after `passes` of them, unless a role says otherwise."""
        return self.tokens(plan, group, passes)

    def rows(self, plan: CachePlan, group: HeadGroup, chunk: int) -> Rows:
        """The chunk's tokens that it takes, for graphs that are told (`takes_rows`); equal within a phase."""
        return np.arange(0, dtype=np.int32)

    def told(self, plan: CachePlan, group: HeadGroup, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        """What graphs are told of the chunk, by the name of its kind: which of the chunk's tokens it takes
        (`rows`), and what a role's own torch half asks for. Names are always the same, lengths within a
        phase, and all of it without cuts, where the role is not `told_by_chunk`. What has the same length in
        every phase has it in graphs too (`CachePlan.told_lengths`)."""
        return {ROWS: self.rows(plan, group, chunk)} if self.takes_rows else {}

    def rests_from(self, plan: CachePlan, group: HeadGroup) -> int:
        """The first chunk whose length of rest lasts; before it that may be one that is passed through."""
        return 0

    def buffer_tokens(self, plan: CachePlan, group: HeadGroup) -> tuple[int, ...]:
        """Tokens that each buffer of a session has room for: the most it ever caches."""
        return (self.steady_tokens(plan, group),) * self.buffers

    def buffer_read(self, plan: CachePlan, group: HeadGroup, passes: int) -> int:
        """Which buffer is read after so many clean passes: the one that the last of them wrote."""
        return passes % self.buffers

    def opening_frames(self, spec: ModelSpec) -> int:
        """Frames at the video's start that are its own: no other role of the group ever holds them."""
        return 0

    def reach(self, plan: CachePlan, group: HeadGroup) -> int:
        """How many frames before a chunk the oldest frame lies that its tokens are of, once it is at rest."""
        chunk = plan.phases[-1].first_chunk
        spans = self.spans(plan, group, chunk, None)
        return max((chunk * plan.spec.frames_per_chunk - span.frame for span in spans), default=0)

    def rebuilt_from(self, spec: ModelSpec) -> tuple[int, int]:
        """(chunks at the video's start, newest chunks) whose clean passes make its tokens anew."""
        return 0, 0

    def encoded_rows(self, plan: CachePlan, group: HeadGroup, encoding: Encoding) -> Rows | None:
        """Which tokens it takes of newest frames that one pass encodes after a switch of the prompt; None: it
        stays as it is, and is seen in that pass. Raises InputError where that pass cannot make it."""
        raise InputError(
            f"no pass over newest frames makes the role {self.name} of the policy {plan.policy.name}",
            where="recache",
            hint="Switch with recache replay or none.",
        )

    def exact_dtype(self, compute: Dtype) -> Dtype:
        """What its keys and values are cached in where it has no `dtype`, in graphs that compute in
        `compute`."""
        return compute

    def apart_in(self, plan: CachePlan, group: HeadGroup, compute: Dtype) -> bool:
        """Whether it is cached in a memory of its own on torch, beside what is attended to: where that is
        something else, or has not all of its tokens, or is put together anew for each pass."""
        alike = self.read_as_cached and self.exact_dtype(compute) == compute
        return group.coded or not alike or self.hidden_tokens(plan, group) > 0

    def in_words(self, spec: ModelSpec) -> str:
        """What of the video it is, of a role that was fitted to the model. Unless a role says it better: its
        parameters."""
        told = {name: value for name, value in vars(self).items() if name != "dtype"}
        return ", ".join(f"{name} {value}" for name, value in told.items())

    def fitted(self, spec: ModelSpec, layer: int, roles: Sequence[Role]) -> Self | None:
        """The role in a layer of a model, beside the others of its group; None where it holds nothing."""
        return self

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        """Raise InputError where it does not fit a model, a frame size or the other roles of its group."""

    def in_any_layer(self) -> Self:
        """The role with no layer treated apart, for a few layers that stand for a whole model."""
        return self


@dataclass(frozen=True)
class WholeFrames(Role):
    """A role that keeps a number of whole frames."""

    frames: int | None = None
    """None: as many as the model asks for."""

    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return plan.frame_tokens * self._count

    def __post_init__(self) -> None:
        check_bounds(self, {"frames": (0, MOST_FRAMES)}, f"the role {self.name}")

    @property
    def _count(self) -> int:
        assert self.frames is not None, "asked of a role that was not fitted to a model"
        return self.frames


@dataclass(frozen=True)
class Sink(WholeFrames):
    """The video's first frames, kept for ever: heads lean on them (StreamingLLM's attention sink).

    `frames` None: as many as the model was made for (`ModelSpec.sink_frames`), or a share of its window. A
    sink longer than a chunk is collected over the first chunks; of the one that fills it the sink takes the
    first frames.
    """

    share: float | None = field(default=None, metadata=LEFT_OUT_IF_NONE)
    """Instead of `frames`: of the frames that the model attends to, rounded down."""

    name: ClassVar[str] = "sink"
    buffers: ClassVar[int] = 1  # the first clean pass writes it and reads none of it; no later one writes it
    takes_rows: ClassVar[bool] = True
    moves: ClassVar[bool] = False
    why_exact: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, {"share": (0, 1)}, f"the role {self.name}")
        if self.frames is not None and self.share is not None:
            where = f"the role {self.name}"
            raise InputError("has both frames and a share", where=where, expected="one of the two")

    def in_words(self, spec: ModelSpec) -> str:
        return f"the video's first {counted(self._count)}, for ever"

    def filled_by(self, spec: ModelSpec) -> int:
        """The first chunks that it is collected over."""
        return -(-self.opening_frames(spec) // spec.frames_per_chunk)

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        return plan.frame_tokens * min(self._count, chunk * plan.spec.frames_per_chunk)

    def spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        return whole_frames(plan, 0, self.tokens(plan, group, chunk))

    def next_tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        # A graph computes all its outputs in every pass: once the sink is full this one is empty.
        return self.tokens(plan, group, chunk + 1) if chunk < self.filled_by(plan.spec) else 0

    def tokens_of_hollow(self, plan: CachePlan, group: HeadGroup, passes: int) -> int:
        return self.next_tokens(plan, group, passes)

    def rows(self, plan: CachePlan, group: HeadGroup, chunk: int) -> Rows:
        taken = self.tokens(plan, group, chunk + 1) - self.tokens(plan, group, chunk)
        return np.arange(taken, dtype=np.int32)

    def told(self, plan: CachePlan, group: HeadGroup, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        filled_by, taken = self.filled_by(plan.spec), super().told(plan, group, chunk)
        if filled_by <= 1:
            return taken
        return taken | {HELD: self.held_rows(plan, group, chunk)}

    def held_rows(self, plan: CachePlan, group: HeadGroup, chunk: int) -> Rows:
        """Of its own tokens those that stay of it in a graph, while it is collected over several chunks."""
        stay = self.tokens(plan, group, chunk) if chunk < self.filled_by(plan.spec) else 0
        return np.arange(stay, dtype=np.int32)

    def most_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        """The most tokens that it ever has."""
        return self.steady_tokens(plan, group)

    def buffer_tokens(self, plan: CachePlan, group: HeadGroup) -> tuple[int, ...]:
        # While it is collected, a second one has what all chunks but the last gave: keys of a head lie side
        # by side, so nothing can be put behind them in place.
        whole, before = self.most_tokens(plan, group), (self.filled_by(plan.spec) - 1) * plan.chunk_tokens
        return (whole, before) if before > 0 else (whole,)

    def buffer_read(self, plan: CachePlan, group: HeadGroup, passes: int) -> int:
        filled_by = self.filled_by(plan.spec)
        return (filled_by - min(passes, filled_by)) % len(self.buffer_tokens(plan, group))

    def opening_frames(self, spec: ModelSpec) -> int:
        if self.share is not None:
            return int(self.share * spec.attended_frames)
        return spec.sink_frames if self.frames is None else self.frames

    def rebuilt_from(self, spec: ModelSpec) -> tuple[int, int]:
        return self.filled_by(spec), 0

    def encoded_rows(self, plan: CachePlan, group: HeadGroup, encoding: Encoding) -> Rows | None:
        if encoding.keeps_sink:
            return None
        return np.arange(self.tokens(plan, group, encoding.passes), dtype=np.int32)

    def fitted(self, spec: ModelSpec, layer: int, roles: Sequence[Role]) -> Self | None:
        frames = self.opening_frames(spec)
        return replace(self, frames=frames, share=None) if frames else None

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        if self.opening_frames(spec) > spec.attended_frames - spec.frames_per_chunk:
            raise _too_long(spec, self.opening_frames(spec), where)


@dataclass(frozen=True)
class Recent(WholeFrames):
    """The newest frames that are not in the sink: a rolling window. With 1 frame: the transition frame.

    `frames` None: as many as the model attends to (`ModelSpec.attended_frames`), less sink and current chunk.
    """

    name: ClassVar[str] = "recent"
    why_exact: ClassVar[str] = ""

    def in_words(self, spec: ModelSpec) -> str:
        return f"the newest {counted(self._count)}"

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        past = chunk * plan.spec.frames_per_chunk
        return plan.frame_tokens * min(self._count, past - min(group.opening_frames(plan.spec), past))

    def spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        tokens = self.tokens(plan, group, chunk)
        return whole_frames(plan, chunk * plan.spec.frames_per_chunk - tokens // plan.frame_tokens, tokens)

    def told(self, plan: CachePlan, group: HeadGroup, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        return left_of_chunk(plan, group, chunk)

    def rebuilt_from(self, spec: ModelSpec) -> tuple[int, int]:
        return 0, -(-self._count // spec.frames_per_chunk)

    def encoded_rows(self, plan: CachePlan, group: HeadGroup, encoding: Encoding) -> Rows | None:
        end = encoding.frames * plan.frame_tokens
        taken = 0 if encoding.hollow else self.tokens(plan, group, encoding.passes)
        return np.arange(end - taken, end, dtype=np.int32)

    def fitted(self, spec: ModelSpec, layer: int, roles: Sequence[Role]) -> Self | None:
        frames = self.frames_of(spec, roles)
        return replace(self, frames=frames) if frames else None

    def frames_of(self, spec: ModelSpec, roles: Sequence[Role]) -> int:
        """How many they are in a model; below 0 where it attends to fewer than sink and chunk have."""
        if self.frames is not None:
            return self.frames
        return spec.attended_frames - spec.frames_per_chunk - sum(role.opening_frames(spec) for role in roles)

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        if self.frames_of(spec, roles) < 0:
            raise _too_long(spec, sum(role.opening_frames(spec) for role in roles), where)


def left_of_chunk(plan: CachePlan, group: HeadGroup, chunk: int) -> dict[str, Rows]:
    """What a role is told that holds other frames than the video's first ones: those tokens of the chunk that
    are left for it. Empty where a graph sees it by what is held: by a sink of no more than a chunk, that
    stays."""
    spec, size = plan.spec, plan.frame_tokens
    stay = sum(role.steady_tokens(plan, group) for role in group.roles if role.opening_frames(spec))
    opening = group.opening_frames(spec)
    if opening <= spec.frames_per_chunk and stay == opening * size:
        return {}
    first = min(max(opening - chunk * spec.frames_per_chunk, 0) * size, plan.chunk_tokens)
    return {ROWS: np.arange(first, plan.chunk_tokens, dtype=np.int32)}


def counted(number: int, what: str = "frame") -> str:
    """Such as "frame" or "3 frames", behind an article."""
    return what if number == 1 else f"{number} {what}s"


def whole_frames(plan: CachePlan, first: int, tokens: int) -> list[Span]:
    """Spans of whole frames, one after the other from the frame `first` on."""
    return [Span(first + n, plan.frame_tokens) for n in range(math.ceil(tokens / plan.frame_tokens))]


def _too_long(spec: ModelSpec, opening: int, where: str) -> InputError:
    """What is wrong with a sink of so many frames."""
    what = f"the model attends to {spec.attended_frames} frames"
    needed = spec.frames_per_chunk + opening
    return InputError(what, where=where, expected=f"at least {needed}, those of the chunk and the sink")
