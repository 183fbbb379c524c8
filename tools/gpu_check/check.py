"""What a step reports with."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import IO, Any, NoReturn

from tools.gpu_check.kit import Kit
from tools.gpu_check.machine import Machine, machine


class SkipError(Exception):
    """Something is not there that a step needs."""


class FailedError(Exception):
    """What a step found is not as it has to be."""


class Check:
    """A step at work.

    Attributes:
        machine: this machine.
        kit: the parts that were made beforehand.
        figures: what the step's line says beside how it went.
    """

    def __init__(self, out: IO[str], seconds: float, kit: Path | None, here: Machine | None = None) -> None:
        self.machine = here or machine()
        self.kit = Kit(kit)
        self.figures: dict[str, Any] = {"on": self.machine.gpu or "cpu stand-in"}
        self._out, self._deadline = out, time.monotonic() + seconds

    @property
    def gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.machine.gpu is not None

    @property
    def left(self) -> float:
        """Seconds until the step should be done."""
        return self._deadline - time.monotonic()

    def note(self, **figures: Any) -> None:
        """Add to what the step's line says."""
        self.figures |= figures

    def part(self, part: str, status: str = "passed", **figures: Any) -> None:
        """Report a part of the step at once, on a line of its own."""
        self.write({"part": part, "status": status, "on": self.figures["on"], **figures})

    def write(self, line: dict[str, Any]) -> None:
        """Write a line of the report."""
        print(json.dumps(_finite(line), default=str), file=self._out, flush=True)

    def stands_in(self, what: str) -> None:
        """Say what stands in for the GPU."""
        self.note(stand_in=what)

    def expect(self, holds: object, why: str) -> None:
        """End the step as failed unless something holds."""
        if not holds:
            self.fail(why)

    def fail(self, why: str) -> NoReturn:
        """End the step as failed."""
        raise FailedError(why)

    def skip(self, why: str) -> NoReturn:
        """End the step, since it needs what is not there."""
        raise SkipError(why)

    def needs_gpu(self, why: str) -> None:
        """End the step where there is no GPU, and no stand-in shows anything."""
        if not self.gpu:
            self.skip(f"there is no GPU{f' ({self.machine.fault})' if self.machine.fault else ''}: {why}")


def _finite(value: Any) -> Any:
    """The same with numbers that JSON has: others as words, floats with six digits."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
