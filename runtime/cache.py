"""The KV cache of a session: memory taken once, read and written in place, swapped by clean passes."""

from __future__ import annotations

import math
from bisect import bisect_right

import numpy as np

from forcingkv.runtime.backends import Lane, Tensor
from forcingkv.runtime.plan import CacheEntry, CachePlan


class CacheBuffers:
    """Two buffers for each cached tensor: passes read one, the clean pass writes the other.

    The sink has one buffer: it is written by the first clean pass, which does not read it, and never
    copied. A tensor of a phase is a view of its buffer's start.

    Attributes:
        passes: clean passes whose keys and values the cache holds, or has held. In a video that was never
            rebuilt this is the index of the chunk that comes next.
    """

    def __init__(self, plan: CachePlan, lane: Lane, dtype: str) -> None:
        """Take the memory; `dtype` is that of keys and values."""
        self.plan, self.passes = plan, 0
        last = plan.phases[-1].first_chunk
        self._begins = [phase.first_chunk for phase in plan.phases]
        self._sides: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for entry in plan.entries:
            size = (math.prod(plan.entry_shape(entry, last)),)
            first = lane.tensor(size, dtype, state=True)
            second = first if entry.role == "sink" else lane.tensor(size, dtype, state=True)
            for side, buffer in zip(self._sides, (first, second), strict=True):
                side[entry.name] = buffer
        self._rows: dict[str, Tensor] = {}
        for label, name in plan.sink_rows.items():
            rows = np.arange(plan.sink_tokens(label, 0), dtype=np.int32)
            self._rows[name] = lane.tensor(rows.shape, "int32")
            self._rows[name].write(rows, lane.main)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        buffers = {id(b): b for side in self._sides for b in side.values()}
        return sum(buffer.nbytes for buffer in buffers.values())

    @property
    def phase(self) -> int:
        """Index of the phase that passes run in now."""
        return bisect_right(self._begins, self.passes) - 1

    @property
    def key(self) -> tuple[int, int]:
        """What the memory of a pass depends on: the phase, and which of the two buffers is read."""
        return self.phase, self.passes % 2

    def restart(self) -> None:
        """Forget everything."""
        self.passes = 0

    def held(self) -> dict[str, Tensor]:
        """What the cache holds, by input name."""
        side = self._sides[self.passes % 2]
        return {e.name: side[e.name].first(self.plan.entry_shape(e, self.passes)) for e in self.plan.entries}

    def inputs(self) -> dict[str, Tensor]:
        """What passes read, by input name."""
        rows = {
            name: self._rows[name].first((self.plan.sink_tokens(label, self.passes),))
            for label, name in self.plan.sink_rows.items()
        }
        return self.held() | rows

    def outputs(self) -> dict[str, Tensor]:
        """Where a pass may write the next cache, by output name. Nothing that passes read is among it."""
        side = self._sides[1 - self.passes % 2]
        return {f"next.{e.name}": side[e.name].first(self._next_shape(e)) for e in self.plan.entries}

    def swap(self) -> None:
        """Make what the clean pass wrote the cache."""
        self.passes += 1

    def _next_shape(self, entry: CacheEntry) -> tuple[int, ...]:
        """As the graph gives it, whether the next chunk sees it or not.

        Its sink is empty after the first pass; its retained segments are always all there.
        """
        plan = self.plan
        if entry.role == "sink" and self.passes:
            shape = plan.entry_shape(entry, 0)
            return shape[0], shape[1], 0, shape[3]
        steady = plan.phases[-1].first_chunk
        return plan.entry_shape(entry, steady if entry.role == "retained" else self.passes + 1)
