"""Places for sessions: how many fit is known before any is opened, and who comes later waits in order."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from forcingkv.serve.refusals import RefusalError

LATELY = 32
"""Sessions that ended last, by whose length a wait is expected."""
UNKNOWN_WAIT = 30.0
"""Seconds after which a client may ask again where nothing is known."""


@dataclass(eq=False)
class Place:
    """What one session holds of the machine."""

    kind: str
    """Its bundle's name."""
    size: int
    """Bytes."""
    since: float = 0.0
    given: asyncio.Future[None] | None = None
    tell: Callable[[int, float | None], None] = field(default=lambda place, wait: None)
    """Called with the place in the queue, from 1 on, and the seconds that are expected; None: not known."""


class Places:
    """Gives places in the order in which they are asked for; of one event loop.

    Args:
        most: sessions at a time.
        memory: bytes that all of them may hold.
        waiting: how many may wait.
        first: bytes of the first session of each kind, which is there even while nobody uses it.
    """

    def __init__(self, most: int, memory: int, waiting: int, first: Mapping[str, int]) -> None:
        self.most, self.memory, self._longest, self._first = most, memory, waiting, dict(first)
        self._held: set[Place] = set()
        self._queue: deque[Place] = deque()
        self._lengths: deque[float] = deque(maxlen=LATELY)

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def used(self) -> int:
        """Bytes of the sessions that are there."""
        return self._used_with()

    def _used_with(self, *more: Place) -> int:
        """The same with others. The first of a kind that comes takes the one that is there."""
        held = Counter[str]()
        for place in (*self._held, *more):
            held[place.kind] += place.size
        return sum(max(held[kind], first) for kind, first in self._first.items())

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def fit(self, kind: str, size: int | None = None) -> int:
        """How many sessions of a kind fit at a time, of a size; None: of that of its first."""
        others = sum(first for other, first in self._first.items() if other != kind)
        return min(self.most, (self.memory - others) // max(size or self._first[kind], 1))

    def wait(self, place: int) -> float | None:
        """Seconds that the one at a place of the queue is expected to wait."""
        if not self._lengths:
            return None
        mean = sum(self._lengths) / len(self._lengths)
        return place * mean / max(len(self._held), 1)

    async def take(
        self, kind: str, size: int, tell: Callable[[int, float | None], None], *, let_in: bool = False
    ) -> Place:
        """Wait for a place.

        Args:
            kind: of the session: its bundle's name.
            size: its bytes.
            tell: what is told how long the wait is.
            let_in: whether it was promised a place before, so that it waits however many do.

        Raises RefusalError: too many wait already (busy), or it never fits. Whoever is cancelled while
        waiting leaves the queue.
        """
        if not self.fit(kind, size):
            raise RefusalError("busy", "A session of this bundle does not fit into the memory there is.")
        place = Place(kind, size, tell=tell)
        if not self._queue and self._fits(place):
            self._hold(place)
            return place
        if not let_in and len(self._queue) >= self._longest:
            wait = self.wait(len(self._queue) + 1) or UNKNOWN_WAIT
            raise RefusalError("busy", f"All places are taken, and {len(self._queue)} wait for one.", wait)
        place.given = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        tell(len(self._queue), self.wait(len(self._queue)))
        try:
            await place.given
        except asyncio.CancelledError:
            if place in self._held:  # given at the very moment
                self.give_back(place)
            else:
                self._queue.remove(place)
                self._admit()
                self._tell()
            raise
        return place

    def give_back(self, place: Place) -> None:
        """The session of a place is closed. A second time nothing happens."""
        if place not in self._held:
            return
        self._held.discard(place)
        self._lengths.append(time.monotonic() - place.since)
        if self._admit():
            self._tell()

    def _fits(self, place: Place) -> bool:
        return len(self._held) < self.most and self._used_with(place) <= self.memory

    def _hold(self, place: Place) -> None:
        place.since = time.monotonic()
        self._held.add(place)

    def _admit(self) -> int:
        """Give places to the first in the queue, as many as fit. Nobody overtakes."""
        admitted = 0
        while self._queue and self._fits(self._queue[0]):
            first = self._queue.popleft()
            self._hold(first)
            assert first.given is not None
            if not first.given.done():
                first.given.set_result(None)
            admitted += 1
        return admitted

    def _tell(self) -> None:
        for number, waiting in enumerate(self._queue, 1):
            waiting.tell(number, self.wait(number))
