"""The KV cache of a session: memory taken once, read and written in place, swapped by clean passes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right

import numpy as np

from forcingkv.runtime.backends import Lane, Tensor
from forcingkv.runtime.bundle import next_name
from forcingkv.runtime.kv.plan import CacheEntry, CachePlan, told_name
from forcingkv.runtime.kv.rebuild import Encoding, encoding_shapes, rows_names, rows_of
from forcingkv.runtime.kv.roles import Rows
from forcingkv.runtime.spec import Dtype


class KvCache(ABC):
    """The keys and values of a session in a lane's memory, where passes read them and clean passes go on.

    Attributes:
        passes: clean passes whose keys and values the cache holds, or has held: counted up, it holds what
            comes after the next one; 0: it is empty. In a video that was never rebuilt this is the index of
            the chunk that comes next.
        hollow: whether it holds the sink alone (`Encoding.hollow`): the next clean pass makes the rest of
            what it is to hold after `passes` of them.
        cuts: those of its passes with which scenes begin, the first scene's apart.
    """

    def __init__(self, plan: CachePlan, lane: Lane) -> None:
        """Take the memory of what says which tokens of a chunk are taken."""
        self.plan, self.passes, self.hollow = plan, 0, False
        self.cuts: tuple[int, ...] = ()
        self._queue = lane.main
        self._begins = [phase.first_chunk for phase in plan.phases]
        self._rows: list[dict[str, Tensor]] = [{} for _ in self._begins]  # for each phase
        for held, begin in zip(self._rows, self._begins, strict=True):
            for name, tokens in plan.rows(begin).items():
                held[name] = lane.tensor(tokens.shape, "int32")
                held[name].write(tokens, lane.main)
        self._told_since: dict[tuple[int, str], Rows] = {}
        """What was written of a phase since, where a scene or a chunk told otherwise."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all keys and values."""

    @property
    def phase(self) -> int:
        """Index of the phase that passes run in now; of a hollow cache the number of phases, one more."""
        return len(self._begins) if self.hollow else self._phase_at(self.passes)

    def restart(self) -> None:
        """Be empty."""
        self.passes, self.hollow, self.cuts = 0, False, ()

    def cut(self) -> None:
        """Let another scene begin with the next clean pass."""
        if self.cuts[-1:] != (self.passes,):
            self.cuts = (*self.cuts, self.passes)

    def tell(self) -> None:
        """Say what the next clean pass is told, where that depends on scenes or on the chunk: before it is
        put into the queue."""
        if not (self.cuts or self._told_since or self.plan.told_by_chunk):
            return
        phase = self._phase_at(self.passes)
        first, now = self.plan.rows(self._begins[phase]), self.plan.rows(self.passes, self.cuts)
        for name, rows in now.items():
            if not np.array_equal(rows, self._told_since.get((phase, name), first[name])):
                self._rows[phase][name].write(rows, self._queue)
                self._told_since[phase, name] = rows

    def cleaned(self) -> None:
        """A clean pass was put into the queue: the cache is what it makes."""
        self.passes, self.hollow = self.passes + (not self.hollow), False

    def phase_after(self, encoding: Encoding) -> int:
        """`phase` as it will be after a pass of `encoding`."""
        return len(self._begins) if encoding.hollow else self._phase_at(encoding.passes)

    def encoded(self, encoding: Encoding) -> None:
        """A pass of `encoding` was put into the queue: the cache is what it makes."""
        self.passes, self.hollow, self.cuts = encoding.passes, encoding.hollow, ()

    @property
    @abstractmethod
    def key(self) -> tuple[int, int]:
        """What the memory of a pass depends on: the phase, and what else is the cache's own."""

    @abstractmethod
    def held(self) -> dict[str, Tensor]:
        """What the cache holds, by input name."""

    def inputs(self) -> dict[str, Tensor]:
        """What passes read, by input name."""
        return self.held() | self._rows[self._phase_at(self.passes)]

    @abstractmethod
    def outputs(self) -> dict[str, Tensor]:
        """Where the clean pass writes the next cache, by output name."""

    def seen_by(self, encoding: Encoding) -> dict[str, Tensor]:
        """What a pass of `encoding` reads of the cache, by input name; nothing, where the lane finds it."""
        return {}

    def made_by(self, encoding: Encoding) -> dict[str, Tensor]:
        """Where such a pass writes the cache, by output name; nothing, where the lane knows it."""
        return {}

    def _phase_at(self, passes: int) -> int:
        return bisect_right(self._begins, passes) - 1


class CacheBuffers(KvCache):
    """Two buffers for each cached tensor: passes read one, the clean pass writes the other.

    A role that is written once has one buffer for both (`Role.buffer_tokens`). A tensor of a phase is a view
    of its buffer's start.
    """

    def __init__(self, plan: CachePlan, lane: Lane, dtype: Dtype) -> None:
        """Take the memory; `dtype` is what the graphs compute in."""
        super().__init__(plan, lane)
        self._buffers: dict[str, list[Tensor]] = {}
        for entry in plan.entries:
            cached = entry.dtype(plan.spec, dtype)
            sizes = [(math.prod(shape),) for shape in plan.buffer_shapes(entry)]
            self._buffers[entry.name] = [lane.tensor(size, cached, state=True) for size in sizes]
        self._told = {*rows_names(plan)}
        self._nothing = lane.tensor((0,), "int32")

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffers in self._buffers.values() for buffer in buffers)

    @property
    def key(self) -> tuple[int, int]:
        """The phase, and which of two buffers is read. Of a role that chooses its buffer otherwise the phase
        says which: it chooses by the clean passes so far while its length grows with each of them."""
        return self.phase, self.passes % 2

    def held(self) -> dict[str, Tensor]:
        return {
            e.name: self._buffer(e, self.passes).first(
                self.plan.entry_shape(e, 0 if self.hollow and not self._opens(e) else self.passes)
            )
            for e in self.plan.entries
        }

    def outputs(self) -> dict[str, Tensor]:
        """Nothing that passes read is among it: any pass may write there."""
        following = self.passes + (not self.hollow)
        return {
            next_name(e.name): self._buffer(e, following).first(self._next_shape(e))
            for e in self.plan.entries
        }

    def _next_shape(self, entry: CacheEntry) -> tuple[int, ...]:
        """What a clean pass gives."""
        if not self.hollow:
            return self.plan.next_shape(entry, self.passes)
        tokens = entry.role.tokens_of_hollow(self.plan, entry.group, self.passes)
        return self.plan.shape_of(entry, tokens)

    def _opens(self, entry: CacheEntry) -> bool:
        """Whether a tensor is of what a hollow cache holds."""
        return entry.role.opening_frames(self.plan.spec) > 0

    def seen_by(self, encoding: Encoding) -> dict[str, Tensor]:
        shapes, rows = encoding_shapes(self.plan, encoding), rows_of(self.plan, encoding)
        seen = {
            e.name: self._buffer(e, self.passes).first(shapes[e.name])
            for e in self.plan.entries
            if e.name in shapes
        }
        return seen | {name: self._nothing for name in shapes if name in self._told and name not in rows}

    def made_by(self, encoding: Encoding) -> dict[str, Tensor]:
        """Nothing that such a pass sees is among it: what stays it does not write."""
        rows = rows_of(self.plan, encoding)
        made = {}
        for e in self.plan.entries:
            taken = rows.get(told_name(e.group, e.role))
            shape = self.plan.shape_of(e, 0 if taken is None else len(taken))
            made[next_name(e.name)] = self._buffer(e, encoding.passes).first(shape)
        return made

    def _buffer(self, entry: CacheEntry, passes: int) -> Tensor:
        """What is read after so many clean passes."""
        return self._buffers[entry.name][entry.role.buffer_read(self.plan, entry.group, passes)]
