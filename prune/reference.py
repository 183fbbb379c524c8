"""The algorithm of DynamicPrune in torch: two operators, which export keeps as one node each.

A layer scores its segments, or follows the choice of the layer that did. Keys and values are (batch, heads,
tokens, head_dim). Definitions: docs/method.md, "Segment similarity and retention"; how a frame is split:
`runtime.kv.segments`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forcingkv.runtime.kv.segments import Split


def segment_similarity(frames: Tensor, segments: int) -> Tensor:
    """Similarity of each candidate segment to the same place one frame later: ((frames - 1) * segments,).

    It is the mean over a segment's tokens of the cosine between the token's key, all heads side by side, in a
    frame and in the next. `frames` are keys (heads, frames, frame tokens, head_dim), oldest first. Float32
    whatever the keys are, by the formula of the ONNX body (`onnx_operators`).
    """
    vectors = frames.permute(1, 2, 0, 3).flatten(2).float()
    dot = (vectors[:-1] * vectors[1:]).sum(-1)
    norm = (vectors * vectors).sum(-1).sqrt().clamp_min(1e-8)
    cosine = dot / (norm[:-1] * norm[1:])
    split = Split(cosine.shape[1], segments)
    if split.is_even:
        return torch.unflatten(cosine, 1, (segments, -1)).mean(-1).flatten()
    own = [slice(split.start(place), split.start(place + 1)) for place in range(segments)]
    return torch.stack([cosine[:, tokens].mean(1) for tokens in own], 1).flatten()


def gather_segments(x: Tensor, indices: Tensor, split: Split) -> Tensor:
    """What is kept of the segments in `indices` of x (batch, heads, tokens, head_dim), in that order."""
    if split.is_even:
        runs = torch.unflatten(x, 2, (-1, split.kept_tokens))
        return runs.index_select(2, indices).flatten(2, 3)
    frame, place = indices // split.segments, indices % split.segments
    starts = frame * split.frame_tokens + place * split.frame_tokens // split.segments
    rows = starts[:, None] + torch.arange(split.kept_tokens, device=indices.device)
    return x.index_select(2, rows.flatten())


@torch.library.custom_op("forcingkv::dynamic_prune", mutates_args=())
def prune_score(
    transition_keys: Tensor,
    transition_values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    frame_tokens: int,
    segments: int,
    kept: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose and collect the `kept` least similar segments, of `segments` a frame.

    The transition is the old transition frame of the layer's dynamic heads, new is the finished chunk of the
    same heads. Candidates are the frames [old transition, new 0, new 1, ...] but the last; batch item 0
    decides. Returns retained keys, retained values, and their indices (kept,) int64, ascending.
    """
    keys = torch.cat([transition_keys, new_keys], 2)
    similarity = segment_similarity(torch.unflatten(keys[0], 1, (-1, frame_tokens)), segments)
    # A stable sort breaks ties by the lowest index, as the ONNX body does.
    chosen = similarity.sort(stable=True).indices[:kept].sort().values
    split = Split(frame_tokens, segments)
    values = torch.cat([transition_values, new_values], 2)
    return gather_segments(keys, chosen, split), gather_segments(values, chosen, split), chosen


@torch.library.custom_op("forcingkv::dynamic_prune_follow", mutates_args=())
def prune_follow(
    transition_keys: Tensor,
    transition_values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    indices: Tensor,
    frame_tokens: int,
    segments: int,
) -> tuple[Tensor, Tensor]:
    """Collect the segments that the scoring layer chose: retained keys and retained values."""
    keys = torch.cat([transition_keys, new_keys], 2)
    values = torch.cat([transition_values, new_values], 2)
    split = Split(frame_tokens, segments)
    return gather_segments(keys, indices, split), gather_segments(values, indices, split)


# Shapes alone, for tracing.


@prune_score.register_fake
def _(tk: Tensor, tv: Tensor, nk: Tensor, nv: Tensor, frame_tokens: int, segments: int, kept: int) -> object:
    indices = nk.new_empty((kept,), dtype=torch.int64)
    return *_retained(nk, kept * Split(frame_tokens, segments).kept_tokens), indices


@prune_follow.register_fake
def _(
    tk: Tensor, tv: Tensor, nk: Tensor, nv: Tensor, indices: Tensor, frame_tokens: int, segments: int
) -> object:
    return _retained(nk, indices.shape[0] * Split(frame_tokens, segments).kept_tokens)


def _retained(keys: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    batch, heads, _, width = keys.shape
    return keys.new_empty((batch, heads, tokens, width)), keys.new_empty((batch, heads, tokens, width))
