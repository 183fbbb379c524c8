"""Memory of this machine."""

from __future__ import annotations

import ctypes
import gc
import math
import os
from collections.abc import Mapping
from pathlib import Path

from forcingkv.headmaps.errors import InputError, MissingExtraError

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own limit."""


def available_bytes() -> int:
    """Bytes that can still be taken without swapping, and within the container's limit."""
    return max(0, int(min(_machine_bytes(), _container_bytes())))


def _machine_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_bytes() -> float:
    """What the limit of a control group (version 2) leaves; file pages that can be dropped do not count."""
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return math.inf if limit == "max" else int(limit) - int(used) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return math.inf  # no such limit is known here


def require_memory(doing: str, parts: Mapping[str, float], hint: str) -> None:
    """Raise InputError, with what is needed by part, unless that many bytes are available.

    Args:
        doing: what needs them, as the subject of a sentence.
        parts: bytes by part.
        hint: what to do where there are too few.
    """
    needed, available = sum(parts.values()), available_bytes()
    if needed > available:
        told = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
        raise InputError(
            f"{doing} needs about {needed / 1e9:.1f} GB ({told}), and {available / 1e9:.1f} GB are available",
            where="memory",
            hint=hint,
        )


def give_back() -> None:
    """Let the system have memory that nothing holds any more."""
    gc.collect()  # what held it may be in a cycle
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it, and keeps what is freed
    if trim:
        trim(0)


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
            f"the GPU's memory is not told ({status})", where="memory", hint="See that nvidia-smi works."
        )
    return int(free)
