"""What a session has for its client: in order, a few chunks ahead, and again after a lost connection."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, replace

from forcingkv.serve.messages import ChunkEvent, EndedEvent, Event, Started


@dataclass(frozen=True)
class Outgoing:
    """An event, and the binary messages that follow it."""

    event: Event
    parts: tuple[bytes, ...] = ()


class Outbox:
    """Events for one client, which may come and go.

    A chunk stays here until the client says that it has it. So a client that takes nothing holds its session
    back, no more than `ahead` chunks are ever in memory, and one that comes back misses none.

    Attributes:
        ended: set once the client was sent the end.
        lost: since when no client is there (`time.monotonic`); None: one is.
        full: since when as many chunks are on their way as may be; None: there is room.
    """

    def __init__(self, ahead: int, changed: asyncio.Event) -> None:
        self._ahead, self._changed = ahead, changed
        self._coming: deque[Outgoing] = deque()
        self._sent: deque[Outgoing] = deque()
        """Chunks that the client was sent, and has not answered."""
        self._news = asyncio.Event()
        self._started: Outgoing | None = None
        self._over: Outgoing | None = None
        self._reader = 0
        """Counts the clients that there were: an earlier one gets nothing more."""
        self.ended = asyncio.Event()
        self.lost: float | None = time.monotonic()
        self.full: float | None = None

    @property
    def has_room(self) -> bool:
        """Whether another chunk may be made."""
        return self.full is None

    @property
    def heard_the_end(self) -> bool:
        """Whether the client was sent the end, and has all chunks."""
        return self.ended.is_set() and not self._sent

    @property
    def size(self) -> int:
        """Bytes of the chunks that are held."""
        return sum(len(part) for one in (*self._sent, *self._coming) for part in one.parts)

    def put(self, event: Event, parts: tuple[bytes, ...] = ()) -> None:
        """Something for the client."""
        one = Outgoing(event, parts)
        if isinstance(event, Started):
            self._started = one
        if isinstance(event, EndedEvent):
            self._over = one
        self._coming.append(one)
        self._look()

    def attach(self, after: int | None = None) -> int:
        """A client is there; `after` a loss: the last chunk that arrived. Returns its number, for `get`."""
        self._reader += 1
        self.lost = None
        if after is not None:
            again = [one for one in (*self._sent, *self._coming) if not _has_come(one, after)]
            if self._over and self._over not in again:  # it was sent, and perhaps lost
                again.append(self._over)
            self._coming, self._sent = deque(again), deque()
            if self._started and not any(isinstance(one.event, Started) for one in again):
                first = next((one.event.chunk for one in again if isinstance(one.event, ChunkEvent)), None)
                event = self._started.event
                assert isinstance(event, Started)
                begun = replace(
                    self._started,
                    event=event.model_copy(update={"next_chunk": after + 1 if first is None else first}),
                )
                self._coming.appendleft(begun)
        self._look()
        self._changed.set()
        return self._reader

    def detach(self, reader: int) -> None:
        """The connection of a client is gone."""
        if reader == self._reader and self.lost is None:
            self.lost = time.monotonic()
            self._changed.set()

    async def get(self, reader: int) -> Outgoing | None:
        """The next for a client, as soon as there is one; None: another one has taken its place."""
        while reader == self._reader:
            if self._coming:
                one = self._coming.popleft()
                if isinstance(one.event, ChunkEvent):
                    self._sent.append(one)
                return one
            self._news.clear()
            await self._news.wait()
        return None

    def said(self, one: Outgoing) -> None:
        """Something was sent, as far as can be known."""
        if isinstance(one.event, EndedEvent):
            self.ended.set()

    def forsake(self) -> None:
        """Nobody gets anything more."""
        self._reader += 1
        self._coming.clear()
        self._sent.clear()
        self._news.set()

    def acknowledge(self, chunk: int) -> None:
        """All chunks up to that one arrived."""
        while self._sent and _has_come(self._sent[0], chunk):
            self._sent.popleft()
        self._look()
        self._changed.set()

    def _look(self) -> None:
        chunks = len(self._sent) + sum(isinstance(one.event, ChunkEvent) for one in self._coming)
        self.full = None if chunks < self._ahead else self.full or time.monotonic()
        self._news.set()


def _has_come(one: Outgoing, chunk: int) -> bool:
    return isinstance(one.event, ChunkEvent) and one.event.chunk <= chunk
