"""Control groups of Linux: the limits that a container, a service or a job of a cluster runs under.

A process is in one group of version 2, or in one group of each controller of version 1, or both (hybrid). A
limit of any group above it holds too, so all of them are asked, up to the root of what can be seen. Other
systems have none: all functions then find nothing (docs/decisions/0029).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PROCESS = Path("/proc/self")
"""Where Linux says in which groups this process is (`cgroup`), and where groups are mounted (`mountinfo`)."""
MOUNTED = Path("/sys/fs/cgroup")
"""Where groups are mounted by convention: looked at too, for containers that hide `mountinfo`."""


class Group(NamedTuple):
    """A folder with the files of a group."""

    folder: Path
    version: int


class MemoryLimit(NamedTuple):
    """What a group leaves of its memory."""

    left: int
    """Bytes. File pages that can be dropped are not counted as used."""
    file: Path
    """Which file says so."""


def memory_limits() -> list[MemoryLimit]:
    """What each group leaves, of those that have a limit."""
    found = []
    for folder, version in groups("memory"):
        if version == 2:
            used, dropped = "memory.current", "inactive_file"
            limits = {"memory.max": _number(folder / "memory.max")}
            # Above this one the kernel takes pages back as fast as they are asked for: nothing gets done.
            limits["memory.high"] = _number(folder / "memory.high")
        else:
            used, dropped = "memory.usage_in_bytes", "total_inactive_file"
            limits = {"memory.limit_in_bytes": _number(folder / "memory.limit_in_bytes")}
            # The least of the groups above too, those among them that a container does not see.
            limits["memory.stat"] = _statistics(folder).get("hierarchical_memory_limit")
        taken, free = _number(folder / used), _statistics(folder).get(dropped, 0)
        for name, limit in limits.items():
            if limit is not None:
                left = limit - max(0, (taken or 0) - free)
                found.append(MemoryLimit(max(0, left), folder / name))
    return found


def cpu_limits() -> list[tuple[int, Path]]:
    """How many CPUs' time each group that has a quota may take, rounded up, and the file that says so."""
    found = []
    for folder, version in groups("cpu"):
        if version == 2:
            file = folder / "cpu.max"
            quota, period = (*_text(file).split(), "", "")[:2]
        else:
            file = folder / "cpu.cfs_quota_us"
            quota, period = _text(file), _text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # else "max", or -1
            found.append((max(1, math.ceil(int(quota) / int(period))), file))
    return found


def groups(controller: str) -> list[Group]:
    """The groups that this process is in, for a controller (`memory`, `cpu`), and all above them.

    Each group comes once, its own before those above it.
    """
    mine = _paths(controller)
    found: dict[Path, int] = {}
    for mount, root, version in _mounts(controller):
        path = mine.get(version)
        folder = mount
        if path is not None and ".." not in path.parts and path.is_relative_to(root):
            folder = mount / path.relative_to(root)
        while folder != mount:  # where a container's own group is the root, there are none in between
            found.setdefault(folder, version)
            folder = folder.parent
        found.setdefault(mount, version)
    return [Group(folder, version) for folder, version in found.items() if folder.is_dir()]


def _paths(controller: str) -> dict[int, PurePosixPath]:
    """Version -> the path of this process's group: lines as `4:memory:/job`, or of version 2 `0::/job`."""
    found = {}
    for line in _text(PROCESS / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found[2] = PurePosixPath(path)
        elif controller in controllers.split(","):
            found[1] = PurePosixPath(path)
    return found


def _mounts(controller: str) -> Iterator[tuple[Path, PurePosixPath, int]]:
    """Where groups of a controller are mounted: the place, the group that lies there, and the version."""
    for line in _text(PROCESS / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = (*after.split(), "", "", "")[:3]
        if kind not in ("cgroup", "cgroup2") or len(before.split()) < 5:
            continue
        root, mounted = before.split()[3:5]
        if kind == "cgroup2" or controller in options.split(","):
            version = 2 if kind == "cgroup2" else 1
            yield Path(_unescaped(mounted)), PurePosixPath(_unescaped(root)), version
    for place, version in ((MOUNTED, 2), (MOUNTED / "unified", 2), (MOUNTED / controller, 1)):
        yield place, PurePosixPath("/"), version


def _unescaped(text: str) -> str:
    """A name in `mountinfo`, where a space is `\\040`."""
    for code in ("040", "011", "012", "134"):
        text = text.replace(f"\\{code}", chr(int(code, 8)))
    return text


def _text(file: Path) -> str:
    """What a file says; nothing where there is none, or it is not for us."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, ValueError):
        return ""


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, as for `max`."""
    text = _text(file)
    return int(text) if text.isdecimal() else None


def _statistics(folder: Path) -> dict[str, int]:
    """The numbers of `memory.stat` by name."""
    pairs = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
