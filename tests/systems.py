"""Other systems, as far as Linux can play them: what they lack is gone, and what they refuse is refused.

For code that runs in this process. Compiled libraries see Linux all the same. docs/platforms.md says what
this covers, and what it cannot.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import io
import os
import re
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from forcingkv.headmaps import locks, renames

ELSEWHERE = ("/proc", "/sys", "/dev/shm")
"""Folders that Linux alone has."""
LACKED_BY_WINDOWS = {
    os: "chown chroot confstr copy_file_range eventfd fchmod fchown fork forkpty getegid geteuid"
    " getgid getgroups getloadavg getpgid getpgrp getpriority getuid killpg lchown lockf major"
    " memfd_create minor mkfifo mknod nice openpty pathconf posix_fadvise posix_fallocate"
    " pread preadv pwrite pwritev readv register_at_fork sched_getaffinity sched_setaffinity"
    " sendfile setsid statvfs sync sysconf uname wait waitid writev O_CLOEXEC O_DIRECTORY"
    " O_DSYNC O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC",
    signal: "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 alarm"
    " pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigwait",
}
LACKED_BY_MACOS = {
    os: "copy_file_range eventfd getrandom memfd_create posix_fadvise posix_fallocate sched_getaffinity"
    " sched_setaffinity splice"
}
NO_MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog")
"""Modules that Windows lacks."""
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')

_listdir, _readlink, _open = os.listdir, os.readlink, builtins.open


def macos(patch: pytest.MonkeyPatch) -> None:
    """No /proc, no control groups, no affinity, no glibc."""
    _without(patch, LACKED_BY_MACOS)
    _hide(patch, ELSEWHERE)
    patch.setattr(sys, "platform", "darwin")
    patch.setattr(renames, "_renameat2", lambda: None)  # found when it was first asked for
    patch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    info = namedtuple("info", "rss vms pfaults pageins")
    _psutil(patch, info(200 << 20, 400 << 30, 1, 1), affinity=False)


def windows(patch: pytest.MonkeyPatch, home: Path) -> None:
    """No calls, signals and modules of Unix; an open file keeps its name; names that are taken are refused.

    `home` is where names are checked: elsewhere libraries write what they do on Linux.
    """
    _without(patch, LACKED_BY_WINDOWS)
    for name in NO_MODULES:
        patch.setitem(sys.modules, name, None)
    found = _msvcrt()
    patch.setitem(sys.modules, "msvcrt", found)
    patch.setattr(locks, "_UNIX", None)  # found when it was imported
    patch.setattr(locks, "_WINDOWS", found)
    patch.setattr(renames, "_renameat2", lambda: None)
    _hide(patch, ELSEWHERE)
    patch.setattr(sys, "platform", "win32")
    patch.setattr(ctypes, "CDLL", _refusing(TypeError("a name is needed")))
    info = namedtuple("info", "rss vms peak_wset wset pagefile private")
    _psutil(patch, info(200 << 20, 300 << 20, 250 << 20, 200 << 20, 300 << 20, 180 << 20), affinity=True)
    patch.setattr(shutil, "_use_fd_functions", False)
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, used=1 << 39, free=1 << 39))
    refused = OSError(errno.EINVAL, "A required privilege is not held by the client")
    patch.setattr(os, "symlink", _refusing(refused))
    _names_that_are_held(patch)
    _names_that_there_are(patch, home)


def _refusing(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def _without(patch: pytest.MonkeyPatch, lacked: dict[Any, str]) -> None:
    for module, names in lacked.items():
        for name in names.split():
            patch.delattr(module, name, raising=False)


def _hide(patch: pytest.MonkeyPatch, folders: tuple[str, ...]) -> None:
    """Have Python find nothing in those folders."""

    def hidden(path: Any) -> bool:
        if isinstance(path, int):
            return False
        text = os.fsdecode(path)
        return any(text == folder or text.startswith(f"{folder}/") for folder in folders)

    def finding_nothing(real: Any) -> Any:
        def call(path: Any = ".", *given: Any, **options: Any) -> Any:
            if hidden(path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
            return real(path, *given, **options)

        return call

    for name in ("open", "stat", "lstat", "listdir", "scandir", "readlink", "access"):
        _wrap(patch, os, name, finding_nothing)
    for module in (builtins, io):
        _wrap(patch, module, "open", finding_nothing)


def _wrap(patch: pytest.MonkeyPatch, module: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Have a function of a module be what `wrapper` makes of it."""
    patch.setattr(module, name, wrapper(getattr(module, name)))


def _psutil(patch: pytest.MonkeyPatch, info: Any, affinity: bool) -> None:
    """What psutil has on that system: on Linux it reads /proc, which is hidden."""

    class Process:
        def memory_info(self) -> Any:
            return info

        def memory_full_info(self) -> Any:
            return SimpleNamespace(uss=150 << 20)

        def num_threads(self) -> int:
            return 3

    if affinity:
        Process.cpu_affinity = lambda self: [0, 1]  # type: ignore[attr-defined]
    for name in [name for name in dir(psutil) if name.startswith("RLIM")]:
        patch.delattr(psutil, name)
    patch.setattr(psutil, "Process", Process)
    patch.setattr(psutil, "cpu_count", lambda logical=True: 2)
    memory = SimpleNamespace(total=16 << 30, available=8 << 30)
    patch.setattr(psutil, "virtual_memory", lambda: memory)


def _msvcrt() -> ModuleType:
    """Locks of Windows, held by the open file until it is closed."""

    def locking(file: int, mode: int, _: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_UN if mode == module.LK_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    module: Any = ModuleType("msvcrt")
    module.LK_UNLCK, module.LK_LOCK, module.LK_NBLCK, module.locking = 0, 1, 2, locking
    return module


def held_open(path: Any, folder_too: bool = True) -> bool:
    """Whether this process has the file open or mapped; of a folder, a file in it."""
    wanted = os.path.realpath(os.fsdecode(path))
    found = set()
    for number in _listdir("/proc/self/fd"):
        try:
            found.add(_readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    with _open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        found |= {line.split(maxsplit=5)[5].rstrip("\n") for line in lines if line.count(" /")}
    return any(one == wanted or (folder_too and one.startswith(f"{wanted}/")) for one in found)


def _names_that_are_held(patch: pytest.MonkeyPatch) -> None:
    """An open file, or a folder with one in it, is not renamed, replaced or removed."""

    def busy(path: Any) -> None:
        if held_open(path):
            text = "The process cannot access the file because it is being used by another process"
            refused: Any = PermissionError(errno.EACCES, text, os.fsdecode(path))
            refused.winerror = 32
            raise refused

    def removing(real: Any) -> Any:
        def call(path: Any, **options: Any) -> None:
            busy(path)
            real(path, **options)

        return call

    def renaming(real: Any) -> Any:
        def call(source: Any, target: Any) -> None:
            busy(source)
            busy(target)
            if os.path.isdir(target):
                raise PermissionError(errno.EACCES, "Access is denied", os.fsdecode(target))
            real(source, target)

        return call

    def to_a_new_name(real: Any) -> Any:
        def call(source: Any, target: Any) -> None:
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "the file already exists", os.fsdecode(target))
            real(source, target)

        return call

    for name in ("unlink", "remove", "rmdir"):
        _wrap(patch, os, name, removing)
    for name in ("replace", "rename"):
        _wrap(patch, os, name, renaming)
    _wrap(patch, os, "rename", to_a_new_name)


def _names_that_there_are(patch: pytest.MonkeyPatch, home: Path) -> None:
    """What is made in `home` has a name that Windows takes; a folder is not opened as a file."""

    def check(path: Any) -> None:
        text = "" if isinstance(path, int) else os.path.abspath(os.fsdecode(path))
        if not text.startswith(f"{home}/"):
            return
        for part in text[len(str(home)) + 1 :].split("/"):
            if FORBIDDEN.search(part) or RESERVED.fullmatch(part):
                what = "The filename, directory name, or volume label syntax is incorrect"
                raise OSError(errno.EINVAL, what, text)

    def named_first(real: Any) -> Any:
        def call(path: Any, *given: Any, **options: Any) -> Any:
            check(path)
            return real(path, *given, **options)

        return call

    def named_last(real: Any) -> Any:
        def call(source: Any, target: Any) -> None:
            check(target)
            real(source, target)

        return call

    def no_folder(real: Any) -> Any:
        def call(path: Any, *given: Any, **options: Any) -> Any:
            if os.path.isdir(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fsdecode(path))
            return real(path, *given, **options)

        return call

    for module, name in ((builtins, "open"), (io, "open"), (os, "mkdir"), (os, "open")):
        _wrap(patch, module, name, named_first)
    for name in ("replace", "rename"):
        _wrap(patch, os, name, named_last)
    _wrap(patch, os, "open", no_folder)
