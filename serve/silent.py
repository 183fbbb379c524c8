"""Connections over which no request comes. uvicorn waits for one as long as it takes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any


class Silent:
    """Closes connections whose request does not come within a time: they take a file each, and sessions none.

    Args:
        seconds: for a request, from its connection or the answer before to the end of its headers.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[tuple[int, int], float] = {}
        """By connection, and the request before."""

    def look(self, connections: Iterable[Any]) -> None:
        """Close those that have been silent for too long; called again and again. They are uvicorn's."""
        now, there = time.monotonic(), dict[tuple[int, int], float]()
        for one in list(connections):
            if not hasattr(one, "cycle"):  # a socket, which has said what it is
                continue
            if one.cycle is not None and not one.cycle.response_complete:
                continue
            key = id(one), id(one.cycle)
            there[key] = self._since.get(key, now)
            if now - there[key] > self._seconds:
                one.transport.abort()
        self._since = there
