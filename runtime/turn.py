"""One at a time: what keeps two threads from using a session's memory at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from forcingkv.runtime.faults import InUseError


class Turn:
    """Lets one in, and refuses everybody else at once until that one is out again."""

    def __init__(self) -> None:
        self._users: dict[None, _User] = {}

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Around what nobody may disturb. Raises InUseError where somebody is in it already."""
        user = _User()
        try:
            # In one step, and inside the block: Ctrl-C just after taking a lock would leave it taken.
            other = self._users.setdefault(None, user)
            if other is not user:
                raise InUseError(again=other.thread == user.thread)
            yield
        finally:
            if self._users.get(None) is user:
                del self._users[None]


class _User:
    def __init__(self) -> None:
        self.thread = threading.get_ident()
