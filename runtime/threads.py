"""How many threads work on a CPU is given to, where the user names no number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from forcingkv.headmaps.errors import InputError
from forcingkv.runtime.control_groups import cpu_limits

TOPOLOGY = Path("/sys/devices/system/cpu")
"""Where Linux says which CPUs share a core."""
GIVEN = "SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"
"""Variables of the environment that say how many CPUs or threads a process is to use."""
LEAST_BOUND, TIMES_THE_CPUS = 64, 4
"""A user may name so many threads, or so many times the machine's CPUs."""


class CpuThreads(NamedTuple):
    """A number of threads, and what it comes from."""

    number: int
    because: str
    """In words for people: `cores of the machine`, `OMP_NUM_THREADS`, ..."""


def cpu_threads() -> CpuThreads:
    """How many threads to use on this machine's CPU: at least one, and the least of

    - cores of the machine, among the CPUs that this process may run on (two threads of one core share its
      arithmetic units: more of them make matrix products no faster);
    - the quota of CPU time of control groups, rounded up;
    - SLURM_CPUS_PER_TASK and OMP_NUM_THREADS. What is no number of 1 or more there says nothing.
    """
    return min(_limits(), key=lambda found: found.number)


def chosen_threads(asked: int | None) -> CpuThreads:
    """The number that the user named, or else `cpu_threads`.

    Raises InputError for one that no machine has use for: libraries would begin so many threads, which stops
    the machine.
    """
    if asked is None:
        return cpu_threads()
    most = max(LEAST_BOUND, TIMES_THE_CPUS * (psutil.cpu_count() or 1))
    if not 1 <= asked <= most:
        raise InputError(f"is {asked}", where="threads", expected=f"1 to {most}; none: as many as fit")
    return CpuThreads(asked, "as asked for")


def _limits() -> Iterator[CpuThreads]:
    yield _cores()
    for number, file in cpu_limits():
        yield CpuThreads(number, f"the quota of the control group: {file}")
    for name in GIVEN:
        # OMP_NUM_THREADS may be a list, whose first number is that of the outermost level.
        first = os.environ.get(name, "").split(",")[0].strip()
        if first.isdecimal() and int(first):
            yield CpuThreads(int(first), name)


def _cores() -> CpuThreads:
    """Cores that this process may run on."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    usable = _usable_cpus()
    if usable is None or len(usable) == psutil.cpu_count():
        return CpuThreads(cores, "cores of the machine")
    return CpuThreads(_distinct_cores(usable), "the CPUs that this process may run on (affinity)")


def _usable_cpus() -> list[int] | None:
    """Numbers of the CPUs that this process may run on; None where the system does not say."""
    with suppress(AttributeError, OSError, psutil.Error):  # macOS
        return list(psutil.Process().cpu_affinity())
    return None


def _distinct_cores(cpus: list[int]) -> int:
    """How many cores those CPUs are of. Each counts as one where the system does not say."""
    siblings = set()
    for cpu in cpus:
        file = TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            siblings.add(file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            siblings.add(str(cpu))
    return max(1, len(siblings))
