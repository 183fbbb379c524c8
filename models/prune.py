"""DynamicPrune in torch: which segments of the last frames a layer's dynamic heads retain.

Registered as torch operators, so that generation runs them and export keeps each as one node.
Definitions: METHOD.md section 3. Choices that look at no keys are made ahead, and followed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from forcingkv.models.wan import KeysValues
from forcingkv.runtime.roles import Retained


def segment_similarity(frames: Tensor, segments: int) -> Tensor:
    """Similarity of each candidate segment to the same place one frame later.

    Args:
        frames: keys (heads, frames, frame tokens, head_dim), oldest first.
        segments: runs a frame is split into.

    Returns:
        ((frames - 1) * segments,): the mean over a segment's tokens of the cosine between the
        token's key, all heads side by side, in a frame and in the next. Float32 whatever the keys are,
        by the formula of the ONNX body (export/prune_op.py).
    """
    vectors = frames.permute(1, 2, 0, 3).flatten(2).float()
    dot = (vectors[:-1] * vectors[1:]).sum(-1)
    norm = (vectors * vectors).sum(-1).sqrt().clamp_min(1e-8)
    cosine = dot / (norm[:-1] * norm[1:])
    return torch.unflatten(cosine, 1, (segments, -1)).mean(-1).flatten()


def gather_segments(x: Tensor, indices: Tensor, segment_tokens: int) -> Tensor:
    """The chosen segments of x (batch, heads, tokens, head_dim), in the order of `indices`."""
    runs = torch.unflatten(x, 2, (-1, segment_tokens))
    return runs.index_select(2, indices).flatten(2, 3)


@torch.library.custom_op("forcingkv::dynamic_prune", mutates_args=())
def _score(
    transition_keys: Tensor,
    transition_values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    frame_tokens: int,
    segments: int,
    kept: int,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch.cat([transition_keys, new_keys], 2)
    values = torch.cat([transition_values, new_values], 2)
    similarity = segment_similarity(torch.unflatten(keys[0], 1, (-1, frame_tokens)), segments)
    # A stable sort breaks ties by the lowest index, as the ONNX body does.
    chosen = similarity.sort(stable=True).indices[:kept].sort().values
    size = frame_tokens // segments
    return gather_segments(keys, chosen, size), gather_segments(values, chosen, size), chosen


@_score.register_fake
def _(
    transition_keys: Tensor,
    transition_values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    frame_tokens: int,
    segments: int,
    kept: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, width = new_keys.shape
    shape = (batch, heads, kept * (frame_tokens // segments), width)
    indices = new_keys.new_empty((kept,), dtype=torch.int64)
    return new_keys.new_empty(shape), new_keys.new_empty(shape), indices


@torch.library.custom_op("forcingkv::dynamic_prune_follow", mutates_args=())
def _follow(
    transition_keys: Tensor,
    transition_values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    indices: Tensor,
    segment_tokens: int,
) -> tuple[Tensor, Tensor]:
    keys = torch.cat([transition_keys, new_keys], 2)
    values = torch.cat([transition_values, new_values], 2)
    return (
        gather_segments(keys, indices, segment_tokens),
        gather_segments(values, indices, segment_tokens),
    )


@_follow.register_fake
def _(
    transition_keys: Tensor,
    transition_values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    indices: Tensor,
    segment_tokens: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, _, width = new_keys.shape
    shape = (batch, heads, indices.shape[0] * segment_tokens, width)
    return new_keys.new_empty(shape), new_keys.new_empty(shape)


def prune_score(
    transition: KeysValues, new: KeysValues, segment_tokens: int, segments: int, kept: int
) -> tuple[KeysValues, Tensor]:
    """Choose and collect the `kept` least similar segments.

    Args:
        transition: the old transition frame of the layer's dynamic heads.
        new: the finished chunk of the same heads.
        segment_tokens: tokens of a segment.
        segments: segments of a frame.
        kept: segments to keep.

    Returns:
        The retained keys and values, and their indices (kept,) int64, ascending. Candidates are the
        frames [old transition, new 0, new 1, ...] but the last; batch item 0 decides.
    """
    frame_tokens = segment_tokens * segments
    keys, values, indices = _score(*transition, *new, frame_tokens, segments, kept)
    return KeysValues(keys, values), indices


def prune_follow(transition: KeysValues, new: KeysValues, indices: Tensor, segment_tokens: int) -> KeysValues:
    """Collect the segments that the scoring layer chose."""
    return KeysValues(*_follow(*transition, *new, indices, segment_tokens))


def choose_ahead(
    role: Retained, candidates: int, kept: int, layer: int, chunk: int | None
) -> list[int] | None:
    """The segments to keep where the choice looks at no keys; None where they have to be scored.

    Args:
        role: how segments are chosen.
        candidates: how many there are.
        kept: how many are kept.
        layer: the layer that chooses.
        chunk: the chunk whose clean pass this is; `random` draws anew for each.

    Raises ValueError where `random` is not told the chunk.
    """
    if role.choose == "least-similar":
        return None
    if role.choose == "uniform":
        return [(2 * place + 1) * candidates // (2 * kept) for place in range(kept)]
    if chunk is None:
        raise ValueError("segments drawn at random need the index of the chunk")
    drawn = np.random.default_rng((role.seed, chunk, layer)).choice(candidates, kept, replace=False)
    return sorted(drawn.tolist())
