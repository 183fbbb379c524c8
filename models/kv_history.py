"""Torch halves of roles that keep a thinned history: `strided` and `merged` (`runtime.kv`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from forcingkv.models.kv_constants import constant
from forcingkv.models.kv_ema import leaving
from forcingkv.models.kv_positions import Tables, frames_beside, rotated
from forcingkv.models.kv_roles import CleanPass, TorchRole, Turn, torch_half, turned
from forcingkv.models.wan import KeysValues
from forcingkv.runtime.kv.leaving import KEPT, LEAVES, recent_of
from forcingkv.runtime.kv.merged import ADDED, Merged
from forcingkv.runtime.kv.roles import Rows
from forcingkv.runtime.kv.strided import Strided


@torch_half
class _TorchStrided(TorchRole):
    of = Strided

    def advance(self, role: Strided, done: CleanPass) -> KeysValues:
        kept = done.told(role, KEPT)
        recent = done.held[recent_of(done.group).name]
        parts = zip(done.held[role.name], recent, done.new, strict=True)
        return KeysValues(*(torch.cat(part, 2).index_select(2, kept) for part in parts))


@torch_half
class _TorchMerged(TorchRole):
    of = Merged

    def advance(self, role: Merged, done: CleanPass) -> KeysValues:
        plan, kept = done.plan, done.told(role, KEPT)
        frames, each = plan.spec.frames_per_chunk, role.block_tokens(plan)
        added = done.told(role, ADDED).float().reshape(frames + 1, frames + 1)
        places = torch.arange(each, device=kept.device)
        made = []
        for held, own, left in zip(
            done.held[role.name], done.new, leaving(done, done.told(role, LEAVES)), strict=True
        ):
            # What there is of a block comes first. Before the first clean pass nothing is: it is not added.
            begun = torch.cat([held, own], 2).index_select(2, places).float()
            parts = torch.cat([begun, _pooled(role, done, left)], 2)
            shape = parts.shape
            sums = (added @ parts.reshape(*shape[:2], frames + 1, -1)).reshape(shape)
            made.append((sums[:, :, frames * each :], sums[:, :, : frames * each]))
        (begun_keys, keys), (begun_values, values) = made
        whole = rotated(keys, self._places(role, done)), values
        joined = [
            torch.cat([held, begun.to(held), one.to(held)], 2)
            for held, begun, one in zip(done.held[role.name], (begun_keys, begun_values), whole, strict=True)
        ]
        return KeysValues(*(part.index_select(2, kept) for part in joined))

    @staticmethod
    def _places(role: Merged, done: CleanPass) -> Tables:
        """Tables of the blocks that end with each of the frames that leave."""
        plan = done.plan
        first = 1 - (recent_of(done.group).frames or 0) - role.frames + role.middle
        tables = frames_beside(done, range(first, first + plan.spec.frames_per_chunk))
        corner = (role.patch - 1) // 2
        rows = _rows_of_frames(role, done, corner, corner)
        return Tables(*(table.index_select(0, rows) for table in tables))

    def moved(self, role: Merged, made: KeysValues, turn: Turn, done: CleanPass) -> KeysValues:
        # What there is of a block is not rotated yet.
        hidden = role.hidden_tokens(done.plan, done.group)
        keys = torch.cat([made.keys[:, :, :hidden], turned(made.keys[:, :, hidden:], turn)], 2)
        return KeysValues(keys, made.values)


def _pooled(role: Merged, done: CleanPass, left: Tensor) -> Tensor:
    """Of each of the frames that leave its share of a block: (batch, heads, frames * block_tokens, width)."""
    places = [divmod(place, role.patch) for place in range(role.patch**2)]
    total = left.index_select(2, _rows_of_frames(role, done, *places[0]))
    for place in places[1:]:
        total = total + left.index_select(2, _rows_of_frames(role, done, *place))
    return total * (1 / (role.frames * len(places)))


def _rows_of_frames(role: Merged, done: CleanPass, row: int, column: int) -> Tensor:
    """In each of a chunk's worth of frames the tokens that lie in that place of their patch."""
    plan, frames = done.plan, done.plan.spec.frames_per_chunk

    def make() -> Rows:
        tokens = role.patch_rows(plan, row, column)
        offsets = np.arange(frames, dtype=np.int32) * np.int32(plan.frame_tokens)
        return (offsets[:, None] + tokens).reshape(-1)

    key = "patch", row, column, role.patch, plan.geometry.grid, frames
    return constant(key, done.new.keys.device, make)
