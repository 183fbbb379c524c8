"""One input in a process of its own, with limits, and what came of it.

The parent has imported everything and starts no threads, so a child is a fork: it takes some milliseconds.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10
MEMORY = 1 << 30
"""Bytes that a child may take beyond what it was forked with."""

OUTCOMES = ("refused", "same", "other", "traceback", "crash", "hang", "memory", "outside")
FAULTS = OUTCOMES[3:]

_armed: dict[str, Any] = {}
_WRITES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
)
_NEVER = (
    *(
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "subprocess.Popen",
        "pty.spawn",
    ),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"),
    *("pickle.find_class", "webbrowser.open", "ftplib.connect", "http.client.connect", "builtins.input"),
)


def watch() -> None:
    """Begin to see what Python opens and starts. There is no end to it; `_armed` says whether it counts."""
    sys.addaudithook(_seen)


def _seen(event: str, args: tuple[Any, ...]) -> None:
    if not _armed:
        return
    if event in _NEVER or event in _armed["never"]:
        _armed["outside"].append(f"{event} {args!r:.200}")
    elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        mode, flags = args[1], args[2]
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or any(
            c in (mode or "") for c in "wax+"
        )
        _check(event, args[0], writes)
    elif event in ("os.listdir", "os.scandir"):
        _check(event, args[0] if args[0] is not None else ".", False)
    elif event in _WRITES:
        for path in args[:2]:
            if isinstance(path, str | bytes | os.PathLike):
                _check(event, path, True)


def _check(event: str, path: Any, writes: bool) -> None:
    if isinstance(path, int):
        return
    place = os.path.realpath(os.path.join(_armed["folder"], os.fsdecode(path)))
    allowed = (_armed["folder"],) if writes else (_armed["folder"], *_armed["readable"])
    if not any(place == one or place.startswith(one.rstrip("/") + "/") for one in allowed):
        _armed["outside"].append(f"{event} {place}{' to write' if writes else ''}")


@dataclass(frozen=True)
class Outcome:
    """What came of an input."""

    kind: str
    """One of OUTCOMES."""
    told: str = ""
    value: str = ""
    """What was read, as text that is equal for equal values."""
    seconds: float = 0.0
    grown: int = 0
    """Bytes of memory beyond those of the parent."""


def log_of(folder: Path) -> Path:
    """What a child printed."""
    return folder.with_name(f"{folder.name}.log")


def run_child(
    folder: Path,
    prepare: Callable[[], object],
    read: Callable[[], object],
    refusals: tuple[type[BaseException], ...],
    readable: tuple[str, ...] = (),
) -> Outcome:
    """Run `prepare`, then `read` under limits, in a child whose working folder is `folder`."""
    import time

    got, give = os.pipe()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    child = os.fork()
    if not child:
        os.close(got)
        _child(give, folder, prepare, read, refusals, readable)
    os.close(give)
    content, ended = b"", False
    while (left := SECONDS + 2 - (time.perf_counter() - started)) > 0:
        if not select.select([got], [], [], left)[0]:
            break
        part = os.read(got, 1 << 16)
        content += part
        if not part:
            ended = True
            break
    os.close(got)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    seconds, grown = time.perf_counter() - started, max(0, usage.ru_maxrss - before) * 1024
    kind, told, value = _kind(content, ended, status, grown)
    return Outcome(kind, told, value, seconds, grown)


def _kind(content: bytes, ended: bool, status: int, grown: int) -> tuple[str, str, str]:
    try:
        said = json.loads(content)
    except ValueError:
        said = {}
    if said.get("outside"):
        return "outside", "; ".join(said["outside"][:3]), ""
    if not ended or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM)):
        return "hang", f"more than {SECONDS} s", ""
    if os.WIFSIGNALED(status):
        return "crash", signal.Signals(os.WTERMSIG(status)).name, ""
    if said.get("kind") == "memory" or grown > MEMORY:
        return "memory", f"{said.get('told', '')} ({grown / 1e6:.0f} MB)", ""
    return (
        said.get("kind", "crash"),
        said.get("told", f"exit code {os.waitstatus_to_exitcode(status)}"),
        said.get("value", ""),
    )


def _child(
    give: int,
    folder: Path,
    prepare: Callable[[], object],
    read: Callable[[], object],
    refusals: tuple[type[BaseException], ...],
    readable: tuple[str, ...],
) -> None:
    """Never returns."""
    said: dict[str, Any] = {"kind": "crash"}
    try:
        os.chdir(folder)
        tempfile.tempdir = str(folder)
        log = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", errors="strict", closefd=False)  # noqa: SIM115
        prepare()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the memory that spoiling took is not counted
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY, size + 2 * MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _armed.update(
            folder=os.path.realpath(folder),
            outside=[],
            never=(),
            readable=(
                sys.prefix,
                sys.base_prefix,
                os.path.realpath(sys.prefix),
                str(ROOT),
                *_SYSTEM,
                *readable,
            ),
        )
        try:
            said = {"kind": "same", "value": repr(read())}
        except refusals as error:
            said = {"kind": "refused", "told": str(error)}
        except MemoryError as error:
            said = {"kind": "memory", "told": repr(error)}
        except BaseException as error:
            said = {"kind": "traceback", "told": _where(error)}
        said["outside"] = _armed.pop("outside")
        _armed.clear()
        sys.stdout.flush()
        shown = log_of(folder).read_text(encoding="utf-8") + said.get("told", "")
        raw = [
            c
            for c in shown
            if (ord(c) < 32 and c not in "\n\t\r") or 127 <= ord(c) < 160 or c in "\u202e\u2028"
        ]
        if raw and said["kind"] in ("same", "refused"):
            said |= {"kind": "traceback", "told": f"shows {raw[0]!r} to a terminal: {shown[:300]!r}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException as error:
        said = {"kind": "traceback", "told": _where(error)}
    with os.fdopen(give, "wb") as pipe:
        pipe.write(json.dumps(said).encode())
    os._exit(0)


_SYSTEM = (
    "/proc",
    "/sys/fs/cgroup",
    "/sys/devices/system",
    "/dev/null",
    "/dev/urandom",
    "/etc/mime.types",
    "/usr/lib",
    "/usr/share/zoneinfo",
)


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "forcingkv" in f.filename or str(ROOT) in f.filename] or frames
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(ours[-4:]))
    return f"{type(error).__name__}: {str(error)[:160]} at {places}"
