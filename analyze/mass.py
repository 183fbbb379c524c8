"""Where a head's attention goes, measured without ever holding the attention matrix.

Goes through queries and keys in blocks and keeps each query's log-sum-exp a block (as FlashAttention
does), so memory grows neither with the number of keys nor with that of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KEY_BLOCK = 2048
"""Keys looked at together."""
LOGITS = 2**20
"""Logits held together, over all heads."""


class KeyRun(NamedTuple):
    """Keys of tokens that lie one after the other in a latent frame."""

    keys: Tensor
    """(heads, tokens, head_dim), after RoPE."""
    slot: int
    """Place in the output that their mass is added to."""
    offset: int = 0
    """Place of the first of them in its frame."""


class AttentionStatistics(NamedTuple):
    """Means over the measured query rows of each query frame, and their standard errors.

    Each (heads, query frames) but `mass` (heads, query frames, slots); float64.
    """

    mass: Tensor
    """Share of attention on each slot; sums to 1 over slots."""
    entropy: Tensor
    """Of the attention over keys, in nats: -sum p ln p."""
    same_position: Tensor
    """Share of attention on keys that lie where the query does in its frame, its own included."""
    mass_error: Tensor
    entropy_error: Tensor
    same_position_error: Tensor


def attention_statistics(
    queries: Tensor, runs: Sequence[KeyRun], places: Tensor, slots: int, frame_tokens: int
) -> AttentionStatistics:
    """Measure the attention of some query rows of each query frame over all keys.

    The error of a mean over n of the N rows of a frame, drawn without replacement, is
    s / sqrt(n) * sqrt(1 - n / N), s being the standard deviation of the rows (Cochran, Sampling
    Techniques, 2.6): 0 if all rows are measured. 1.96 errors hold the mean of all rows in 95% of draws as
    far as the mean is normally distributed: for mass and entropy it is, from some dozens of rows on;
    for the same-position mass of a sharp head, to which a few rows contribute nearly all, less.

    Args:
        queries: (heads, query frames, rows, head_dim), after RoPE.
        runs: every key that the queries attend to, each once.
        places: (query frames, rows) int64, where each row lies in its frame.
        slots: how many slots the runs name.
        frame_tokens: tokens of a frame (N).
    """
    heads, frames, rows, _ = queries.shape
    pieces = [
        KeyRun(keys, run.slot, run.offset + block * KEY_BLOCK)
        for run in runs
        for block, keys in enumerate(run.keys.split(KEY_BLOCK, 1))
    ]
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32  # never half precision
    membership = torch.zeros(len(pieces), slots, dtype=dtype, device=queries.device)
    membership[range(len(pieces)), [piece.slot for piece in pieces]] = 1
    longest = max(piece.keys.shape[1] for piece in pieces)
    step = max(1, LOGITS // (heads * longest))
    sums = torch.zeros(2, heads, frames, slots + 2, dtype=torch.float64, device=queries.device)
    for frame in range(frames):
        for start in range(0, rows, step):
            part = slice(start, start + step)
            values = _row_values(queries[:, frame, part], pieces, places[frame, part], membership).double()
            sums[0, :, frame] += values.sum(1)
            sums[1, :, frame] += values.square().sum(1)
    mean = sums[0] / rows
    spread = (sums[1] / rows - mean.square()).clamp(min=0) / max(rows - 1, 1)
    error = (spread * (1 - rows / frame_tokens)).sqrt()
    return AttentionStatistics(
        *(part for both in (mean, error) for part in (both[..., :slots], both[..., slots], both[..., -1]))
    )


def _row_values(queries: Tensor, pieces: Sequence[KeyRun], places: Tensor, membership: Tensor) -> Tensor:
    """(heads, rows, slots + 2): mass of each slot, entropy and same-position mass of each row."""
    scaled = queries.to(membership) * queries.shape[-1] ** -0.5
    logs, means, owns = zip(*(_piece_values(scaled, piece, places) for piece in pieces), strict=True)
    by_piece = torch.stack(logs, -1)
    total = by_piece.logsumexp(-1, keepdim=True)
    share = (by_piece - total).exp()
    entropy = total - (share * torch.stack(means, -1)).sum(-1, keepdim=True)
    own = (torch.stack(owns, -1) - total).exp().sum(-1, keepdim=True)
    return torch.cat([share @ membership, entropy, own], -1)


def _piece_values(scaled: Tensor, piece: KeyRun, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(heads, rows) each: log-sum-exp of a row's logits, their mean under its softmax, the own place's."""
    logits = scaled @ piece.keys.to(scaled).transpose(1, 2)
    tokens = logits.shape[-1]
    place = places - piece.offset
    here = (place >= 0) & (place < tokens)
    index = place.clamp(0, tokens - 1).expand(len(logits), -1).unsqueeze(-1)
    own = logits.gather(-1, index).squeeze(-1).masked_fill(~here, -torch.inf)
    highest = logits.amax(-1, keepdim=True)
    logits -= highest
    weights = logits.exp()
    weight = weights.sum(-1)
    mean = weights.mul_(logits).sum(-1) / weight
    highest = highest.squeeze(-1)
    return highest + weight.log(), highest + mean, own
