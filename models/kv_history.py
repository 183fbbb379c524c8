"""Torch halves of roles that keep a thinned history: `strided` and `merged` (`runtime.kv`)."""

from __future__ import annotations

import torch
from torch import Tensor

from forcingkv.models.kv_ema import leaving
from forcingkv.models.kv_positions import Tables, frames_beside, rotated
from forcingkv.models.kv_roles import CleanPass, TorchRole, Turn, torch_half, turned
from forcingkv.models.wan import KeysValues
from forcingkv.runtime.kv.leaving import KEPT, LEAVES, recent_of
from forcingkv.runtime.kv.merged import ADDED, Merged
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
        at = torch.from_numpy(role.patch_rows(plan, (role.patch - 1) // 2, (role.patch - 1) // 2))
        size = plan.frame_tokens
        rows = torch.cat([at + n * size for n in range(plan.spec.frames_per_chunk)]).to(tables.cosines.device)
        return Tables(*(table.index_select(0, rows) for table in tables))

    def moved(self, role: Merged, made: KeysValues, turn: Turn, done: CleanPass) -> KeysValues:
        # What there is of a block is not rotated yet.
        hidden = role.hidden_tokens(done.plan, done.group)
        keys = torch.cat([made.keys[:, :, :hidden], turned(made.keys[:, :, hidden:], turn)], 2)
        return KeysValues(keys, made.values)


def _pooled(role: Merged, done: CleanPass, left: Tensor) -> Tensor:
    """Of each of the frames that leave its share of a block: (batch, heads, frames * block_tokens, width)."""
    plan, patch = done.plan, role.patch
    share, total = 1 / (role.frames * patch**2), None
    for place in range(patch**2):
        tokens = torch.from_numpy(role.patch_rows(plan, *divmod(place, patch)))
        frames = range(plan.spec.frames_per_chunk)
        rows = torch.cat([tokens + n * plan.frame_tokens for n in frames]).to(left.device)
        part = left.index_select(2, rows)
        total = part if total is None else total + part
    assert total is not None
    return total * share
