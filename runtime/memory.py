"""Memory of this machine."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from forcingkv.headmaps.errors import InputError, MissingExtraError

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own limit."""


def available_bytes() -> int:
    """Bytes that can still be taken without swapping, and within the container's limit."""
    available: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no such files, or the limit is "max"
        # Of a control group of version 2. File pages that can be dropped do not count as used.
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(stat["inactive_file"]))
    return max(0, available)


def require_memory(doing: str, parts: Mapping[str, float], hint: str, available: int | None = None) -> None:
    """Raise InputError, with what `doing` (the subject of a sentence) needs by part, unless there are so many
    bytes; `hint` says what to do then. `available` is what there is; None: of this machine."""
    needed, available = sum(parts.values()), available_bytes() if available is None else available
    if needed > available:
        listed = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
        raise InputError(
            f"{doing} needs about {needed / 1e9:.1f} GB ({listed}),"
            f" and {available / 1e9:.1f} GB are available",
            where="memory",
            hint=hint,
        )


def give_back() -> None:
    """Let the system have memory that nothing holds any more, cycles of objects included. That takes a while
    where much is loaded."""
    gc.collect()
    trim()


def trim() -> None:
    """Let the system have what the C library keeps of memory that was freed."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if malloc_trim:
        malloc_trim(0)


def device_free_bytes() -> int:
    """Bytes that are free on the first GPU.

    Raises MissingExtraError where CUDA's Python bindings are not installed, InputError where the driver does
    not answer.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingExtraError("cuda-bindings", "tensorrt-rtx") from error
    status, free, _ = runtime.cudaMemGetInfo()
    if int(status):
        raise InputError(
            f"the GPU does not say how much memory is free ({status})",
            where="memory",
            hint="See whether nvidia-smi works.",
        )
    return int(free)
