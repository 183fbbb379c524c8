"""What a client is told when it cannot have what it asked for: a code for programs, a sentence for people."""

from __future__ import annotations

import errno
import re
import sqlite3
from typing import Literal

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.writing import NO_ROOM
from forcingkv.runtime import MemoryShortError, NotFiniteError, SessionError

Code = Literal[
    "bad_message",
    "bad_request",
    "busy",
    "draining",
    "failed",
    "forbidden",
    "full",
    "gone",
    "internal",
    "interrupted",
    "not_found",
    "not_now",
    "slow_reader",
    "too_large",
    "too_many",
    "unauthorized",
    "version",
]
STATUS: dict[str, int] = {
    "bad_message": 400,
    "bad_request": 400,
    "busy": 503,
    "draining": 503,
    "failed": 500,
    "forbidden": 403,
    "full": 507,
    "gone": 410,
    "internal": 500,
    "interrupted": 503,
    "not_found": 404,
    "not_now": 409,
    "slow_reader": 408,
    "too_large": 413,
    "too_many": 429,
    "unauthorized": 401,
    "version": 400,
}
"""The status of an answer over HTTP."""


class RefusalError(Exception):
    """A request that is refused.

    Attributes:
        code: what kind of refusal it is.
        message: one sentence or two, for people. No path of this machine is in it.
        retry_after: seconds after which it may be asked again, where that is known.
    """

    def __init__(self, code: Code, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code: Code = code
        self.message, self.retry_after = message, retry_after

    @property
    def status(self) -> int:
        return STATUS[self.code]

    @property
    def is_the_clients(self) -> bool:
        """Whether it is no news for whoever looks after the service."""
        return self.code not in ("internal", "full")


def refusal_of(error: BaseException) -> RefusalError:
    """An error of the runtime as a client is told it. What is not the client's fault is not described."""
    if isinstance(error, RefusalError):
        return error
    if _is_full(error) or _is_full(error.__cause__):
        return RefusalError("full", "The disk of the service is full.", 60.0)
    if isinstance(error, InputError) and not _is_unwritable(error.__cause__):
        return RefusalError("bad_request", without_places(error))
    if isinstance(error, MemoryShortError):
        return RefusalError("busy", "There was not enough memory to go on with the video.", 30.0)
    if isinstance(error, NotFiniteError):
        return RefusalError(
            "failed", f"The latents of chunk {error.chunk} are not finite: the video ends before."
        )
    if isinstance(error, SessionError):
        return RefusalError("failed", "The device refused: the video ends here.")
    return RefusalError("internal", "Something went wrong in the service; its log says what.")


def _is_full(error: BaseException | None) -> bool:
    """Whether there was no room on the disk, however that was said."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return False


def _is_unwritable(error: BaseException | None) -> bool:
    """Whether the service may not write there: no client can help it."""
    return isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def without_places(error: InputError) -> str:
    """The message of wrong input without names of files: of those only this machine knows."""
    named = InputError(
        _plain(error.what),
        where=error.where if error.where and re.fullmatch(r"[a-z_ -]+", error.where) else "",
        expected=_plain(error.expected or ""),
    )
    return str(named)


def _plain(text: str) -> str:
    """A part of a message without absolute paths."""
    return re.sub(r"(?<![\w.<])(?:[A-Za-z]:[\\/]|[\\/])[^\s'\",;)]+", "(a file)", text)
