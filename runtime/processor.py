"""What the processor of this machine is called."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux says it."""


def processor_name() -> str:
    """The processor's name for people, or its architecture where the system says no more."""
    with suppress(OSError, ValueError):  # not Linux
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
