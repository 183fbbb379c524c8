"""The live sessions of a service, by name. Each runs by itself, and waits a while for a lost client."""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import ExitStack

from forcingkv.serve.begin import Beginning
from forcingkv.serve.engine import Engine
from forcingkv.serve.live import LiveSession
from forcingkv.serve.refusals import RefusalError

LOOK = 0.1
"""Seconds between two looks at whether a client has all."""


class Registry:
    """Begins sessions, finds them again, ends them all.

    Attributes:
        sessions: those that run, and those whose end a client has not yet heard.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.sessions: dict[str, LiveSession] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, beginning: Beginning, client: str) -> LiveSession:
        """Begin a session. Raises RefusalError where the client has too many, or the service ends."""
        with ExitStack() as counted:
            counted.enter_context(self._engine.client(client))
            live = LiveSession(self._engine, beginning)
            self.sessions[live.id] = live
            task = asyncio.create_task(self._run(live, counted.pop_all()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return live

    def find(self, name: str, key: str) -> LiveSession:
        """A session that a client comes back to. Raises RefusalError where there is none of that key."""
        live = self.sessions.get(name)
        if live is None or not hmac.compare_digest(live.key.encode(), key.encode()):
            raise RefusalError("gone", "There is no such session any more: start anew.")
        return live

    async def _run(self, live: LiveSession, counted: ExitStack) -> None:
        # Until its frames are gone it counts as its client's.
        with counted:
            try:
                await live.run()
                await self._linger(live)
            finally:
                del self.sessions[live.id]
                live.outbox.forsake()

    async def _linger(self, live: LiveSession) -> None:
        """Let the client fetch what was made last: one that was lost may come back for it."""
        box, limits = live.outbox, self._engine.limits
        ended = time.monotonic()
        while not box.heard_the_end:
            there = box.lost is None
            patience = limits.last_words if live.was_dropped or self._engine.draining else limits.reader
            if there and time.monotonic() - ended > patience:
                return
            if box.lost is not None and (self._engine.draining or time.monotonic() - box.lost > limits.lost):
                return
            await asyncio.sleep(LOOK)

    async def drain(self, until: float) -> None:
        """End all sessions, of which the states are kept; but videos that end by then (`time.monotonic`)."""
        for live in self.sessions.values():
            live.drain(until)
        while self._tasks and time.monotonic() < until + self._engine.limits.last_words:
            await asyncio.wait(set(self._tasks), timeout=0.2)
