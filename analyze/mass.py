"""Frame-wise attention mass, exact, without ever holding the attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frame_mass"]


def frame_mass(queries: Tensor, keys: Tensor, frame_tokens: int) -> Tensor:
    """Share of each query frame's attention that falls on each key frame (METHOD.md section 2).

    Goes through the keys a frame at a time and keeps only each query's log-sum-exp, so memory does
    not grow with the number of keys.

    Args:
        queries: (heads, query tokens, head_dim), after RoPE.
        keys: (heads, key tokens, head_dim), after RoPE; every key a query attends to.
        frame_tokens: tokens of a frame; divides both token counts.

    Returns:
        (heads, query frames, key frames) float32: the mean over a query frame's tokens of the
        softmax mass on each key frame. Each row sums to 1.
    """
    scaled = queries.float() * queries.shape[-1] ** -0.5
    frames = torch.split(keys.float(), frame_tokens, dim=1)
    logs = torch.stack([(scaled @ frame.transpose(1, 2)).logsumexp(-1) for frame in frames], -1)
    return torch.unflatten(logs.softmax(-1), 1, (-1, frame_tokens)).mean(2)
