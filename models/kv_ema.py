"""The torch half of the role `ema` (`runtime.kv.ema`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from forcingkv.models.kv_constants import constant
from forcingkv.models.kv_positions import frames_at, frames_beside, rotated, rotated_back
from forcingkv.models.kv_roles import CleanPass, TorchRole, torch_half
from forcingkv.models.wan import KeysValues
from forcingkv.runtime.kv.ema import MIXES, STARTS, UPDATE, Ema
from forcingkv.runtime.kv.leaving import KEPT, LEAVES, recent_of
from forcingkv.runtime.positions import Floats


def leaving(done: CleanPass, rows: Tensor) -> KeysValues:
    """Keys before rotation and values of the frames that leave the recent ones, as many as a chunk has:
    float32. `rows` is what is told of them (`LEAVES`)."""
    recent = recent_of(done.group)
    pairs = zip(done.held[recent.name], done.new, strict=True)
    keys, values = (torch.cat(pair, 2).index_select(2, rows) for pair in pairs)
    first, frames = -(recent.frames or 0), done.plan.spec.frames_per_chunk
    return KeysValues(rotated_back(keys, frames_beside(done, range(first, first + frames))), values.float())


@torch_half
class _TorchEma(TorchRole):
    of = Ema

    def read(self, role: Ema, held: KeysValues, like: Tensor) -> KeysValues:
        return KeysValues(*(part.to(like) for part in held))

    def advance(self, role: Ema, done: CleanPass) -> KeysValues:
        plan, group = done.plan, done.group
        size, held = role.steady_tokens(plan, group), done.held[role.name]
        kept, new, told = done.told(role, KEPT), self._new(role, done), done.told(role, UPDATE).float()

        def rates() -> Floats:
            return np.repeat(np.array(role.rates, np.float32), plan.frame_tokens)[:, None]

        by_token = constant(("rates", role.rates, plan.frame_tokens), kept.device, rates)
        # 0 where it stays, 1 where it starts, the rate where it is mixed: without a comparison, of which
        # graphs have few.
        share = told * (MIXES - told) + told * (told - STARTS) / MIXES * by_token
        places = torch.arange(size, device=kept.device)
        # While there are fewer averages than there will be, what is mixed of the others is not kept.
        full = [torch.cat(pair, 2).index_select(2, places) for pair in zip(held, new, strict=True)]
        mixed = [(1 - share) * old + share * one for old, one in zip(full, new, strict=True)]
        pairs = zip(mixed, done.new, strict=True)
        return KeysValues(*(torch.cat([old, own.float()], 2).index_select(2, kept) for old, own in pairs))

    @staticmethod
    def _new(role: Ema, done: CleanPass) -> KeysValues:
        """What comes into each average: keys rotated to its place, and values."""
        plan = done.plan
        new, count = leaving(done, done.told(role, LEAVES)), len(role.rates)
        first = role.first_frame(plan, done.group)
        tables = frames_at(done, range(first, first + count))
        if role.of == "frames":
            each, share = count * plan.frame_tokens, 1 / plan.chunk_tokens
            sums = (part.sum(2, keepdim=True) for part in new)
            new = KeysValues(*((one * share).expand(-1, -1, each, -1) for one in sums))
        return KeysValues(rotated(new.keys, tables), new.values)
