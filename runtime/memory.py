"""Memory of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from forcingkv.headmaps.errors import InputError, MissingExtraError

__all__ = ["available_bytes", "device_free_bytes", "require_memory"]


def available_bytes() -> int:
    """Bytes that can still be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(doing: str, parts: Mapping[str, float], mend: str) -> None:
    """Raise InputError, with what is needed by part, unless that many bytes are available.

    Args:
        doing: what needs them, as the subject of a sentence.
        parts: bytes by part.
        mend: what to do where there are too few.
    """
    needed, available = sum(parts.values()), available_bytes()
    if needed > available:
        told = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
        raise InputError(
            f"{doing} needs about {needed / 1e9:.1f} GB ({told}), and {available / 1e9:.1f} GB are available",
            where="memory",
            mend=mend,
        )


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
            f"the GPU's memory is not told ({status})", where="memory", mend="See that nvidia-smi works."
        )
    return int(free)
