"""Ray's workers on this machine, by what they run."""

from __future__ import annotations

import time
from pathlib import Path

HAS_PROC = Path("/proc/self/cmdline").exists()
"""Whether they can be found."""


def ray_workers(actor: str) -> dict[int, str]:
    """Process number -> title of every worker that is such an actor; the title has the method it is at."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if entry.name.isdigit() and title.startswith(f"ray::{actor}"):
            found[int(entry.name)] = title
    return found


def all_gone(actor: str, seconds: float = 10.0) -> bool:
    """Whether none is left, soon: Ray sends them away and does not wait."""
    end = time.monotonic() + seconds
    while ray_workers(actor):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
