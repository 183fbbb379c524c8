"""A session in a place: what a live video, or a job, holds while chunks are made for it."""

from __future__ import annotations

from collections.abc import Callable

from forcingkv.runtime import Session
from forcingkv.serve.bundles import ServedBundle
from forcingkv.serve.engine import Engine
from forcingkv.serve.places import Place


class Seat:
    """At most one session of a bundle, and its place. It may be taken, given back, and taken again.

    Attributes:
        session: the session, while there is one.
    """

    def __init__(self, engine: Engine, bundle: ServedBundle) -> None:
        self._engine, self._bundle = engine, bundle
        self._place: Place | None = None
        self.session: Session | None = None

    @property
    def has_place(self) -> bool:
        """Whether the wait is over. From then on taking it must not be cancelled: a thread is at it."""
        return self._place is not None

    async def take(self, tell: Callable[[int, float | None], None] = lambda place, wait: None) -> Session:
        """Wait for a place, and take a session there. Raises what `Places.take` and `Session.sibling` do."""
        self._place = await self._engine.places.take(self._bundle.session_bytes, tell)
        try:
            self.session = await self._engine.aside(self._bundle.take)
        finally:
            if self.session is None:
                self.give_back()
        return self.session

    def give_back(self) -> None:
        """Give both back; nothing happens where there is none."""
        if self.session is not None:
            session, self.session = self.session, None
            self._bundle.give_back(session)
        if self._place is not None:
            place, self._place = self._place, None
            self._engine.places.give_back(place)
