"""The KV cache of a session: memory taken once, read and written in place, swapped by clean passes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right

from forcingkv.runtime.backends import Lane, Tensor
from forcingkv.runtime.bundle import next_name
from forcingkv.runtime.kv.plan import CacheEntry, CachePlan
from forcingkv.runtime.kv.rebuild import Encoding
from forcingkv.runtime.spec import Dtype


class KvCache(ABC):
    """The keys and values of a session in a lane's memory, where passes read them and clean passes go on.

    Attributes:
        passes: clean passes whose keys and values the cache holds, or has held: counted up, it holds what
            comes after the next one; 0: it is empty. In a video that was never rebuilt this is the index of
            the chunk that comes next.
        hollow: whether it holds the sink alone (`Encoding.hollow`): the next clean pass makes the rest of
            what it is to hold after `passes` of them.
    """

    def __init__(self, plan: CachePlan, lane: Lane) -> None:
        """Take the memory of what says which tokens of a chunk are taken."""
        self.plan, self.passes, self.hollow = plan, 0, False
        self._begins = [phase.first_chunk for phase in plan.phases]
        self._rows: list[dict[str, Tensor]] = [{} for _ in self._begins]  # for each phase
        for held, begin in zip(self._rows, self._begins, strict=True):
            for name, tokens in plan.rows(begin).items():
                held[name] = lane.tensor(tokens.shape, "int32")
                held[name].write(tokens, lane.main)

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
        self.passes, self.hollow = 0, False

    def cleaned(self) -> None:
        """A clean pass was put into the queue: the cache is what it makes."""
        self.passes, self.hollow = self.passes + (not self.hollow), False

    def phase_after(self, encoding: Encoding) -> int:
        """`phase` as it will be after a pass of `encoding`."""
        return len(self._begins) if encoding.hollow else self._phase_at(encoding.passes)

    def encoded(self, encoding: Encoding) -> None:
        """A pass of `encoding` was put into the queue: the cache is what it makes."""
        self.passes, self.hollow = encoding.passes, encoding.hollow

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

    def encoding_inputs(self, encoding: Encoding) -> dict[str, Tensor]:
        """What a pass of `encoding` reads, by input name: the sink, of no tokens where it does not stay."""
        sinks = {e.name: e for e in self.plan.entries if e.role.opening_frames(self.plan.spec)}
        if encoding.keeps_sink:
            return {name: tensor for name, tensor in self.held().items() if name in sinks}
        return {name: self._empty(entry) for name, entry in sinks.items()}

    @abstractmethod
    def encoding_outputs(self, encoding: Encoding) -> dict[str, Tensor]:
        """Where a pass of `encoding` writes what it makes, by output name; nothing of a sink that stays."""

    @abstractmethod
    def _empty(self, entry: CacheEntry) -> Tensor:
        """A tensor of no tokens in the place of a cached one."""

    @abstractmethod
    def outputs(self) -> dict[str, Tensor]:
        """Where the clean pass writes the next cache, by output name."""

    def _phase_at(self, passes: int) -> int:
        return bisect_right(self._begins, passes) - 1


class CacheBuffers(KvCache):
    """Two buffers for each cached tensor: passes read one, the clean pass writes the other.

    A role that is written once has one buffer for both. A tensor of a phase is a view of its buffer's start.
    """

    def __init__(self, plan: CachePlan, lane: Lane, dtype: Dtype) -> None:
        """Take the memory; `dtype` is what the graphs compute in."""
        super().__init__(plan, lane)
        self._sides: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for entry in plan.entries:
            size, cached = (math.prod(plan.steady_shape(entry)),), entry.role.dtype(dtype)
            buffers = [lane.tensor(size, cached, state=True) for _ in range(entry.role.buffers)]
            for number, side in enumerate(self._sides):
                side[entry.name] = buffers[number % len(buffers)]

    @property
    def nbytes(self) -> int:
        buffers = {id(b): b for side in self._sides for b in side.values()}
        return sum(buffer.nbytes for buffer in buffers.values())

    @property
    def key(self) -> tuple[int, int]:
        """The phase, and which of the two buffers is read."""
        return self.phase, self._side

    def held(self) -> dict[str, Tensor]:
        return {
            e.name: self._sides[self._side][e.name].first(self._shape(e, self.passes, self.hollow))
            for e in self.plan.entries
        }

    def outputs(self) -> dict[str, Tensor]:
        """Nothing that passes read is among it: any pass may write there."""
        side = self._sides[1 - self._side]
        shapes = {e.name: self._next_shape(e) for e in self.plan.entries}
        return {next_name(name): side[name].first(shape) for name, shape in shapes.items()}

    def encoding_outputs(self, encoding: Encoding) -> dict[str, Tensor]:
        side = self._sides[(encoding.passes - encoding.hollow) % 2]
        made = [e for e in self.plan.entries if not _stays(e, encoding, self.plan)]
        shapes = {e.name: self._shape(e, encoding.passes, encoding.hollow) for e in made}
        return {next_name(name): side[name].first(shape) for name, shape in shapes.items()}

    @property
    def _side(self) -> int:
        """Which of the two buffers is read: a hollow cache is a clean pass before `passes`."""
        return (self.passes - self.hollow) % 2

    def _empty(self, entry: CacheEntry) -> Tensor:
        return self._sides[0][entry.name].first(_no_tokens(self.plan.steady_shape(entry)))

    def _next_shape(self, entry: CacheEntry) -> tuple[int, int, int, int]:
        made_anew = not (entry.role.chooses or entry.role.opening_frames(self.plan.spec))
        if self.hollow and made_anew:
            return self.plan.entry_shape(entry, self.passes)
        return self.plan.next_shape(entry, self.passes)

    def _shape(self, entry: CacheEntry, passes: int, hollow: bool) -> tuple[int, int, int, int]:
        shape = self.plan.entry_shape(entry, passes)
        return _no_tokens(shape) if hollow and not entry.role.opening_frames(self.plan.spec) else shape


def _stays(entry: CacheEntry, encoding: Encoding, plan: CachePlan) -> bool:
    return encoding.keeps_sink and bool(entry.role.opening_frames(plan.spec))


def _no_tokens(shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return *shape[:2], 0, shape[3]
