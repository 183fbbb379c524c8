"""The torch half of the role `tokens` (`runtime.kv.tokens`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models.kv_choice import best, taken
from forcingkv.models.kv_constants import constant
from forcingkv.models.kv_roles import CleanPass, TorchRole, Turn, torch_half, turned
from forcingkv.models.kv_statistics import lasting_worth, worth_in_time
from forcingkv.models.wan import KeysValues
from forcingkv.runtime import positions
from forcingkv.runtime.kv.leaving import KEPT, LEAVES, recent_of
from forcingkv.runtime.kv.roles import Rows
from forcingkv.runtime.kv.tokens import FOLLOWS, PLACES, THERE, Tokens
from forcingkv.runtime.positions import Floats


@torch_half
class _TorchTokens(TorchRole):
    of = Tokens

    def advance(self, role: Tokens, done: CleanPass) -> KeysValues:
        plan, kept = done.plan, done.told(role, KEPT)
        hidden, budget = role.hidden_tokens(plan, done.group), role.budget(plan)
        leaving, rows = self._leaving(done), done.told(role, LEAVES)
        left = KeysValues(*(part.index_select(2, rows) for part in leaving))
        old = self._filled(done.held[role.name], done.new, hidden + budget)
        held = KeysValues(*(part[:, :, :hidden] for part in old))
        old = KeysValues(*(part[:, :, hidden:] for part in old))
        pool = KeysValues(*(torch.cat(pair, 2) for pair in zip(old, left, strict=True)))
        worth = None
        if role.remembers:
            new = self._worth(role, done, left.keys, leaving.keys)
            worth = torch.cat([_unpacked(held, budget), new], 2)
        scores = self._scores(role, done, pool.keys, worth)
        places = self._places(role, scores, done.told(role, THERE).float(), budget)
        if plan.relative:
            pool = KeysValues(turned(pool.keys, _turns(done, role)), pool.values)
        made = KeysValues(*(taken(part, places) for part in pool))
        if worth is not None:
            stays = taken(worth[..., None], places)[..., 0]
            packed = _packed(stays, made.keys)
            made = KeysValues(*(torch.cat(pair, 2) for pair in zip(packed, made, strict=True)))
        return KeysValues(*(part.index_select(2, kept) for part in made))

    @staticmethod
    def _leaving(done: CleanPass) -> KeysValues:
        """The recent frames and the chunk: what leaves is of them."""
        recent = done.held[recent_of(done.group).name]
        return KeysValues(*(torch.cat(pair, 2) for pair in zip(recent, done.new, strict=True)))

    @staticmethod
    def _filled(held: KeysValues, new: KeysValues, size: int) -> KeysValues:
        """What is cached, as long as it ever is: behind it lie tokens of the chunk, which do not count."""
        places = torch.arange(size, device=held.keys.device)
        copies = -(-size // new.keys.shape[2])
        pairs = zip(held, new, strict=True)
        return KeysValues(
            *(torch.cat([one, *[own] * copies], 2).index_select(2, places) for one, own in pairs)
        )

    @staticmethod
    def _worth(role: Tokens, done: CleanPass, left: Tensor, leaving: Tensor) -> Tensor:
        """What is known of tokens only as they leave: float32 (batch, heads, tokens)."""
        if role.reads_statistics:
            return lasting_worth(done, left)
        after = leaving.index_select(2, done.told(role, FOLLOWS))
        return -(F.normalize(left.float(), dim=-1) * F.normalize(after.float(), dim=-1)).sum(-1)

    @staticmethod
    def _scores(role: Tokens, done: CleanPass, keys: Tensor, worth: Tensor | None) -> Tensor:
        """Of all that is chosen from: float32 (batch, heads, tokens)."""
        if worth is not None:
            return worth + worth_in_time(done, keys) if role.reads_statistics else worth
        if done.queries is None:
            raise ValueError(f"the role {role.name} scores by queries, and the clean pass gave none")
        mean = done.queries.float().sum(2, keepdim=True) * (1 / done.plan.chunk_tokens)
        return (keys.float() * mean).sum(-1)

    @staticmethod
    def _places(role: Tokens, scores: Tensor, there: Tensor, budget: int) -> Tensor:
        batch, heads, count = scores.shape
        if not role.together:
            return best(scores.reshape(batch * heads, count), there, budget)
        shared = best(scores.sum(1), there, budget)
        return shared[:, None].expand(batch, heads, budget).reshape(batch * heads, budget)

    def moved(self, role: Tokens, made: KeysValues, turn: Turn, done: CleanPass) -> KeysValues:
        # It stands where the next chunk sees it: what stays in its place is not turned, and loses nothing.
        return made


def _turns(done: CleanPass, role: Tokens) -> Turn:
    """What turns each token that is chosen from to where the next chunk sees it."""
    plan = done.plan
    spec, window, frames = plan.spec, plan.window_frames, plan.spec.frames_per_chunk

    def owners() -> Rows:
        """Whose place each token has: 0 for those that are kept, or 1 and the number of its frame."""
        counts = [role.budget(plan), *[plan.frame_tokens] * frames]
        return np.repeat(np.arange(1 + frames, dtype=np.int32), counts)

    def table(part: int) -> Tensor:
        def make() -> Floats:
            return np.stack([positions.turn(spec, count)[part] for count in range(-window, window + 1)])

        key = "turns of tokens", part, window, spec.head_dim, spec.rotary_pairs, spec.rope_theta
        return constant(key, done.new.keys.device, make)

    key = "owners", role.budget(plan), plan.frame_tokens, frames
    by = done.told(role, PLACES).to(torch.int64) + window
    by = by.index_select(0, constant(key, by.device, owners))
    return Turn(table(0).index_select(0, by), table(1).index_select(0, by))


def _packed(worth: Tensor, like: Tensor) -> KeysValues:
    """Numbers (batch, heads, count) as hidden tokens in the dtype of `like`, which has their width: what it
    holds of them among the keys, and what that lacks among the values."""
    batch, heads, count = worth.shape
    width = like.shape[-1]
    tokens = -(-count // width)
    fill = torch.arange(tokens * width, device=worth.device) % count
    whole = worth.index_select(2, fill).reshape(batch, heads, tokens, width)
    high = whole.to(like.dtype)
    return KeysValues(high, (whole - high.float()).to(like.dtype))


def _unpacked(hidden: KeysValues, count: int) -> Tensor:
    """The numbers (batch, heads, count) of `_packed`: float32."""
    whole = hidden.keys.float() + hidden.values.float()
    batch, heads, tokens, width = whole.shape
    return whole.reshape(batch, heads, tokens * width)[:, :, :count]
