"""The torch half of the role `bank` (`runtime.kv.bank`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models.kv_codes import CodedKeysValues, by_parts, in_numbers
from forcingkv.models.kv_constants import constant
from forcingkv.models.kv_roles import CleanPass, TorchRole, Turn, torch_half, turned
from forcingkv.models.wan import KeysValues
from forcingkv.runtime import positions
from forcingkv.runtime.kv.bank import PLACES, POOL, THERE, Bank
from forcingkv.runtime.kv.leaving import KEPT, recent_of
from forcingkv.runtime.positions import Floats

ABSENT = 1e6
"""More than any frame's likeness to all others: what is not there goes first."""


def likeness(keys: Tensor, pairs_of_time: int) -> Tensor:
    """How alike frames are: the mean cosine of keys in the same place, over all heads.

    Keys are (heads, frames, tokens, head_dim), rotated; the result is float32 (frames, frames). The numbers
    that turn with time do not count: the rest is rotated alike in every frame, so the cosine is that of keys
    before rotation.
    """
    units = F.normalize(keys[..., 2 * pairs_of_time :].float(), dim=-1)
    heads, _, tokens, _ = units.shape
    rows = units.transpose(0, 1).flatten(1)
    return rows @ rows.transpose(0, 1) * (1 / (heads * tokens))


def least_alike(alike: Tensor, there: Tensor, kept: int) -> Tensor:
    """Indices of the frames that are kept, rising: (kept,) int64. One after the other that frame goes which
    is most like all that are left, itself among them; of several the first.

    `alike` is (frames, frames); `there` float32 (frames,), 1 for each frame that is there, or else 0.
    Comparisons and no argmax: which of equal ones that takes is said for torch, not for every backend.
    """
    left = torch.arange(alike.shape[0], device=alike.device)
    for count in range(alike.shape[0], kept, -1):
        weights = there.index_select(0, left)
        among = alike.index_select(0, left).index_select(1, left)
        score = (among * weights).sum(1) + ABSENT * (1 - weights)
        places = torch.arange(count, device=alike.device).float()
        beyond = torch.full_like(places, count)
        goes = torch.where(score.amax(0, keepdim=True) > score, beyond, places).amin(0, keepdim=True)
        following = torch.arange(count - 1, device=alike.device)
        stays = (goes > following.float()).to(torch.int64)
        left = left.index_select(0, following + 1 - stays)
    return left


@torch_half
class _TorchBank(TorchRole):
    of = Bank

    def advance(self, role: Bank, done: CleanPass) -> KeysValues:
        return self._kept(role, done, self._left(role, done))

    def advance_coded(self, role: Bank, done: CleanPass) -> KeysValues:
        assert role.dtype is not None
        left = self._left(role, in_numbers(done))
        codes, scales = (self._kept(role, one, left) for one in by_parts(role.dtype, done))
        return CodedKeysValues(*codes, *scales)

    @staticmethod
    def _pool(role: Bank, done: CleanPass) -> KeysValues:
        """The frames that are chosen from: (batch, heads, frames, frame tokens, numbers of a token)."""
        room, size = role.frames + role.at_a_time(done.plan.spec), done.plan.frame_tokens
        recent = done.held[recent_of(done.group).name]
        parts = zip(done.held[role.name], recent, done.new, strict=True)
        joined = (torch.cat(part, 2).index_select(2, done.told(role, POOL)) for part in parts)
        return KeysValues(*(torch.unflatten(part, 2, (room, size)) for part in joined))

    def _left(self, role: Bank, done: CleanPass) -> Tensor:
        """Which of them are kept."""
        spec, pool = done.plan.spec, self._pool(role, done)
        alike = likeness(pool.keys[0], spec.rotary_pairs[0])
        places = torch.arange(len(alike), device=alike.device).float()
        return least_alike(alike, (done.told(role, THERE).float() > places).float(), role.frames)

    def _kept(self, role: Bank, done: CleanPass, left: Tensor) -> KeysValues:
        keys, values = (part.index_select(2, left) for part in self._pool(role, done))
        if done.plan.relative:
            keys = turned(keys, self._turns(role, done, left))
        kept = done.told(role, KEPT)
        return KeysValues(*(part.flatten(2, 3).index_select(2, kept) for part in (keys, values)))

    @staticmethod
    def _turns(role: Bank, done: CleanPass, left: Tensor) -> Turn:
        """What turns each frame that is kept from where it stood to where the next chunk sees it."""
        spec, window = done.plan.spec, done.plan.window_frames
        places = done.told(role, PLACES)
        old, new = places[: -role.frames], places[-role.frames :]
        by = (new - old.index_select(0, left)).to(torch.int64) + window

        def table(part: int) -> Tensor:
            def make() -> Floats:
                counts = range(-window, window + 1)
                return np.stack([positions.turn(spec, count)[part] for count in counts])[:, None]

            key = "turns", part, window, spec.head_dim, spec.rotary_pairs, spec.rope_theta
            return constant(key, left.device, make)

        return Turn(*(table(part).index_select(0, by) for part in (0, 1)))

    def moved(self, role: Bank, made: KeysValues, turn: Turn, done: CleanPass) -> KeysValues:
        # It stands where the next chunk sees it: what stays in its place is not turned, and loses nothing.
        return made
