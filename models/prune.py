"""Which segments are retained where the choice looks at no keys (the scored choice: `forcingkv.prune`)."""

from __future__ import annotations

import numpy as np

from forcingkv.runtime.policies import Retain


def choose_ahead(
    retain: Retain, candidates: int, kept: int, layer: int, chunk: int | None
) -> list[int] | None:
    """The segments to keep where the choice looks at no keys; None where they have to be scored.

    Args:
        retain: how segments are chosen.
        candidates: how many there are.
        kept: how many are kept.
        layer: the layer that chooses.
        chunk: the chunk whose clean pass this is; `random` draws anew for each.

    Raises ValueError where `random` is not told the chunk.
    """
    if retain.choose == "least-similar":
        return None
    if retain.choose == "uniform":
        return [(2 * place + 1) * candidates // (2 * kept) for place in range(kept)]
    if chunk is None:
        raise ValueError("segments drawn at random need the index of the chunk")
    drawn = np.random.default_rng((retain.seed, chunk, layer)).choice(candidates, kept, replace=False)
    return sorted(drawn.tolist())
