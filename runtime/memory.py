"""Memory of this machine, and of what this process may take of it."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from forcingkv.headmaps.errors import InputError, MissingExtraError
from forcingkv.runtime import devices
from forcingkv.runtime.control_groups import memory_limits
from forcingkv.runtime.engines import cuda_core

STATUS = Path("/proc/self/status")
"""What Linux says of this process."""
MEBIBYTE = 1 << 20
"""SLURM counts memory in these."""


class Available(NamedTuple):
    """What can be taken."""

    bytes: int
    limit: str | None
    """What sets the limit, as the end of a sentence; None: the machine's memory itself."""


def available() -> Available:
    """What can be taken without swapping, and within every limit that this process runs under.

    The least counts of: memory of the machine that is free or can be freed; control groups of Linux, of both
    versions, with all above them; the bounds of `ulimit -v` and `-d`; what SLURM gave the job. A job object
    of Windows does not say what it allows. docs/platforms.md lists what holds on which system.
    """
    least = Available(int(psutil.virtual_memory().available), None)
    for other in (*_of_groups(), *_of_this_process(), *_of_a_job()):
        least = min(least, other, key=lambda one: one.bytes)
    return least


def available_bytes() -> int:
    """Bytes that can be taken (`available`)."""
    return available().bytes


def what_limits() -> str:
    """In brackets, which limit leaves less than the machine has; nothing where there is none."""
    limit = available().limit
    return f" ({limit})" if limit else ""


def _of_groups() -> Iterator[Available]:
    for left, file in memory_limits():
        yield Available(left, f"a limit of the control group: {file}")


def _of_this_process() -> Iterator[Available]:
    """The bounds of `ulimit`. psutil has them on Linux, where alone they are kept."""
    process = psutil.Process()
    with suppress(AttributeError, OSError, psutil.Error):  # not Linux
        memory = process.memory_info()
        bounds = {
            "ulimit -v": (process.rlimit(psutil.RLIMIT_AS)[0], memory.vms),
            "ulimit -d": (process.rlimit(psutil.RLIMIT_DATA)[0], memory.data),
        }
        for name, (bound, taken) in bounds.items():
            if bound != psutil.RLIM_INFINITY:
                yield Available(max(0, bound - taken), f"a limit of this process: {name}")


def _of_a_job() -> Iterator[Available]:
    """What SLURM gave a job on this machine. Where nothing enforces it, SLURM ends who takes more."""
    sizes = {
        name: int(os.environ[name])
        for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")
        if os.environ.get(name, "").isdecimal()
    }
    granted, of = sizes.get("SLURM_MEM_PER_NODE", 0), "SLURM_MEM_PER_NODE"
    if not granted:  # 0: all of the machine
        granted, of = (
            sizes.get("SLURM_MEM_PER_CPU", 0) * sizes.get("SLURM_CPUS_ON_NODE", 0),
            "SLURM_MEM_PER_CPU",
        )
    if granted:
        left = granted * MEBIBYTE - int(psutil.Process().memory_info().rss)
        yield Available(max(0, left), f"a limit of the SLURM job: {of}")


def require_memory(doing: str, parts: Mapping[str, float], hint: str, available: int | None = None) -> None:
    """Raise InputError, with what `doing` (the subject of a sentence) needs by part, unless there are so many
    bytes; `hint` says what to do then. `available` is what there is; None: of this machine."""
    limit = what_limits if available is None else str
    needed, available = sum(parts.values()), available_bytes() if available is None else available
    if needed > available:
        listed = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
        raise InputError(
            f"{doing} needs about {needed / 1e9:.1f} GB ({listed}),"
            f" and {available / 1e9:.1f} GB are available{limit()}",
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
    # glibc alone has this function. Windows knows no library by the name None.
    with suppress(AttributeError, TypeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def bound_memory(most: int) -> None:
    """Have the system refuse this process more than so many bytes, as Linux alone can; elsewhere: nothing."""
    with suppress(AttributeError):
        psutil.Process().rlimit(psutil.RLIMIT_DATA, (most, most))


def peak_bytes() -> int:
    """The most memory that this process has held, pages of files among it.

    Raises RuntimeError where the system does not say.
    """
    with suppress(OSError, StopIteration):
        # Not what getrusage says, which on Linux begins with what the parent held.
        lines = STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    most = getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows
    if most is not None:
        return int(most)
    try:
        import resource
    except ImportError as error:
        raise RuntimeError("this system does not say how much memory a process held at most") from error
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS, in bytes


def device_free_bytes(device: int = 0) -> int:
    """Bytes that are free on a GPU of NVIDIA, by its number, whichever one is current.

    Raises MissingExtraError where CUDA's Python bindings are not installed, DeviceError for a device that was
    lost to this process, InputError where the driver does not answer.
    """
    devices.check_device(f"cuda:{device}")
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingExtraError("cuda-bindings", "tensorrt-rtx") from error
    try:
        with devices.current(cuda_core().Device(device)):
            status, free, _ = runtime.cudaMemGetInfo()
        failed = str(status) if int(status) else None
    except InputError:
        raise
    except Exception as error:  # cuda-core's have no public name
        failed = str(error) or type(error).__name__
    if failed is not None:
        raise InputError(
            f"the GPU cuda:{device} does not say how much memory is free ({failed})",
            where="memory",
            hint="See whether nvidia-smi works.",
        )
    return int(free)
