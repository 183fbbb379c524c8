"""Caches that random keys go through, chunk by chunk, and the same keys before they were rotated."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from forcingkv.models.kv import Cache, advance, empty_cache, turn_of
from forcingkv.models.wan import KeysValues, rotate
from forcingkv.runtime import positions
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.window import first_position

EXACT = torch.zeros(())
"""Of the dtype in which nothing is lost here."""


def rotated(raw: torch.Tensor, plan: CachePlan, position: int) -> torch.Tensor:
    """Keys of a frame that stands at a position."""
    tables = positions.rotary(plan.spec, plan.geometry, position, 1)
    return rotate(raw, *map(torch.from_numpy, tables))


def advanced(
    plan: CachePlan, chunks: int, *, like: torch.Tensor = EXACT, queries: list[torch.Tensor] | None = None
) -> Iterator[tuple[int, Cache, list[torch.Tensor], list[list[int]]]]:
    """(chunk that comes next, cache, keys of all frames before rotation, segments chosen so far).

    `queries`: gets each clean pass's own, as they meet rotated keys; None: it has none.
    """
    drawn = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    spec, size = plan.spec, plan.frame_tokens
    cache, raw, chosen = empty_cache(plan, like), [], []
    for chunk in range(chunks):
        new = torch.randn(spec.frames_per_chunk, 1, spec.heads, size, spec.head_dim)
        raw += [*new]
        first = first_position(plan, chunk, chunk)
        keys = torch.cat([rotated(x, plan, first + n) for n, x in enumerate(new)], 2)
        layer = KeysValues(keys.to(like), torch.cat([*new], 2).to(like))
        tables = positions.rotary(spec, plan.geometry, first, spec.frames_per_chunk)
        rotary = torch.from_numpy(tables[0]), torch.from_numpy(tables[1])
        turn = turn_of(plan, chunk, torch.device("cpu"))
        asked: list[torch.Tensor] = []
        if queries is not None:
            asked = [torch.randn(1, spec.heads, plan.chunk_tokens, spec.head_dim, generator=drawn).to(like)]
            queries += asked
        cache, indices = advance(
            plan,
            cache,
            [layer] * spec.layers,
            chunk=chunk,
            turn=turn,
            rotary=rotary,
            queries=asked * spec.layers,
        )
        chosen.append([] if indices is None else indices.tolist())
        yield chunk + 1, cache, raw, chosen
