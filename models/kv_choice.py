"""Which of many tokens have the best scores, head by head, in operators that every backend has.

TensorRT's TopK takes 3,840 tokens at most, and none says which of equal scores it takes. So the score that
just suffices is searched, and what lies above it is moved together (docs/decisions/0056).
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 16
"""Into how many the range of scores is cut at a time."""
ROUNDS = 8
"""16 ** 8 parts of the range: finer than float32 tells scores apart, but for some near 0."""


def best(scores: Tensor, there: Tensor, kept: int) -> Tensor:
    """Places of the `kept` best scores of each row, rising: int64 (rows, kept). Of equal ones the last.

    Args:
        scores: float32 (rows, places), finite.
        there: float32 (places,), 1 for each place that counts, or else 0.
        kept: at most the number of places. Where fewer count, they come first, and any others behind them.
    """
    rows, count = scores.shape
    scores = scores * there
    low, high = _limits(scores, there, kept)
    above = there * (scores > high).float()
    tied = there * (1 - (scores > high).float()) * (1 - (low > scores).float())
    missing = kept - above.sum(1, keepdim=True)
    behind = tied.sum(1, keepdim=True) - tied.cumsum(1)
    stays = above + tied * (missing > behind).float()
    # Each place's rank among those that stay, or behind them among the others: sums of whole numbers, exact.
    rank, places = stays.cumsum(1), torch.arange(count, device=scores.device)
    others = stays.sum(1, keepdim=True) + places.float() - rank
    target = (stays * (rank - 1) + (1 - stays) * others).to(torch.int64)
    target = target + torch.arange(rows, device=scores.device)[:, None] * count
    source = places.expand(rows, count).reshape(rows * count)
    ordered = torch.zeros_like(source).scatter(0, target.reshape(rows * count), source)
    return ordered.reshape(rows, count)[:, :kept]


def _limits(scores: Tensor, there: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """(low, high) of each row, float32 (rows, 1): fewer than `kept` scores lie above high, and what lies
    between the two is equal, as far as that can be told. Not all that is above low may be kept."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    shares = torch.arange(1, PARTS, device=scores.device).float() * (1 / PARTS)
    for _ in range(ROUNDS):
        cuts = low + (high - low) * shares
        above = ((scores[:, :, None] > cuts[:, None]).float() * there[:, None]).sum(1)
        enough = above > kept - 0.5
        low = torch.where(enough, cuts, low).amax(1, keepdim=True)
        high = torch.where(enough, high, cuts).amin(1, keepdim=True)
    return low, high


def taken(x: Tensor, places: Tensor) -> Tensor:
    """Of x (batch, heads, tokens, width) each head's tokens at its places (batch * heads, kept)."""
    batch, heads, tokens, _ = x.shape
    begins = torch.arange(batch * heads, device=x.device)[:, None] * tokens
    rows = x.flatten(0, 2).index_select(0, (places + begins).flatten())
    return torch.unflatten(rows, 0, (batch, heads, places.shape[1]))
