"""Faults at a chosen operation of a process: it is killed, the operation fails, or the disk is full then.

Operations are what Python tells audit hooks of (`sys.addaudithook`): every call that makes, renames, removes
or cuts a file or folder, with nothing patched.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from forcingkv.headmaps import folders, renames, writing

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link", "tests.exchange"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_heard: list[Callable[[], None]] = []
_hooked: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard and (event in CHANGES or (event == "open" and arguments[2] & _WRITES)):
        for hear in _heard:
            hear()


def _told(call: Callable[..., bool]) -> Callable[..., bool]:
    """`exchange` tells hooks too: a call through ctypes does not."""

    def exchange(*names: Any) -> bool:
        sys.audit("tests.exchange")
        return call(*names)

    return exchange


@contextmanager
def at_each_operation(hear: Callable[[], None]) -> Iterator[None]:
    """Call that before each operation that changes files. Audit hooks cannot be removed: one is kept."""
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    before = folders.exchange
    folders.exchange = _told(before)
    _heard.append(hear)
    try:
        yield
    finally:
        _heard.remove(hear)
        folders.exchange = before


def killed_at(number: int) -> Callable[[], None]:
    """To be heard: kills the process, as `kill -9` does, before its operation of that number."""
    count = iter(range(1 << 62))

    def hear() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return hear


def fails_at(number: int, error: Callable[[], BaseException]) -> Callable[[], None]:
    """To be heard: the operation of that number raises, and no other."""
    count = iter(range(1 << 62))

    def hear() -> None:
        if next(count) == number:
            raise error()

    return hear


def no_room() -> OSError:
    """What a full disk says."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk:
    """A disk that is full from some write on: files are neither made nor grow.

    Attributes:
        writes: how many there were.
        full_at: the number of the first that fails.
    """

    def __init__(self, full_at: int) -> None:
        self.full_at, self.writes = full_at, 0

    @property
    def was_full(self) -> bool:
        """Whether a write failed."""
        return self.writes > self.full_at

    def take(self) -> None:
        """One more write. Raises OSError when the disk is full."""
        self.writes += 1
        if self.was_full:
            raise no_room()

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """All that is written in the block goes to this disk."""
        real_open, real_os_open, real_sync = io.open, os.open, renames.os.fsync
        disk = self

        def opened(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            found = real_open(file, mode, *more, **named)
            return _Growing(found, disk) if set(mode) & set("wax+") else found

        def os_opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_CREAT and not os.path.lexists(path):
                disk.take()
            return real_os_open(path, flags, *more, **named)

        class Growing(io.FileIO):
            def write(self, data: Any, /) -> int:
                _half_at_least(super().write, data, disk)
                return len(memoryview(data).cast("B"))

        before = writing.FileIO
        builtins.open, io.open, os.open, writing.FileIO = opened, opened, os_opened, Growing  # type: ignore[assignment]
        try:
            yield
        finally:
            builtins.open, io.open, os.open, writing.FileIO = real_open, real_open, real_os_open, before
            assert real_sync is os.fsync


class _Growing:
    """A file on such a disk. Of the write that fails, half is there."""

    def __init__(self, file: Any, disk: FullDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> Any:
        if isinstance(data, str):
            self._disk.take()
            return self._file.write(data)
        return _half_at_least(self._file.write, data, self._disk)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _half_at_least(write: Callable[[Any], Any], data: Any, disk: FullDisk) -> Any:
    try:
        disk.take()
    except OSError:
        view = memoryview(data).cast("B")
        write(view[: len(view) // 2])
        raise
    return write(data)
