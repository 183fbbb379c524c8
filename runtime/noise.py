"""The noise of a video, addressed by place: any chunk's can be drawn without the ones before."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def chunk_noise(seed: int, chunk: int, step: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Standard normal noise that starts (step 0) or renews (step i, before pass i) a chunk's latents."""
    generator = np.random.default_rng((seed, chunk, step))
    return generator.standard_normal(shape, dtype=np.float32)
