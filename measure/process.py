"""Memory that this process holds, as Linux counts it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident(field: str = "RssAnon") -> int:
    """Bytes of this process: its own memory, without pages of files; `VmRSS` is all, `VmHWM` all at most.

    Raises RuntimeError where the system has no such count.
    """
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


@dataclass
class Watched:
    """Bytes of its own memory that the process had before, and at most."""

    before: int
    most: int


@contextmanager
def watched(every: float = 0.02) -> Iterator[Watched]:
    """Watch how much memory of its own the process takes while the block runs, looking every so many seconds.

    Pages of files (libraries, weights as they lie on disk) are left out: the system takes them back when
    memory is short.
    """
    now = resident()
    seen, over = Watched(now, now), threading.Event()

    def watch() -> None:
        while not over.wait(every):
            seen.most = max(seen.most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
        seen.most = max(seen.most, resident())
