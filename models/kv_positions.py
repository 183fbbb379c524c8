"""Keys as they are before rotation, and keys rotated to other frames: for roles that average them.

A cached key is rotated by its frame, row and column. Rows and columns are those of the chunk's own tables
(`CleanPass.rotary`), and so is the chunk's place in time; how far a frame lies from the chunk is known
when a graph is made. So a graph serves every chunk, with positions in the video or in the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from forcingkv.models.kv_constants import constant
from forcingkv.models.kv_roles import CleanPass
from forcingkv.runtime import positions
from forcingkv.runtime.positions import Floats


class Tables(NamedTuple):
    """Cosines and sines of tokens: float32 (tokens, head_dim / 2)."""

    cosines: Tensor
    sines: Tensor


def frames_beside(done: CleanPass, frames: Sequence[int]) -> Tables:
    """Tables of whole frames that lie so many frames behind the chunk's first; below 0: before it."""
    own, times = _one_frame(done), _of_time(done, frames)
    cosines = [own.cosines * c - own.sines * s for c, s in times]
    sines = [own.sines * c + own.cosines * s for c, s in times]
    return Tables(torch.cat(cosines), torch.cat(sines))


def frames_at(done: CleanPass, places: Sequence[int]) -> Tables:
    """Tables of whole frames at these positions in time."""
    of_time = done.plan.spec.rotary_pairs[0]
    own, times = _one_frame(done), _of_time(done, places)
    tables = []
    for within, of_frames in zip(own, zip(*times, strict=True), strict=True):
        still = within[:, of_time:]
        moving = [one[:of_time].expand(len(still), of_time) for one in of_frames]
        tables.append(torch.cat([torch.cat([one, still], 1) for one in moving]))
    return Tables(*tables)


def rotated_back(keys: Tensor, tables: Tables) -> Tensor:
    """Keys (..., tokens, head_dim) as they were before they were rotated by the tables: float32."""
    return rotated(keys, Tables(tables.cosines, -tables.sines))


def rotated(keys: Tensor, tables: Tables) -> Tensor:
    """Keys (..., tokens, head_dim) rotated by the tables, in float32 whatever they are."""
    wide, width = keys.float(), keys.shape[-1]
    pairs = torch.arange(width, device=keys.device)
    # The two numbers of each pair the other way round; the first of them is taken off.
    swapped = wide.index_select(-1, pairs ^ 1)
    cosines, sines = (table.index_select(-1, pairs // 2) for table in tables)
    return wide * cosines + swapped * (sines * (2.0 * (pairs % 2) - 1.0))


def _one_frame(done: CleanPass) -> Tables:
    """Those of the chunk's first frame."""
    assert done.rotary is not None, "what the chunk's keys were rotated by is asked for"
    return Tables(*(table[: done.plan.frame_tokens].float() for table in done.rotary))


def _of_time(done: CleanPass, frames: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """What turns by so many frames in time: (head_dim / 2,) each, of rows and columns 1 and 0."""
    spec, device = done.plan.spec, done.new.keys.device
    of_spec = spec.head_dim, spec.rotary_pairs, spec.rope_theta

    def table(count: int, part: int) -> Tensor:
        def make() -> Floats:
            return np.ascontiguousarray(positions.turn(spec, count)[part][1::2])

        return constant(("turn", count, part, of_spec), device, make)

    return [(table(count, 0), table(count, 1)) for count in frames]
