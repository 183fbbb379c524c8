"""The KV cache in torch, laid out by a `CachePlan`: made empty, attended to, and advanced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from forcingkv.models.prune import choose_ahead
from forcingkv.models.wan import Attend, KeysValues
from forcingkv.prune.reference import prune_follow, prune_score
from forcingkv.runtime.plan import CachePlan, HeadGroup

GroupCache: TypeAlias = dict[str, KeysValues]
"""Role -> its keys and values, for the roles the group caches."""

Cache: TypeAlias = Sequence[Sequence[GroupCache]]
"""[layer][group of that layer]."""


def empty_cache(plan: CachePlan, like: Tensor, batch: int = 1) -> Cache:
    """The cache before the first chunk: every role of length 0, dtype and device of `like`."""

    def entry(group: HeadGroup) -> KeysValues:
        shape = (batch, group.heads, 0, plan.spec.head_dim)
        return KeysValues(like.new_empty(shape), like.new_empty(shape))

    return [[{role: entry(g) for role in g.roles} for g in groups] for groups in plan.layers]


def attend_cache(plan: CachePlan, cache: Cache) -> Attend:
    """Attention of each head group to its cached roles and the current chunk."""

    def attend(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
        out = []
        for group, held in zip(plan.layers[layer], cache[layer], strict=True):
            own = _heads(current, group)
            keys = torch.cat([*(kv.keys for kv in held.values()), own.keys], 2)
            values = torch.cat([*(kv.values for kv in held.values()), own.values], 2)
            mine = queries[:, group.start : group.stop]
            out.append(F.scaled_dot_product_attention(mine, keys, values))
        return out[0] if len(out) == 1 else torch.cat(out, 1)

    return attend


def advance(
    plan: CachePlan,
    cache: Cache,
    new: Sequence[KeysValues],
    *,
    sink_rows: Mapping[str, Tensor] | None,
    retain: bool,
    chunk: int | None = None,
) -> tuple[Cache, Tensor | None]:
    """The cache after a clean pass.

    Args:
        plan: the cache plan.
        cache: the cache the pass read.
        new: each layer's keys and values of the pass.
        sink_rows: group label -> which of the chunk's tokens become the sink. None: those of its first
            frames, if the group's sink is empty; the sink stays as it is afterwards.
        retain: whether segments are chosen; without, the retained ones stay as they are.
        chunk: index of the chunk; needed where the policy draws segments at random.

    Returns:
        The next cache, and the indices of the retained segments where they were chosen: (kept,), or
        (layers that retain, kept) where each layer chooses for itself.
    """
    choices: list[Tensor] = []
    shared = plan.policy.retain is None or plan.policy.retain.shared
    following = []
    for layer, groups in enumerate(plan.layers):
        row = []
        for group, held in zip(groups, cache[layer], strict=True):
            own = _heads(new[layer], group)
            kept = dict(held)
            if group.sink_frames:
                kept["sink"] = _sink(plan, group, held, own, sink_rows)
            if group.recent_frames:
                kept["recent"] = _recent(plan, group, held, own)
            if group.retained_segments and retain:
                given = choices[0] if choices and shared else _ahead(plan, group, own, layer, chunk)
                kept["retained"], indices = _retained(plan, group, held, own, given)
                choices.append(indices)
            row.append(kept)
        following.append(row)
    if not choices:
        return following, None
    return following, choices[0] if shared else torch.stack(choices)


def _heads(kv: KeysValues, group: HeadGroup) -> KeysValues:
    if group.heads == kv.keys.shape[1]:
        return kv
    return KeysValues(kv.keys[:, group.start : group.stop], kv.values[:, group.start : group.stop])


def _tokens(kv: KeysValues, part: slice) -> KeysValues:
    return KeysValues(kv.keys[:, :, part], kv.values[:, :, part])


def _sink(
    plan: CachePlan,
    group: HeadGroup,
    held: GroupCache,
    new: KeysValues,
    rows: Mapping[str, Tensor] | None,
) -> KeysValues:
    if rows is not None:
        return KeysValues(*(part.index_select(2, rows[group.label]) for part in new))
    if held["sink"].keys.shape[2]:
        return held["sink"]
    return _tokens(new, slice(group.sink_frames * plan.frame_tokens))


def _recent(plan: CachePlan, group: HeadGroup, held: GroupCache, new: KeysValues) -> KeysValues:
    """The newest frames that are not in the sink."""
    newest = slice(-group.recent_frames * plan.frame_tokens, None)
    if group.recent_frames <= plan.spec.frames_per_chunk - group.sink_frames:
        return _tokens(new, newest)
    if group.sink_frames:
        # Frames of the first chunk go to the sink; an empty sink means this is the first chunk.
        to_sink = group.sink_frames * plan.frame_tokens - held["sink"].keys.shape[2]
        new = _tokens(new, slice(to_sink, None))
    joined = KeysValues(*(torch.cat(pair, 2) for pair in zip(held["recent"], new, strict=True)))
    return _tokens(joined, newest)


def _ahead(
    plan: CachePlan, group: HeadGroup, new: KeysValues, layer: int, chunk: int | None
) -> Tensor | None:
    """The indices of a choice that looks at no keys; None where keys have to be scored."""
    retain = plan.policy.retain
    assert retain is not None
    candidates = retain.segments * plan.spec.frames_per_chunk
    chosen = choose_ahead(retain, candidates, group.retained_segments, layer, chunk)
    return None if chosen is None else torch.tensor(chosen, device=new.keys.device)


def _retained(
    plan: CachePlan, group: HeadGroup, held: GroupCache, new: KeysValues, indices: Tensor | None
) -> tuple[KeysValues, Tensor]:
    """Retained segments: those of `indices`, where there is a choice already, else scored here."""
    assert plan.policy.retain is not None
    segments = plan.policy.retain.segments
    transition = held["recent"]
    if group.recent_frames > 1:
        transition = _tokens(transition, slice(-plan.frame_tokens, None))
    if indices is None:
        kept, indices = prune_score(transition, new, plan.segment_tokens, segments, group.retained_segments)
    else:
        kept = prune_follow(transition, new, indices, plan.segment_tokens)
    return KeysValues(*kept), indices
