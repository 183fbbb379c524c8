"""What the system does with names: swapping two in one step, having the disk hold them, mount points."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_EXCHANGE, _HERE = 2, -100
"""RENAME_EXCHANGE of renameat2(2), and AT_FDCWD."""
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""What file systems say that cannot exchange; EPERM comes from filters that know no such call."""
_UNSYNCED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""What file systems say that cannot have the disk hold a file or a folder."""


@cache
def _renameat2() -> Any:
    """The call, where the system's library has it."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that each is there at every moment. False: cannot be done here.

    Raises OSError for any other failure.
    """
    call = _renameat2()
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(other))


def sync_file(path: Path) -> None:
    """Have the disk hold what was written to a file, where the system can do that. Raises OSError."""
    _sync(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Have the disk hold the names in a folder, where the system can do that (Windows cannot)."""
    if sys.platform != "win32":
        _sync(path, os.O_RDONLY)


def sync_tree(folder: Path) -> None:
    """Have the disk hold a folder with all that is in it."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(place, name)):
                sync_file(Path(place, name))
        sync_folder(Path(place))


def _sync(path: Path, flags: int) -> None:
    file = os.open(path, flags)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
    finally:
        os.close(file)


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted there, which cannot be renamed or removed.

    `os.path.ismount` does not see a folder of the same disk that is mounted (`mount --bind`), or a file.
    """
    if os.path.ismount(path):
        return True
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            found = re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), line.split(b" ")[4])
            if found == os.fsencode(path):
                return True
    return False


def can_be_renamed(path: Path) -> bool:
    """Whether we may give the file or folder that is there another name, as far as can be found out."""
    parent = path.parent
    if not os.access(parent, os.W_OK | os.X_OK) or is_mount_point(path):
        return False
    user = getattr(os, "geteuid", lambda: 0)()
    above = parent.stat()
    # In a folder such as /tmp each may rename only what is theirs.
    return not above.st_mode & stat.S_ISVTX or user in (0, above.st_uid, path.lstat().st_uid)
