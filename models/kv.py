"""The KV cache in torch, laid out by a `CachePlan`: made empty, attended to, and advanced by clean passes.

How each role follows from a clean pass is in `models.kv_roles`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models import kv_bank as kv_bank  # the halves of roles register themselves
from forcingkv.models import kv_ema as kv_ema
from forcingkv.models import kv_history as kv_history
from forcingkv.models import kv_tokens as kv_tokens
from forcingkv.models.kv_codes import CodedKeysValues, as_attended, as_cached, in_numbers
from forcingkv.models.kv_roles import HALVES, CleanPass, GroupCache, Rotary, Turn
from forcingkv.models.wan import Attend, KeysValues
from forcingkv.runtime import positions
from forcingkv.runtime.kv.codes import PARTS, part_layout, parts_of
from forcingkv.runtime.kv.plan import CachePlan, HeadGroup
from forcingkv.runtime.kv.retained import Choice
from forcingkv.runtime.kv.roles import Cuts, Role
from forcingkv.runtime.kv.window import moved_by
from forcingkv.runtime.spec import Dtype, ModelSpec

Cache: TypeAlias = Sequence[Sequence[GroupCache]]
"""[layer][group of that layer]."""


def empty_cache(plan: CachePlan, like: Tensor, batch: int = 1) -> Cache:
    """The cache before the first chunk: all roles of length 0, on the device of `like`, for its dtype."""

    def made(group: HeadGroup, role: Role) -> KeysValues:
        parts = [
            like.new_empty((batch, group.heads, 0, width), dtype=dtype)
            for dtype, width in part_layouts(plan.spec, role, like.dtype)
        ]
        return cached_parts(parts)

    return [[{role.name: made(g, role) for role in g.roles} for g in groups] for groups in plan.layers]


def part_layouts(spec: ModelSpec, role: Role, compute: torch.dtype) -> list[tuple[torch.dtype, int]]:
    """(dtype, numbers of a token in a head) of each tensor that a role caches, in a model that computes in
    `compute`."""
    name: Dtype = str(compute).removeprefix("torch.")  # type: ignore[assignment]
    layouts = (part_layout(role, part, spec, name) for part in parts_of(role))
    return [(getattr(torch, dtype), width) for dtype, width in layouts]


def cached_parts(tensors: Sequence[Tensor]) -> KeysValues:
    """The tensors of a role, in the order in which the plan has them, as its keys and values."""
    return KeysValues(*tensors) if len(tensors) == len(PARTS) else CodedKeysValues(*tensors)


def attend_cache(plan: CachePlan, cache: Cache) -> Attend:
    """Attention of each head group to its cached roles and the current chunk."""

    def attend(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
        out = []
        for group, held in zip(plan.layers[layer], cache[layer], strict=True):
            own = heads_of(current, group)
            read = [read_role(plan, group, role, held[role.name], own.keys) for role in group.roles]
            keys = torch.cat([*(kv.keys for kv in read), own.keys], 2)
            values = torch.cat([*(kv.values for kv in read), own.values], 2)
            mine = queries[:, group.start : group.stop]
            out.append(F.scaled_dot_product_attention(mine, keys, values))
        return out[0] if len(out) == 1 else torch.cat(out, 1)

    return attend


def noting(attend: Attend, queries: list[Tensor]) -> Attend:
    """The same attention; each layer's queries are put behind `queries`, for `advance`."""

    def noted(layer: int, of_layer: Tensor, current: KeysValues) -> Tensor:
        queries.append(of_layer)
        return attend(layer, of_layer, current)

    return noted


def read_role(plan: CachePlan, group: HeadGroup, role: Role, held: KeysValues, like: Tensor) -> KeysValues:
    """What a group attends to of a role, in the dtype of `like`, of what is cached."""
    # Numbers are made of codes before any are cut off: exporting asks for a length of tokens by name.
    whole = as_attended(role.dtype, held, like)
    if hidden := role.hidden_tokens(plan, group):
        whole = KeysValues(*(part[:, :, hidden:] for part in whole))
    return HALVES[role.name].read(role, whole, like)


def read_whole(role: Role, held: KeysValues, like: Tensor) -> KeysValues:
    """The same where none of what is cached is hidden."""
    return HALVES[role.name].read(role, as_attended(role.dtype, held, like), like)


def advance(
    plan: CachePlan,
    cache: Cache,
    new: Sequence[KeysValues],
    *,
    chunk: int | None,
    rows: Mapping[str, Tensor] | None = None,
    turn: Turn | None = None,
    cuts: Cuts = (),
    rotary: Rotary | None = None,
    queries: Sequence[Tensor] = (),
) -> tuple[Cache, Tensor | None]:
    """The cache after a clean pass.

    Args:
        plan: the cache plan.
        cache: the cache the pass read.
        new: each layer's keys and values of the pass.
        chunk: index of the chunk. None in a graph, which chooses segments in every pass.
        rows: what a graph is told of the chunk, as `CachePlan.rows` has it. None: what the roles say.
        turn: by what keys move with the window. None: by nothing.
        cuts: the chunks with which scenes begin, but the first.
        rotary: the tables that the chunk's keys were rotated by; not every role asks for them.
        queries: each layer's queries of the pass (`noting`), where the plan reads them.

    Returns:
        The next cache, and the indices of the retained segments where they were chosen: (kept,), or
        (layers that retain, kept) where each layer chooses for itself.
    """
    chosen: list[Tensor] = []
    choice = choice_of(plan, chunk)
    following = [
        [
            advance_group(
                CleanPass(
                    plan,
                    layer,
                    *of,
                    heads_of(new[layer], of[0]),
                    rows,
                    choice,
                    chunk,
                    chosen,
                    turn=turn,
                    cuts=cuts,
                    rotary=rotary,
                    queries=queries_of(queries[layer], of[0]) if queries else None,
                )
            )
            for of in zip(groups, cache[layer], strict=True)
        ]
        for layer, groups in enumerate(plan.layers)
    ]
    if choice is None or not chosen:
        return following, None
    return following, chosen[0] if choice.role.shared else torch.stack(chosen)


def choice_of(plan: CachePlan, chunk: int | None) -> Choice | None:
    """What the clean pass of a chunk chooses, if anything; of one that does not know its chunk, always."""
    return plan.choice if chunk is None or plan.chooses(chunk) else None


def advance_group(done: CleanPass) -> GroupCache:
    """What a group of heads caches after a clean pass."""
    roles = done.group.roles
    # What is chosen comes last, the order of nodes in the graphs of bundles so far.
    last = sorted(roles, key=lambda role: role.chooses)
    made = {role.name: _made(role, done) for role in last}
    if done.turn is not None:
        # Last: what is compared lies in one window. All that stays turns by the same angle.
        for role in roles:
            if role.moves:
                made[role.name] = HALVES[role.name].moved(role, made[role.name], done.turn, done)
    return {role.name: made[role.name] for role in roles}


def _made(role: Role, done: CleanPass) -> KeysValues:
    half = HALVES[role.name]
    if role.dtype is not None:
        return half.advance_coded(role, done)
    return half.advance(role, in_numbers(done) if done.group.coded else done)


def encode_group(
    group: HeadGroup,
    queries: Tensor,
    own: KeysValues,
    held: GroupCache,
    rows: Mapping[str, Tensor],
    turn: Turn | None,
) -> tuple[Tensor, GroupCache]:
    """Attention of a group's heads in a pass that encodes newest frames anew, without a mask, and what roles
    take of these frames.

    Args:
        group: the group.
        queries: of all heads.
        own: keys and values of the frames, of the group's heads.
        held: what the frames see beside themselves: roles that stay.
        rows: name of each other role -> which of the frames' tokens it takes.
        turn: moves keys to where the next chunk sees them. None: they stay.
    """
    by_name = {role.name: role for role in group.roles}
    seen = [*(read_whole(by_name[name], kv, own.keys) for name, kv in held.items()), own]
    keys, values = (torch.cat(parts, 2) for parts in zip(*seen, strict=True))
    attended = F.scaled_dot_product_attention(queries[:, group.start : group.stop], keys, values)
    made = {}
    for name, taken in rows.items():
        made[name] = KeysValues(*(part.index_select(2, taken) for part in own))
        if turn is not None and by_name[name].moves:
            made[name] = HALVES[name].move(by_name[name], made[name], turn)
        made[name] = as_cached(by_name[name].dtype, made[name])
    return attended, made


def turn_of(plan: CachePlan, passes: int, device: torch.device) -> Turn | None:
    """By what the clean pass after `passes` others moves keys; None: they stay."""
    frames = moved_by(plan, passes)
    if not frames:
        return None
    return Turn(*(torch.from_numpy(table).to(device) for table in positions.turn(plan.spec, frames)))


def queries_of(queries: Tensor, group: HeadGroup) -> Tensor:
    """Queries of a group's heads, of those of all heads: a view."""
    return queries[:, group.start : group.stop]


def heads_of(kv: KeysValues, group: HeadGroup) -> KeysValues:
    """Keys and values of a group's heads, of those of all heads: a view."""
    if group.heads == kv.keys.shape[1]:
        return kv
    return KeysValues(kv.keys[:, group.start : group.stop], kv.values[:, group.start : group.stop])
