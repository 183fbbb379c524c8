"""A session in a place: what a live video, or a job, holds while chunks are made for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

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

    async def take(
        self,
        tell: Callable[[int, float | None], None] = lambda place, wait: None,
        *,
        enlarge: int = 1,
        let_in: bool = False,
    ) -> Session:
        """Wait for a place, and take a session there.

        Whoever is cancelled meanwhile has neither.

        Args:
            tell, let_in: see `Places.take`.
            enlarge: how often each pixel of its frames is repeated.

        Raises what `Places.take` and `Session.sibling` do.
        """
        assert self._place is None, "it was taken already"
        size = self._engine.size_of(self._bundle, enlarge)
        self._place = await self._engine.places.take(self._bundle.name, size, tell, let_in=let_in)
        taking = asyncio.ensure_future(self._engine.aside(self._bundle.take))
        try:
            self.session = await asyncio.shield(taking)
        except BaseException:
            with suppress(Exception):  # where it was cancelled a thread is still at it
                self.session = await taking
            self.give_back()
            raise
        return self.session

    def give_back(self) -> None:
        """Give both back; nothing happens where there is none."""
        session, self.session = self.session, None
        place, self._place = self._place, None
        try:
            if session is not None:
                self._bundle.give_back(session)
        finally:
            if place is not None:
                self._engine.places.give_back(place)
