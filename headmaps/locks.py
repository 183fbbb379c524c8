"""Who is writing a place: one writer at a time, of whatever process or thread. All locks are here.

A lock is held by the open file, so it ends with its holder, however that ends. Its file is removed with it;
what a killed process leaves is free, and goes with the next holder. Some file systems have no locks: there
nobody is refused.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from forcingkv.headmaps.errors import InputError

_UNIX: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
_WINDOWS: Any = None if _UNIX or not importlib.util.find_spec("msvcrt") else importlib.import_module("msvcrt")

_FAR = 0x7FFF_FFF0
"""The byte that is locked on Windows, where nobody else may read what is locked."""
_WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""What a system says that has no locks for a file; NFS has none for folders."""


class BusyError(InputError):
    """Another process or thread is writing that place."""


def take(file: int, place: Path) -> bool:
    """Lock an open file, until it is closed; whether the system has such locks.

    Raises BusyError, naming `place`, where another process or thread holds it.
    """
    try:
        if _UNIX:
            _UNIX.flock(file, _UNIX.LOCK_EX | _UNIX.LOCK_NB)
        elif _WINDOWS:
            where = os.lseek(file, 0, os.SEEK_CUR)
            os.lseek(file, _FAR, os.SEEK_SET)
            try:
                _WINDOWS.locking(file, _WINDOWS.LK_NBLCK, 1)
            finally:
                os.lseek(file, where, os.SEEK_SET)
        else:
            return False
    except OSError as error:
        if error.errno in _WITHOUT:
            return False
        raise busy(place) from error
    return True


def release(file: int) -> None:
    """Let go of a lock now: a child that was forked may hold the same open file for longer."""
    if _UNIX:
        with suppress(OSError):
            _UNIX.flock(file, _UNIX.LOCK_UN)


def busy(place: Path) -> BusyError:
    """The error for a place that has a writer."""
    hint = "Wait until it is done, or choose another place."
    return BusyError("is being written by another process", where=str(place), hint=hint)


@contextmanager
def held(lock: Path, place: Path, stays: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Hold the file `lock`, in a folder that is there, while `place` is written.

    Gives whether the system has locks. The file goes at the end, unless `stays` says otherwise then. Raises
    BusyError where another writer holds it, OSError where the file cannot be made.
    """
    file, real = _taken(lock, place)
    try:
        yield real
    finally:
        goes = not stays()
        try:
            if goes and not _WINDOWS:  # while it is ours: later another may have made one of that name
                _remove(lock, file)
        finally:
            release(file)
            os.close(file)
        if goes and _WINDOWS:  # where no open file can be removed, and so none that another holds
            with suppress(OSError):
                lock.unlink()


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Hold a folder itself, if it is there and the system has locks for folders.

    It is the same folder under each of its names, and in each container that it is mounted in.
    """
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY) if _UNIX else None
    except OSError:
        file = None
    if file is None:
        yield
        return
    try:
        take(file, folder)
        yield
    finally:
        release(file)
        os.close(file)


def is_held(lock: Path) -> bool:
    """Whether a writer holds that file now, or may: it cannot be looked at. Makes nothing."""
    try:
        file = os.open(lock, os.O_RDWR)
    except PermissionError:  # another user's; to lock it, reading is enough
        try:
            file = os.open(lock, os.O_RDONLY)
        except OSError as error:
            return isinstance(error, PermissionError)
    except OSError:
        return False
    try:
        take(file, lock)
    except InputError:
        return True
    finally:
        release(file)
        os.close(file)
    return False


def _taken(lock: Path, place: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        try:
            file = os.open(lock, flags, 0o666)
        except PermissionError as error:  # left by another user; to lock it, reading is enough
            try:
                file = os.open(lock, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            except FileNotFoundError:
                raise error from None
        try:
            real = take(file, place)
            if not real or _WINDOWS or _is_at(lock, file):
                return file, real
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its holder was done, and removed it, between the two calls


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _remove(lock: Path, file: int) -> None:
    with suppress(OSError):
        if _is_at(lock, file):
            lock.unlink()
