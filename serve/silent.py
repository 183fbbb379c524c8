"""Connections that ask nothing, or only whether anybody is there: uvicorn would bear them for ever."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

MOST_PINGS = 20
"""A second, of one client."""


class Silent:
    """Closes connections whose request does not come within a time: they take a file each, and sessions none.

    Args:
        seconds: for a request, from its connection or the answer before to the end of its headers.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[tuple[Any, Any], float] = {}
        """By connection, and the request before; them and not their ids, which later ones get too."""

    def look(self, connections: Iterable[Any]) -> None:
        """Close those that have been silent for too long; called again and again. They are uvicorn's."""
        now, there = time.monotonic(), dict[tuple[Any, Any], float]()
        for one in list(connections):
            if not hasattr(one, "cycle"):  # a socket, which has said what it is
                continue
            if one.cycle is not None and not one.cycle.response_complete:
                continue
            key = one, one.cycle
            there[key] = self._since.get(key, now)
            if now - there[key] > self._seconds:
                one.transport.abort()
        self._since = there


class Calm(WebSocketsSansIOProtocol):
    """A WebSocket whose pings are answered at a pace: each answer waits in memory until it is read."""

    _second, _pings = 0.0, 0

    def handle_ping(self) -> None:
        now = self.loop.time()
        if now - self._second > 1.0:
            self._second, self._pings = now, 0
        self._pings += 1
        if self._pings > MOST_PINGS:
            self.transport.abort()
            return
        super().handle_ping()
