"""Files of statistics of queries, also as TriAttention releases them, and statistics that are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forcingkv.models.generate import generate, seeded_noise
from forcingkv.models.kv import Cache
from forcingkv.models.kv_positions import Tables, rotated_back
from forcingkv.models.tensor_files import content_of_torch
from forcingkv.models.wan import Attend, KeysValues, WanModel
from forcingkv.runtime import positions
from forcingkv.runtime.kv.plan import CachePlan
from forcingkv.runtime.kv.statistics import QueryStatistics, told_of
from forcingkv.runtime.kv.window import first_position

TORCH_FILES = (".pt", ".pth")


def read_statistics(path: Path) -> QueryStatistics:
    """The statistics of a file: safetensors, or what torch saved, of which nothing is run.

    Raises InputError where it cannot be read, or holds something else.
    """
    if path.suffix not in TORCH_FILES:
        return QueryStatistics.read(path)
    found = content_of_torch(path)
    table: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    arrays = {
        str(name): part.detach().numpy()
        for name, part in table.items()
        if isinstance(part, torch.Tensor) and part.dtype in (torch.float32, torch.float64)
    }
    said = table.get("metadata")
    model, source = told_of(said if isinstance(said, Mapping) else {})
    return QueryStatistics.of(arrays, model, source, str(path))


def measure_statistics(
    model: WanModel,
    plan: CachePlan,
    texts: Sequence[Tensor],
    chunks: int,
    seed: int,
    progress: Callable[[int], None] = lambda chunk: None,
) -> QueryStatistics:
    """The statistics of all queries of all passes of videos, a text each.

    Args:
        model: on its device, heads in their own order.
        plan: under which it generates, of a policy that treats all heads alike.
        texts: text inputs (1, text_length, text_width), on that device.
        chunks: of each video.
        seed: of the first video's noise; each has the next.
        progress: called with how many chunks are made.
    """
    spec = plan.spec
    sums = torch.zeros(spec.layers, spec.heads, spec.head_dim // 2, 3, dtype=torch.float64)
    counts = [0] * spec.layers

    def watch(chunk: int, step: int, cache: Cache, attend: Attend) -> Attend:
        first = first_position(plan, chunk, chunk)
        tables = positions.rotary(spec, plan.geometry, first, spec.frames_per_chunk)
        rotary = Tables(*(torch.from_numpy(table).to(texts[0].device) for table in tables))

        def seen(layer: int, queries: Tensor, current: KeysValues) -> Tensor:
            pairs = torch.unflatten(rotated_back(queries, rotary), -1, (-1, 2))
            sizes = torch.linalg.vector_norm(pairs, dim=-1, keepdim=True)
            sums[layer] += torch.cat([pairs, sizes], -1).sum((0, 2), dtype=torch.float64).cpu()
            counts[layer] += queries.shape[0] * queries.shape[2]
            return attend(layer, queries, current)

        return seen

    for place, text in enumerate(texts):
        made = generate(model, plan, text, seeded_noise(plan, seed + place), chunks, watch=watch)
        for chunk in made:
            progress(place * chunks + chunk.index + 1)
    means = sums / torch.tensor(counts, dtype=torch.float64)[:, None, None, None]
    real, imaginary, size = (np.ascontiguousarray(part, np.float32) for part in means.unbind(-1))
    source = f"{len(texts)} videos of {chunks} chunks by {spec.name}, seeds from {seed}"
    return QueryStatistics(real, imaginary, size, spec.name, source)
