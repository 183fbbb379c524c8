"""The KV cache of a session: buffers allocated once, read and written in place, swapped by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from forcingkv.runtime.plan import CacheEntry, CachePlan

__all__ = ["CacheBuffers"]

Array = npt.NDArray[np.float32]


class CacheBuffers:
    """Two buffers for each cached tensor: passes read one, the clean pass writes the other.

    The sink has one buffer: it is written by the first chunk, which does not read it, and never
    copied. A tensor of a phase is a view of its buffer's start.
    """

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        last = plan.phases[-1].first_chunk
        self._current: dict[str, Array] = {}
        self._spare: dict[str, Array] = {}
        for entry in plan.entries:
            size = math.prod(plan.entry_shape(entry, last))
            self._current[entry.name] = np.empty(size, np.float32)
            self._spare[entry.name] = (
                self._current[entry.name] if entry.role == "sink" else np.empty(size, np.float32)
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        buffers = {id(b): b for b in (*self._current.values(), *self._spare.values())}
        return sum(buffer.nbytes for buffer in buffers.values())

    def inputs(self, chunk: int) -> dict[str, npt.NDArray[Any]]:
        """What the passes of a chunk read, by input name."""
        plan = self.plan
        held = {e.name: self._view(self._current, e, chunk) for e in plan.entries}
        rows = {
            name: np.arange(plan.sink_tokens(label, chunk), dtype=np.int32)
            for label, name in plan.sink_rows.items()
        }
        return held | rows

    def outputs(self, chunk: int) -> dict[str, Array]:
        """Where the clean pass of a chunk writes, by output name: only what changes."""
        return {f"next.{e.name}": self._view(self._spare, e, chunk + 1) for e in self._written(chunk)}

    def swap(self, chunk: int) -> None:
        """Make what the clean pass of a chunk wrote the current cache."""
        for entry in self._written(chunk):
            name = entry.name
            self._current[name], self._spare[name] = self._spare[name], self._current[name]

    def _written(self, chunk: int) -> Iterator[CacheEntry]:
        for entry in self.plan.entries:
            if entry.role == "sink" and chunk > 0:
                continue
            if entry.role == "retained" and chunk + 1 < self.plan.retains_from:
                continue
            yield entry

    def _view(self, buffers: dict[str, Array], entry: CacheEntry, chunk: int) -> Array:
        shape = self.plan.entry_shape(entry, chunk)
        return buffers[entry.name][: math.prod(shape)].reshape(shape)
