"""What a session has for its client: in order, a few chunks ahead, and again after a lost connection."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, replace

from forcingkv.serve.messages import ChunkEvent, EndedEvent, Event, Playing, Queued, Started

MOST_ANSWERS = 200
"""That are kept for a client which may have missed them."""


@dataclass(frozen=True, eq=False)
class Outgoing:
    """An event, and the binary messages that follow it."""

    event: Event
    parts: tuple[bytes, ...] = ()


class Outbox:
    """Events for one client, which may come and go.

    A chunk stays here until the client says that it has it. So a client that takes nothing holds its session
    back, no more than `ahead` chunks are ever in memory, and one that comes back misses none. Other events
    stay until a later chunk arrived: one that comes back may hear them twice.

    Attributes:
        ended: set once the client was sent the end.
        lost: since when no client is there (`time.monotonic`); None: one is.
        full: since when as many chunks are on their way as may be; None: there is room.
    """

    def __init__(self, ahead: int, changed: asyncio.Event) -> None:
        self._ahead, self._changed = ahead, changed
        self._coming: deque[Outgoing] = deque()
        self._sent: deque[Outgoing] = deque()
        """What the client was sent, and has not answered."""
        self._promised = 0
        """Chunks that are being made."""
        self._next = 0
        """The chunk that comes after all that were put here."""
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
        return self.ended.is_set() and not any(map(_is_chunk, self._sent))

    @property
    def size(self) -> int:
        """Bytes of the chunks that are held."""
        return sum(len(part) for one in (*self._sent, *self._coming) for part in one.parts)

    def promise(self) -> None:
        """A chunk is being made: it counts as one that is here."""
        self._promised += 1
        self._look()

    def put(self, event: Event, parts: tuple[bytes, ...] = ()) -> None:
        """Something for the client."""
        one = Outgoing(event, parts)
        if isinstance(event, Started):
            self._started, self._next = one, event.next_chunk
        if isinstance(event, EndedEvent):
            self._over = one
        if isinstance(event, ChunkEvent):
            self._next, self._promised = event.chunk + 1, max(0, self._promised - 1)
        if isinstance(
            event, Queued | Started | Playing | EndedEvent
        ):  # a place in the queue that was said is old
            self._coming, self._sent = _without_places(self._coming), _without_places(self._sent)
        self._coming.append(one)
        self._look()
        if isinstance(event, ChunkEvent):
            self.wait_anew()

    def wait_anew(self) -> None:
        """From now on it counts how long the client takes nothing."""
        if self.full is not None:
            self.full = time.monotonic()

    def attach(self, after: int | None = None) -> int:
        """A client is there; `after` a loss: the last chunk that arrived. Returns its number, for `get`."""
        self._reader += 1
        self.lost = None
        if after is not None:
            again = deque((*self._sent, *self._coming))
            _forget(again, after)
            if self._over and self._over not in again:  # it was sent, and perhaps lost
                again.append(self._over)
            self._coming, self._sent = again, deque()
            if self._started and self._started not in again:
                first = next(
                    (one.event.chunk for one in again if isinstance(one.event, ChunkEvent)), self._next
                )
                event = self._started.event.model_copy(update={"next_chunk": first})
                self._coming.appendleft(replace(self._started, event=event))
        self._look()
        self.wait_anew()
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
                if not isinstance(one.event, Started | EndedEvent):  # which are kept anyhow
                    self._sent.append(one)
                    self._limit()
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
        _forget(self._sent, chunk)
        self._look()
        self._changed.set()

    def _look(self) -> None:
        chunks = self._promised + sum(map(_is_chunk, (*self._sent, *self._coming)))
        self.full = None if chunks < self._ahead else self.full or time.monotonic()
        self._news.set()

    def _limit(self) -> None:
        """Keep memory bounded where a client says much, and no chunk comes: the oldest answers go."""
        answers = [one for one in self._sent if not _is_chunk(one)]
        if len(answers) > MOST_ANSWERS:
            self._sent.remove(answers[0])


def _is_chunk(one: Outgoing) -> bool:
    return isinstance(one.event, ChunkEvent)


def _without_places(events: deque[Outgoing]) -> deque[Outgoing]:
    return deque(one for one in events if not isinstance(one.event, Queued))


def _forget(events: deque[Outgoing], chunk: int) -> None:
    """Take away all up to the last chunk that is no later than that one."""
    come = [
        place
        for place, one in enumerate(events)
        if isinstance(one.event, ChunkEvent) and one.event.chunk <= chunk
    ]
    for _ in range(come[-1] + 1 if come else 0):
        events.popleft()
