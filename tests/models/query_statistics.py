"""Statistics of queries that no model has, and TriAttention's score of a key, number by number."""

from __future__ import annotations

import cmath

import numpy as np

from forcingkv.runtime.kv.statistics import QueryStatistics
from forcingkv.runtime.spec import ModelSpec


def made_up(spec: ModelSpec, seed: int = 0, model: str | None = None) -> QueryStatistics:
    """Of a model of those sizes; pairs of some heads point one way, others hardly."""
    drawn = np.random.default_rng(seed)
    shape = spec.layers, spec.heads, spec.head_dim // 2
    real, imaginary = drawn.standard_normal((2, *shape), dtype=np.float32)
    size = np.hypot(real, imaginary) * (1 + drawn.random(shape, dtype=np.float32))
    return QueryStatistics(real, imaginary, size.astype(np.float32), model, "made up")


def score(
    statistics: QueryStatistics, spec: ModelSpec, layer: int, head: int, key: np.ndarray, distance: int
) -> float:
    """Of a key before rotation that lies `distance` frames before the chunk that comes next."""
    of_time = spec.rotary_pairs[0]
    total = 0.0
    for pair in range(spec.head_dim // 2):
        k = complex(float(key[2 * pair]), float(key[2 * pair + 1]))
        q = complex(float(statistics.real[layer, head, pair]), float(statistics.imaginary[layer, head, pair]))
        speed = spec.rope_theta ** (-pair / of_time) if pair < of_time else 0.0
        ahead = [1, 2, 4, 8, 16, 32, 64, 128]
        waves = [
            abs(q) * abs(k) * np.cos(speed * (distance + d) + cmath.phase(q * k.conjugate())) for d in ahead
        ]
        total += float(np.mean(waves))
        total += max(float(statistics.size[layer, head, pair]) - abs(q), 0.0) * abs(k)
    return total
