"""The role `merged`: blocks of frames whose tokens are averaged, over time and over patches.

Pyramid Forcing's veil heads see blocks of 4 frames and 2 x 2 tokens (docs/method.md, "Merged frames";
docs/decisions/0053).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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
from forcingkv.runtime.kv.roles import Chosen, Cuts, Role, Rows, Span, counted
from forcingkv.runtime.spec import MOST_FRAMES, Geometry, ModelSpec

if TYPE_CHECKING:
    from forcingkv.runtime.kv.plan import CachePlan, HeadGroup

MOST_IN_A_CHUNK = 64
ADDED = "added"
"""Kind of what graphs are told: 1 or 0, in rows. Row i for the block that ends with the i-th of the frames
that leave, the last row for the block that is not whole yet; columns for what there was of that block, and
for each of the frames that leave."""


@dataclass(frozen=True)
class Merged(Role):
    """Blocks of frames that have left the recent ones: each token the mean of a patch in all frames of one.

    Blocks begin at multiples of `frames`, and those that reach into the sink are left out. Keys are averaged
    as they are before rotation, and stand in the middle of what they are of, rounded down: of 4 frames and
    2 x 2 tokens in the second frame, at the upper left token. Where the side of a frame is no whole number of
    patches, tokens at its edge count for those that are missing. A block is seen once it is whole; what there
    is of it before is cached as a sum, and not attended to.
    """

    frames: int
    """Of a block."""
    patch: int
    """Side of the square of tokens that are averaged."""
    blocks: int
    """The most that a chunk sees: the newest."""

    name: ClassVar[str] = "merged"
    why_exact: ClassVar[str] = "a block is summed up in the cache, frame by frame"
    told_by_chunk: ClassVar[bool] = True

    def __post_init__(self) -> None:
        bounds = {"frames": (1, MOST_FRAMES), "patch": (1, 64), "blocks": (1, MOST_FRAMES)}
        check_bounds(self, bounds, f"the role {self.name}")
        if self.frames * self.blocks > MOST_FRAMES:
            what = f"{self.blocks} blocks of {self.frames} frames are {self.frames * self.blocks} frames"
            raise InputError(what, where=f"the role {self.name}", expected=f"at most {MOST_FRAMES}")

    def in_words(self, spec: ModelSpec) -> str:
        patch = f"{self.patch} x {self.patch} tokens"
        mean = f"each the mean over its frames and over {patch}, in its middle's place"
        return f"the newest {counted(self.blocks, 'block')} of {self.frames} frames that left, {mean}"

    @property
    def middle(self) -> int:
        """The frame of a block that it stands at."""
        return (self.frames - 1) // 2

    def block_tokens(self, plan: CachePlan) -> int:
        """Tokens of a block."""
        return math.prod(-(-side // self.patch) for side in plan.geometry.grid)

    def patch_rows(self, plan: CachePlan, row: int, column: int) -> Rows:
        """Of each patch the token of a frame that lies in that place of it."""
        rows, columns = plan.geometry.grid
        down = np.minimum(np.arange(row, row + rows, self.patch), rows - 1)
        right = np.minimum(np.arange(column, column + columns, self.patch), columns - 1)
        return (down[:, None] * columns + right).reshape(-1).astype(np.int32)

    def seen_blocks(self, plan: CachePlan, group: HeadGroup, chunk: int) -> list[int]:
        """First frames of the blocks that the chunk sees."""
        opening, end = group.opening_frames(plan.spec), first_recent(plan, group, chunk)
        first = -(-opening // self.frames) * self.frames
        return [*range(first, end - self.frames + 1, self.frames)][-self.blocks :]

    def hidden_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return self.block_tokens(plan)

    def tokens(self, plan: CachePlan, group: HeadGroup, chunk: int) -> int:
        blocks = len(self.seen_blocks(plan, group, chunk)) + 1 if chunk else 0
        return self.block_tokens(plan) * blocks

    def steady_tokens(self, plan: CachePlan, group: HeadGroup) -> int:
        return self.block_tokens(plan) * (self.blocks + 1)

    def spans(self, plan: CachePlan, group: HeadGroup, chunk: int, chosen: Chosen) -> list[Span]:
        """By the frame that a block stands at."""
        blocks = self.seen_blocks(plan, group, chunk)
        return [Span(block + self.middle, self.block_tokens(plan)) for block in blocks]

    def told(self, plan: CachePlan, group: HeadGroup, chunk: int, cuts: Cuts = ()) -> dict[str, Rows]:
        """What leaves (`LEAVES`), into which block it goes (`ADDED`), and which of the blocks the next chunk
        finds (`KEPT`): of those that are cached, with the one that is not whole behind them, and those that
        end with each of the frames that leave."""
        size, recent = plan.spec.frames_per_chunk, recent_of(group).frames or 0
        slots = range(chunk * size - recent, (chunk + 1) * size - recent)
        left, after = leaving_frames(plan, group, chunk), first_recent(plan, group, chunk + 1)
        added = np.zeros((size + 1, size + 1), np.int32)
        for row, end in enumerate([*(slot + 1 for slot in slots), after]):
            whole = row < size
            begin = end - self.frames if whole else end // self.frames * self.frames
            # What reaches into the sink is no block.
            inside = range(begin, end if begin >= group.opening_frames(plan.spec) else begin)
            added[row, 0] = bool(inside) and inside[0] < left.start
            added[row, 1:] = [slot in inside and slot in left for slot in slots]
        old, new = (self.seen_blocks(plan, group, count) for count in (chunk, chunk + 1))
        held = len(old) + 1 if chunk else 0
        places = {block: 1 + place for place, block in enumerate(old)}
        places |= {s + 1 - self.frames: held + 1 + n for n, s in enumerate(slots) if s in left}
        following = np.array([held, *(places[block] for block in new)], np.int32)
        each = self.block_tokens(plan)
        kept = following[:, None] * np.int32(each) + np.arange(each, dtype=np.int32)
        leaves = leaving_rows(plan, group, chunk)
        return {KEPT: kept.reshape(-1).astype(np.int32), LEAVES: leaves, ADDED: added.reshape(-1)}

    def reach(self, plan: CachePlan, group: HeadGroup) -> int:
        # The newest whole block ends up to a block less a frame before the recent frames.
        return (recent_of(group).frames or 0) + self.frames * (self.blocks + 1) - 1 - self.middle

    def rebuilt_from(self, spec: ModelSpec) -> tuple[int, int]:
        return 0, -(-self.frames * (self.blocks + 1) // spec.frames_per_chunk) + 1

    def check(self, spec: ModelSpec, geometry: Geometry, roles: Sequence[Role], where: str) -> None:
        check_recent(self.name, spec, roles, where)
        if spec.frames_per_chunk > MOST_IN_A_CHUNK:
            raise InputError(
                f"a chunk has {spec.frames_per_chunk} frames, each of which may end a block",
                where=where,
                expected=f"at most {MOST_IN_A_CHUNK} where frames are merged",
            )
