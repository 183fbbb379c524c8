"""What the host computes for passes: position and time features, in float64, and noise.

The step graph takes them as inputs, so nothing in it depends on a table's length (public code
crashes past position 1,024) and no angle is formed in half precision.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.runtime.spec import Geometry, ModelSpec

Floats = npt.NDArray[np.float32]


def rotary(spec: ModelSpec, geometry: Geometry, first_frame: float, frames: int) -> tuple[Floats, Floats]:
    """Cosines and sines of the 3-D rotary embedding (docs/method.md, "Positions").

    Returns two float32 arrays (frames * frame_tokens, head_dim / 2); the pairs of a head are those
    of time, then height, then width; tokens run over frames, rows, columns.
    """
    of_time, of_rows, of_columns = spec.rotary_pairs
    tokens, half = geometry.frame_tokens, spec.head_dim // 2
    moving = angles_of(first_frame + np.arange(frames), of_time, spec.rope_theta)
    still = _within_a_frame(*geometry.grid, of_rows, of_columns, spec.rope_theta)
    tables = []
    for function, within in zip((np.cos, np.sin), still, strict=True):
        table = np.empty((frames, tokens, half), np.float32)
        table[:, :, :of_time] = function(moving)[:, None]
        table[:, :, of_time:] = within
        tables.append(table.reshape(-1, half))
    return tables[0], tables[1]


def turn(spec: ModelSpec, frames: int) -> tuple[Floats, Floats]:
    """What moves keys that are rotated already by so many frames in time.

    A key x becomes `x * cosines + swapped * sines`, where `swapped` has the two numbers of each pair of x the
    other way round. Returns two float32 arrays (head_dim,): of pairs of rows and columns 1 and 0, exactly.
    """
    of_time, _, _ = spec.rotary_pairs
    angles = np.zeros(spec.head_dim // 2)
    angles[:of_time] = angles_of(np.array([frames]), of_time, spec.rope_theta)[0]
    cosines, sines = (np.repeat(function(angles), 2).astype(np.float32) for function in (np.cos, np.sin))
    sines[::2] *= -1
    return cosines, sines


@lru_cache(maxsize=8)
def _within_a_frame(
    rows: int, columns: int, of_rows: int, of_columns: int, theta: float
) -> tuple[Floats, Floats]:
    """Cosines and sines of rows and columns: most of the work, and the same for all frames."""
    axes = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [
        angles_of(position.reshape(-1), pairs, theta)
        for position, pairs in zip(axes, (of_rows, of_columns), strict=True)
    ]
    table = np.concatenate(angles, axis=1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def angles_of(positions: npt.NDArray[Any], pairs: int, theta: float) -> npt.NDArray[np.float64]:
    """By which pairs turn at those positions: (positions, pairs) in float64."""
    return positions[:, None] * theta ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))


def time_features(spec: ModelSpec, timestep: float | npt.NDArray[np.floating]) -> Floats:
    """Sinusoidal features of timesteps, cosines first: float32 (..., time_width)."""
    half = spec.time_width // 2
    frequencies = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.asarray(timestep, dtype=np.float64)[..., None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def chunk_noise(seed: int, chunk: int, step: int, shape: tuple[int, ...]) -> Floats:
    """Standard normal noise that starts (step 0) or renews (step i, before pass i) a chunk's latents.

    It is addressed by place: any chunk's can be drawn without the ones before.
    """
    generator = np.random.default_rng((seed, chunk, step))
    return generator.standard_normal(shape, dtype=np.float32)
