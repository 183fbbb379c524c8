"""Memory that this process holds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from forcingkv.runtime.memory import peak_bytes


def resident(field: str = "RssAnon") -> int:
    """Bytes of this process: its own memory, without pages of files; `VmRSS` is all, `VmHWM` all at most.

    The names are Linux's. Where others count differently, what comes nearest: on Windows what is committed,
    on macOS what would be free if the process ended.

    Raises RuntimeError where the system has no such count.
    """
    if field == "VmHWM":
        return peak_bytes()
    memory: Any = psutil.Process().memory_info()
    if field == "VmRSS":
        return int(memory.rss)
    if field != "RssAnon":
        raise RuntimeError(f"a process has no {field}")
    if hasattr(memory, "shared"):  # Linux: pages of files, and those shared with other processes
        return int(memory.rss - memory.shared)
    if hasattr(memory, "private"):  # Windows
        return int(memory.private)
    return int(psutil.Process().memory_full_info().uss)


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
