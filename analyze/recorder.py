"""Recording: attention mass of every head while videos are generated, one Parquet file a sample.

Columns of `stats/sample-NNNN.parquet`, one row for each combination:

| column | type | meaning |
|---|---|---|
| sample | int32 | index of the video |
| chunk, step | int32 | chunk index; denoising pass (0 is the noisiest) |
| layer, head | int32 | head index in the model's own order |
| query_frame | int32 | frame within the chunk whose queries are averaged |
| key_frame | int32 | latent frame of the video that is attended to |
| mass | float32 | mean share of attention on that frame; sums to 1 over key_frame |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from forcingkv.analyze.mass import frame_mass
from forcingkv.models.cache import Cache
from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.wan import Attend, KeysValues, WanModel
from forcingkv.runtime.plan import CachePlan

__all__ = ["Recorder", "record_sample"]


class Recorder:
    """Collects the mass of every denoising pass of one sample. `watch` is given to `generate`.

    It records under policies that give all heads the same cached frames (`full`, `window`).
    """

    def __init__(self, plan: CachePlan, sample: int) -> None:
        self.plan, self.sample = plan, sample
        self._parts: list[pl.DataFrame] = []

    def watch(self, chunk: int, step: int, cache: Cache, attend: Attend) -> Attend:
        """Attention that does what `attend` does and notes the mass."""

        def recorded(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
            (held,) = cache[layer]
            keys = torch.cat([*(kv.keys for kv in held.values()), current.keys], 2)
            mass = frame_mass(queries[0], keys[0], self.plan.frame_tokens)
            self._note(chunk, step, layer, mass.numpy(), self._key_frames(chunk, held))
            return attend(layer, queries, current)

        return recorded

    def frame(self) -> pl.DataFrame:
        """All rows noted so far."""
        return pl.concat(self._parts)

    def _key_frames(self, chunk: int, held: dict[str, KeysValues]) -> list[int]:
        """The video's frames that the keys belong to, in their order."""
        first, size = chunk * self.plan.spec.frames_per_chunk, self.plan.frame_tokens
        counts = {role: kv.keys.shape[2] // size for role, kv in held.items()}
        frames = list(range(counts.get("sink", 0)))
        frames += range(first - counts.get("recent", 0), first + self.plan.spec.frames_per_chunk)
        return frames

    def _note(
        self, chunk: int, step: int, layer: int, mass: npt.NDArray[np.float32], key_frames: Sequence[int]
    ) -> None:  # fmt: skip
        heads, query_frames, count = mass.shape
        head, query, key = np.indices(mass.shape, dtype=np.int32).reshape(3, -1)
        rows = heads * query_frames * count
        self._parts.append(
            pl.DataFrame(
                {
                    "sample": np.full(rows, self.sample, np.int32),
                    "chunk": np.full(rows, chunk, np.int32),
                    "step": np.full(rows, step, np.int32),
                    "layer": np.full(rows, layer, np.int32),
                    "head": head,
                    "query_frame": query,
                    "key_frame": np.asarray(key_frames, np.int32)[key],
                    "mass": mass.reshape(-1),
                }
            )
        )


def record_sample(
    model: WanModel,
    plan: CachePlan,
    text: Tensor,
    seed: int,
    sample: int,
    chunks: int,
    folder: Path,
    say: Callable[[int], None] = lambda chunk: None,
) -> Path:
    """Generate one video and write its statistics. Returns the Parquet file."""
    recorder = Recorder(plan, sample)
    for made in generate(model, plan, text, seeded_noise(plan, seed), chunks, recorder.watch):
        say(made.index)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sample-{sample:04d}.parquet"
    recorder.frame().write_parquet(path)
    return path
