"""Asking a library or a driver in a process of its own, whose crash, hang or noise costs one sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import IO, Any

import psutil

from forcingkv.doctor.child import LONGEST, MARK
from forcingkv.headmaps.errors import InputError, first_line
from forcingkv.headmaps.reading import parse_json

SECONDS = 60.0
"""How long a probe may take: libraries of gigabytes on a slow disk are loaded in less."""
LAST_WORDS = 1.0
"""Seconds that a process gets to end once it was killed, and its pipes to run dry: one that waits for a
driver in the kernel does not end at all."""
MOST_TOLD = 1 << 20
"""Bytes that are kept of what a process says; what follows is thrown away."""
STARTED_BY = (
    "import sys; sys.path[:] = sys.argv[sys.argv.index('--', 1) + 1 :]\n"
    "from forcingkv.doctor.child import main; main()"
)
"""Modules are looked for where this process looks for them."""


@dataclass(frozen=True)
class Probe:
    """What to ask: a name of `probes.PROBES`, with its arguments."""

    name: str
    subject: str
    """What it asks, as the subject of sentences: `torch`, `the NVIDIA driver`."""
    arguments: tuple[str, ...] = ()
    seconds: float | None = None
    """How long it may take; None: `SECONDS`."""


@dataclass
class Asked:
    """What came of a probe."""

    facts: dict[str, Any] = field(default_factory=dict)
    """What each step gave, by its name; steps that failed have none."""
    faults: list[str] = field(default_factory=list)
    """What went wrong, in sentences without a full stop."""

    @property
    def installed(self) -> bool:
        """Whether it is there, if it could be told."""
        return bool(self.facts.get("installed"))

    @property
    def loads(self) -> bool:
        """Whether it is there and could be loaded."""
        return "loads" in self.facts


def ask(probes: Mapping[str, Probe]) -> dict[str, Asked]:
    """Run probes side by side, and wait for all of them. Raises nothing that they could cause."""
    with ExitStack() as stack:
        running = {key: _Running(probe) for key, probe in probes.items()}
        for one in running.values():
            stack.callback(one.stop)
        return {key: one.answer() for key, one in running.items()}


class _Running:
    """The process of a probe."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._seconds = SECONDS if probe.seconds is None else probe.seconds
        self._until = time.monotonic() + self._seconds
        self._process: subprocess.Popen[bytes] | None = None
        # -P: a folder of the same name where the command was started is not the library.
        words = [sys.executable or "python", "-P", "-c", STARTED_BY, probe.name, *probe.arguments, "--"]
        try:
            self._process = subprocess.Popen(
                [*words, *(os.path.abspath(place) for place in sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except (OSError, ValueError) as error:
            self._refused = f"no process could be started for it ({first_line(error)})"
            return
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._told, self._noise = _Listener(self._process.stdout), _Listener(self._process.stderr)

    def answer(self) -> Asked:
        """Wait for it."""
        if self._process is None:
            return Asked(faults=[f"{self._probe.subject} could not be asked: {self._refused}"])
        why = None
        try:
            code = self._process.wait(max(0.0, self._until - time.monotonic()))
            why = _end(code) if code else None
        except subprocess.TimeoutExpired:
            why = f"there was no answer within {self._seconds:g} s"
            if not self.stop():
                why += ", and its process does not end when it is killed: it waits for the system"
        return self._read(why)

    def stop(self) -> bool:
        """End it, with all that it started. Whether it ended."""
        process = self._process
        if process is None or process.poll() is not None:
            return True
        with suppress(Exception):  # whatever psutil cannot see
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
        with suppress(OSError):
            process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        return process.poll() is not None

    def _read(self, why: str | None) -> Asked:
        """What it told; `why` says how it ended, if not as it should."""
        asked, words, done = Asked(), "to load", False
        for line in self._told.lines():
            if not line.startswith(MARK):
                continue
            try:
                said = dict(parse_json(line.removeprefix(MARK), self._probe.subject))
            except (InputError, TypeError, ValueError):
                continue  # cut off where it was killed
            words, done = said.get("begins", words), "done" in said
            if "fails" in said:
                asked.faults.append(self._sentence(said["fails"], str(said.get("why"))))
            elif "name" in said:
                asked.facts[str(said["name"])] = said.get("value")
        if why is None and not done:
            why = "its process ended without having told all"
        if why:
            last = next((line for line in reversed(self._noise.lines()) if line.strip()), "")
            said_last = f'; the last it said: "{last.strip()[:LONGEST]}"' if last else ""
            asked.faults.append(self._sentence(words, why + said_last))
        return asked

    def _sentence(self, words: str, why: str) -> str:
        return f"{self._probe.subject} could not be asked {words}: {why}"


def _end(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        with suppress(ValueError):
            return f"its process ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


class _Listener(threading.Thread):
    """Reads a pipe to its end, so that nobody waits for room in it."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(daemon=True)  # something that the process started may hold the pipe for ever
        self._pipe, self._heard = pipe, bytearray()
        self.start()

    def run(self) -> None:
        with suppress(OSError, ValueError), self._pipe:
            while part := os.read(self._pipe.fileno(), 1 << 16):
                self._heard += part[: MOST_TOLD - len(self._heard)]

    def lines(self) -> Sequence[str]:
        """What came, when the pipe is at its end or nothing more is waited for."""
        self.join(LAST_WORDS)
        return bytes(self._heard).decode("utf-8", "replace").splitlines()
