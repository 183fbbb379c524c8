"""The torch half of each role of `runtime.kv`: how its keys and values follow from a clean pass, and how
they are read. `docs/extending.md` shows how a role is added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from forcingkv.models.kv_codes import CodedKeysValues, as_cached, by_parts, in_numbers
from forcingkv.models.wan import KeysValues
from forcingkv.prune.reference import prune_follow, prune_score
from forcingkv.runtime.kv.codes import FewerBits
from forcingkv.runtime.kv.early import Early, Opening
from forcingkv.runtime.kv.plan import CachePlan, HeadGroup, told_name
from forcingkv.runtime.kv.retained import Choice, Retained
from forcingkv.runtime.kv.roles import HELD, ROWS, Cuts, Recent, Role, Sink
from forcingkv.runtime.kv.scenes import KEPT, Scene

GroupCache: TypeAlias = dict[str, KeysValues]
"""Name of a role -> its keys and values, for the roles the group caches; in fewer bits `CodedKeysValues`."""


Rotary: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens of a chunk: float32 (tokens, head_dim / 2) (`positions.rotary`)."""


class Turn(NamedTuple):
    """What moves keys with the window (`positions.turn`): float32 (head_dim,) each."""

    cosines: Tensor
    sines: Tensor


@dataclass(frozen=True)
class CleanPass:
    """What a clean pass gives a head group, and what it knows."""

    plan: CachePlan
    layer: int
    group: HeadGroup
    held: Mapping[str, KeysValues]
    """The cache that the pass read, as `GroupCache` has it."""
    new: KeysValues
    """Keys and values of the chunk, of the group's heads."""
    rows: Mapping[str, Tensor] | None
    """What a graph is told of the chunk, by `told_name`. None: what the roles say for the chunk."""
    choice: Choice | None
    """What is chosen in this pass; None: nothing, and what was chosen before stays."""
    chunk: int | None
    """Index of the chunk, where it is known: in a graph it is not."""
    chosen: list[Tensor]
    """Indices of the segments that were chosen in this pass, in any layer so far."""
    turn: Turn | None = field(default=None, kw_only=True)
    """By what keys move with the window after this pass; None: they stay as they are."""
    cuts: Cuts = field(default=(), kw_only=True)
    """The passes with which scenes begin, where the chunk is known."""
    rotary: Rotary | None = field(default=None, kw_only=True)
    """What the chunk's keys were rotated by."""
    queries: Tensor | None = field(default=None, kw_only=True)
    """Queries of the pass, of the group's heads: (batch, heads, tokens, head_dim), where they are read."""
    coded: dict[FewerBits, KeysValues] = field(default_factory=dict, kw_only=True)
    """Keys and values of the chunk in fewer bits: made once for all roles."""

    def told(self, role: Role, kind: str = ROWS) -> Tensor:
        """What a role is told of the chunk (`Role.told`): (tokens,). Of the kind `ROWS` which of the chunk's
        tokens it takes."""
        if self.rows is not None:
            return self.rows[told_name(self.group, role, kind)]
        assert self.chunk is not None, "which tokens a role takes depends on the chunk"
        rows = role.told(self.plan, self.group, self.chunk, self.cuts)[kind]
        return torch.from_numpy(rows).to(self.new.keys.device)

    def tokens_after(self, role: Role) -> int | None:
        """Tokens of a role that the next chunk sees; None: it is not known, in a graph."""
        return None if self.chunk is None else role.tokens(self.plan, self.group, self.chunk + 1)


class TorchRole(ABC):
    """The torch half of a role; subclasses say of which by `of`."""

    of: ClassVar[type[Role]]

    def read(self, role: Any, held: KeysValues, like: Tensor) -> KeysValues:
        """What heads attend to, in the dtype of `like`, of what is cached."""
        return held

    @abstractmethod
    def advance(self, role: Any, done: CleanPass) -> KeysValues:
        """What is cached of the role after a clean pass, the window where it was."""

    def advance_coded(self, role: Any, done: CleanPass) -> KeysValues:
        """`advance` of a role in fewer bits. Unless it says otherwise it puts tokens together, and does so
        alike with codes and with scales."""
        codes, scales = (self.advance(role, one) for one in by_parts(role.dtype, done))
        return CodedKeysValues(*codes, *scales)

    def move(self, role: Any, made: KeysValues, turn: Turn) -> KeysValues:
        """What is cached of a role that `moves` once the window has moved."""
        return KeysValues(turned(made.keys, turn), made.values)

    def moved(self, role: Any, made: KeysValues, turn: Turn, done: CleanPass) -> KeysValues:
        """What a clean pass made of a role that `moves`, once the window has moved."""
        return self.move(role, made, turn)


HALVES: dict[str, TorchRole] = {}
"""Name of a role -> its torch half."""


def torch_half(kind: type[TorchRole]) -> type[TorchRole]:
    """Register the torch half of a role.

    Raises TypeError for a class without `advance`, and for one whose `read` is not what `read_as_cached` of
    the role says.
    """
    if (kind.read is TorchRole.read) != kind.of.read_as_cached:
        says = f"read_as_cached = {kind.of.read_as_cached}"
        raise TypeError(f"the role {kind.of.name} says {says}, and {kind.__name__} reads it otherwise")
    HALVES[kind.of.name] = kind()
    return kind


@torch_half
class _TorchSink(TorchRole):
    of = Sink

    def advance(self, role: Sink, done: CleanPass) -> KeysValues:
        held = done.held[role.name]
        if done.rows is None and held.keys.shape[2] == role.steady_tokens(done.plan, done.group):
            return held
        return self._collected(role, done)

    def _collected(self, role: Sink, done: CleanPass) -> KeysValues:
        """What is held, and what is taken of the chunk. In a graph this is empty once the sink is full, and
        the session keeps the sink that it has."""
        held, rows = done.held[role.name], done.told(role)
        taken = KeysValues(*(part.index_select(2, rows) for part in done.new))
        if role.filled_by(done.plan.spec) <= 1:
            return taken
        if done.rows is not None:
            kept = done.rows[told_name(done.group, role, HELD)]
            held = KeysValues(*(part.index_select(2, kept) for part in held))
        return KeysValues(*(torch.cat(pair, 2) for pair in zip(held, taken, strict=True)))


@torch_half
class _TorchRecent(TorchRole):
    of = Recent

    def advance(self, role: Recent, done: CleanPass) -> KeysValues:
        plan, new = done.plan, done.new
        kept = role.steady_tokens(plan, done.group)
        opening_tokens = plan.frame_tokens * done.group.opening_frames(plan.spec)
        newest = slice(-kept, None)
        if kept <= plan.chunk_tokens - opening_tokens:
            # The chunk's own frames are enough, even of the first chunk, which gives some to the sink.
            return _tokens(new, newest)
        pairs = zip(done.held[role.name], _without_sink(role, done), strict=True)
        return _tokens(KeysValues(*(torch.cat(pair, 2) for pair in pairs)), newest)


def _without_sink(role: Role, done: CleanPass) -> KeysValues:
    """Keys and values of the chunk that go to no sink; `role` is told which, where anybody is."""
    plan, new = done.plan, done.new
    opening = [other for other in done.group.roles if other.opening_frames(plan.spec)]
    if ROWS in role.told(plan, done.group, 0):
        rows = done.told(role)
        return KeysValues(*(part.index_select(2, rows) for part in new))
    if not opening:
        return new
    # Frames of the first chunk go to the sink. It is the first chunk if the sink is still empty; in any other
    # this slice begins at 0. So one graph serves all chunks, without a branch.
    whole = sum(other.steady_tokens(plan, done.group) for other in opening)
    filled = sum(done.held[other.name].keys.shape[2] for other in opening)
    return _tokens(new, slice(whole - filled, None))


@torch_half
class _TorchScene(TorchRole):
    of = Scene

    def advance(self, role: Scene, done: CleanPass) -> KeysValues:
        kept = done.told(role, KEPT)
        if done.plan.relative:  # what stays in its place is told as its complement, which is below 0
            kept = torch.maximum(kept, -1 - kept)
        pairs = zip(done.held[role.name], done.new, strict=True)
        return KeysValues(*(torch.cat(pair, 2).index_select(2, kept) for pair in pairs))

    def moved(self, role: Scene, made: KeysValues, turn: Turn, done: CleanPass) -> KeysValues:
        kept = done.told(role, KEPT)
        stays = -1 - kept > kept
        return KeysValues(torch.where(stays[:, None], made.keys, turned(made.keys, turn)), made.values)


@torch_half
class _TorchEarly(TorchRole):
    of = Early

    def advance(self, role: Early, done: CleanPass) -> KeysValues:
        if done.tokens_after(role) == 0:
            return _tokens(done.new, slice(0, 0))
        recent = [one for one in done.group.roles if isinstance(one, Recent)]
        kept = sum(one.steady_tokens(done.plan, done.group) for one in recent)
        held = [done.held[one.name] for one in (role, *recent)]
        parts = *held, _without_sink(next(iter(recent), role), done)
        joined = KeysValues(*(torch.cat(pair, 2) for pair in zip(*parts, strict=True)))
        early = done.plan.frame_tokens * (role.frames or 0)
        return _tokens(joined, slice(-kept - early, -kept or None))


@torch_half
class _TorchOpening(_TorchSink):
    of = Opening

    def advance(self, role: Sink, done: CleanPass) -> KeysValues:
        after = done.tokens_after(role)
        held = done.held[role.name]
        if done.rows is None and after in (0, held.keys.shape[2]):
            return _tokens(held, slice(0, after))
        return self._collected(role, done)


@torch_half
class _TorchRetained(TorchRole):
    of = Retained

    def advance(self, role: Retained, done: CleanPass) -> KeysValues:
        choice = done.choice
        if choice is None:
            return done.held[role.name]
        transition, new = done.held[Recent.name], done.new
        one_frame = any(type(one) is Recent and one.frames == 1 for one in done.group.roles)
        if not one_frame:
            transition, new = _leaving(done)
        elif choice.kept > choice.candidates - choice.split.segments:
            # The first chunk finds no transition frame, and by itself has fewer segments than are kept. A
            # graph chooses in every pass: there zeros stand for the frame, and nobody takes what is chosen.
            # Zeros tie to the bit, and made of the chunk they do not lie in the file by the megabyte.
            pairs = zip(new, transition, strict=True)
            transition = KeysValues(*(torch.cat((own - own, held), 2) for own, held in pairs))
            transition = _tokens(transition, slice(-done.plan.frame_tokens, None))
        split = choice.split.frame_tokens, choice.split.segments
        if done.chosen and role.shared:
            indices: Tensor | None = done.chosen[0]
        else:
            ahead = choose_ahead(role, choice.candidates, choice.kept, done.layer, done.chunk)
            indices = None if ahead is None else torch.tensor(ahead, device=done.new.keys.device)
        if indices is None:
            *kept, indices = prune_score(*transition, *new, *split, choice.kept)
        else:
            kept = prune_follow(*transition, *new, indices, *split)
        done.chosen.append(indices)
        return KeysValues(*kept)

    def advance_coded(self, role: Retained, done: CleanPass) -> KeysValues:
        # Chosen anew by keys as the pass made them.
        if done.choice is None:
            return done.held[role.name]
        return as_cached(role.dtype, self.advance(role, in_numbers(done)))


def _leaving(done: CleanPass) -> tuple[KeysValues, KeysValues]:
    """Of a group with several recent frames the oldest, and as many after it as a chunk has: all but the last
    of them are those that leave the recent frames, and the last is the one that comes after them."""
    plan = done.plan
    recent = next(role for role in done.group.roles if isinstance(role, Recent))
    joined = KeysValues(*(torch.cat(pair, 2) for pair in zip(done.held[Recent.name], done.new, strict=True)))
    if done.rows is not None:
        # A graph chooses in every pass: where there are no recent frames yet, zeros stand for them.
        kept = recent.steady_tokens(plan, done.group)
        zeros = [torch.cat([part - part] * -(-kept // plan.chunk_tokens), 2) for part in done.new]
        joined = KeysValues(*(torch.cat(pair, 2) for pair in zip(zeros, joined, strict=True)))
        joined = _tokens(joined, slice(-(kept + plan.chunk_tokens), None))
    size = plan.frame_tokens
    return _tokens(joined, slice(None, size)), _tokens(joined, slice(size, size + plan.chunk_tokens))


def choose_ahead(
    role: Retained, candidates: int, kept: int, layer: int, chunk: int | None
) -> list[int] | None:
    """The `kept` segments of the candidates where the choice looks at no keys; None: they have to be scored.

    `random` draws anew for each layer that chooses and each chunk. Raises ValueError where it is not told the
    chunk.
    """
    if role.choose == "least-similar":
        return None
    if role.choose == "uniform":
        return [(2 * place + 1) * candidates // (2 * kept) for place in range(kept)]
    if chunk is None:
        raise ValueError("segments drawn at random need the index of the chunk")
    drawn = np.random.default_rng((role.seed, chunk, layer)).choice(candidates, kept, replace=False)
    return sorted(drawn.tolist())


def turned(keys: Tensor, turn: Turn) -> Tensor:
    """Rotated keys (..., head_dim) moved by the frames of a turn, in float32 whatever they are."""
    wide = keys.float()
    # Picked by their places: a reshape would write a length that varies by phase into graphs.
    swapped = wide.index_select(-1, torch.arange(keys.shape[-1], device=keys.device) ^ 1)
    return (wide * turn.cosines + swapped * turn.sines).to(keys)


def _tokens(kv: KeysValues, part: slice) -> KeysValues:
    return KeysValues(kv.keys[:, :, part], kv.values[:, :, part])
