"""Position and time features, computed on the host in float64 for any position.

The step graph takes them as inputs, so nothing in it depends on a table's length (public code
crashes past position 1,024) and no angle is formed in half precision.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from forcingkv.runtime.spec import Geometry, ModelSpec

__all__ = ["rotary", "time_features"]

Floats = npt.NDArray[np.float32]


def rotary(spec: ModelSpec, geometry: Geometry, first_frame: int, frames: int) -> tuple[Floats, Floats]:
    """Cosines and sines of the 3-D rotary embedding (METHOD.md section 5).

    Returns two float32 arrays (frames * frame_tokens, head_dim / 2); the pairs of a head are those
    of time, then height, then width; tokens run over frames, rows, columns.
    """
    rows, columns = geometry.grid
    axes = np.meshgrid(
        np.arange(first_frame, first_frame + frames), np.arange(rows), np.arange(columns), indexing="ij"
    )
    angles = [
        position.reshape(-1, 1) * (spec.rope_theta ** (-np.arange(pairs, dtype=np.float64) / pairs))
        for position, pairs in zip(axes, spec.rotary_pairs, strict=True)
        if pairs
    ]
    table = np.concatenate(angles, axis=1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def time_features(spec: ModelSpec, timestep: float | npt.NDArray[np.floating]) -> Floats:
    """Sinusoidal features of timesteps, cosines first: float32 (..., time_width)."""
    half = spec.time_width // 2
    frequencies = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.asarray(timestep, dtype=np.float64)[..., None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
