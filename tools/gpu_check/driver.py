"""Runs the steps: a process and a time limit each, a line of JSON for each result as soon as it is known.

It imports nothing but the standard library, so that whatever is broken on a machine breaks one step alone.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

ROOT = Path(__file__).resolve().parents[2]
Status: TypeAlias = Literal["passed", "failed", "skipped", "timed out", "crashed"]
Line: TypeAlias = dict[str, Any]
BAD: tuple[Status, ...] = ("failed", "timed out", "crashed")
WORK = "FORCINGKV_GPU_CHECK_WORK"
"""As in `kit`: the folder that steps share."""
SECONDS = 480.0
"""Of all steps together."""
GRACE = 1.0
"""Seconds by which a step's own deadline comes before it is killed."""
SHOWN = 1500
"""Characters of what a step that failed wrote to its standard error, from the end."""


@dataclass(frozen=True)
class Step:
    """One thing to find out."""

    name: str
    place: str
    """Its function, as "module:name"; it takes a `check.Check`."""
    limit: float
    """Seconds after which it is killed."""
    proves: str
    least: float = 5
    """With fewer seconds left it is not begun."""
    kept: float = 0
    """Seconds that the steps before it leave for it."""


@dataclass(frozen=True)
class Settings:
    """How steps are run."""

    seconds: float = SECONDS
    """Of all steps together."""
    kit: Path | None = None
    """Folder of parts made beforehand."""
    out: Path | None = None
    """File that gets all lines too."""
    say: Callable[[str], None] = lambda text: print(text, flush=True)
    """Takes each line of JSON."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for the processes, beside this one's."""


def run_steps(steps: Sequence[Step], settings: Settings) -> list[Line]:
    """Run them in order, and give all lines, the summary last.

    What the steps need together may be more than there is time for: a step has at most its own limit, and
    what is left when the later ones have what is kept for them. One that no longer fits is skipped.
    """
    deadline = time.monotonic() + settings.seconds
    lines: list[Line] = []
    written = settings.out.open("w", encoding="utf-8") if settings.out else None

    def tell(line: Line) -> None:
        lines.append(line)
        text = json.dumps(line, allow_nan=False)
        settings.say(text)
        if written:
            print(text, file=written, flush=True)

    work = tempfile.TemporaryDirectory(prefix="forcingkv-gpu-check-", ignore_cleanup_errors=True)
    settings = replace(settings, environment={WORK: work.name} | settings.environment)
    try:
        for place, step in enumerate(steps):
            kept = sum(later.kept for later in steps[place + 1 :])
            room = min(step.limit, deadline - time.monotonic() - kept)
            if room < min(step.least, step.limit):
                why = f"{max(0.0, room):.0f} s are left for it, and it needs {step.least:.0f}"
                tell({"step": step.name, "status": "skipped", "seconds": 0.0, "why": why})
            else:
                tell(run_step(step, room, settings, tell))
        tell(summary(lines, settings.seconds - (deadline - time.monotonic())))
    finally:
        work.cleanup()
        if written:
            written.close()
    return lines


def summary(lines: Sequence[Line], seconds: float) -> Line:
    """How many steps ended how, and the names of those that did not pass."""
    steps = [line for line in lines if "part" not in line]
    count = Counter(line["status"] for line in steps)
    bad = [line["step"] for line in lines if line["status"] in BAD]
    return {
        "step": "summary",
        "status": "failed" if bad else "passed",
        "seconds": round(seconds, 1),
        "steps": dict(count),
        "not_right": list(dict.fromkeys(bad)),
        "skipped": [line["step"] for line in steps if line["status"] == "skipped"],
        "stand_ins": [line["step"] for line in steps if line.get("on") == "cpu stand-in"],
    }


def run_step(step: Step, seconds: float, settings: Settings, tell: Callable[[Line], None]) -> Line:
    """Run a step's process for at most so long; its parts are told as they come, its own line is given."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = _started(step, seconds, settings, errors)
        reader = _Reader(process, step.name)
        timed_out = False
        try:
            while process.poll() is None:
                reader.tell(tell, 0.05)
                if time.monotonic() - began > seconds:
                    timed_out = True
                    break
        finally:
            _kill(process)  # and whatever it started
        reader.finish(tell)
        took = round(time.monotonic() - began, 2)
        errors.seek(0)
        told = errors.read().decode("utf-8", "replace").strip()[-SHOWN:]
    done = dict(reader.done or {})
    line: Line = {"step": step.name, "status": done.pop("status", "crashed"), "seconds": took, **done}
    if timed_out:
        line |= {"status": "timed out", "why": f"it was killed after {seconds:.0f} s", "told": told}
    elif process.returncode or reader.done is None:
        line |= {"status": "crashed", "why": _end_of(process.returncode, reader.done), "told": told}
    elif reader.garbage:
        line |= {"status": "failed", "why": f"it wrote what is no result: {reader.garbage[0][:200]!r}"}
    elif line["status"] == "failed":
        line |= {"told": told}
    return line


def _started(step: Step, seconds: float, settings: Settings, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tools.gpu_check.child", step.place, f"{seconds - GRACE:.2f}"]
    command += [str(settings.kit)] if settings.kit else []
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    if settings.kit and (settings.kit / "site").is_dir():
        paths.insert(0, str(settings.kit / "site"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | settings.environment
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=os.name == "posix",
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a step's process, and those that it started."""
    try:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)  # its own session: its number is the group's
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):
        pass  # they have all ended
    process.wait()


def _end_of(code: int, done: Line | None) -> str:
    said = f"after it had said {done['status']!r}" if done else "before it said how it went"
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name} {said}"
    return f"it ended with exit code {code} {said}"


class _Reader:
    """Reads what a step's process reports, a line of JSON at a time.

    Attributes:
        done: the step's own line, when it has come.
        garbage: lines that are none of its reports.
    """

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.done: Line | None = None
        self.garbage: list[str] = []
        self._name = name
        self._came: queue.Queue[bytes] = queue.Queue()
        assert process.stdout is not None
        self._thread = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for text in stream:
                self._came.put(text)

    def tell(self, tell: Callable[[Line], None], seconds: float) -> None:
        """Take the next line, if one comes within so many seconds."""
        try:
            text = self._came.get(timeout=seconds)
        except queue.Empty:
            return
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or "status" not in line:
            self.garbage.append(text.decode("utf-8", "replace").strip())
        elif "part" in line:
            tell({"step": self._name, **line})
        else:
            self.done = line

    def finish(self, tell: Callable[[Line], None]) -> None:
        """Take what is left, once the process has ended."""
        self._thread.join(5)
        while not self._came.empty():
            self.tell(tell, 0)
