"""What runs in the process of a probe: it tells each step before it takes it, and then what came of it.

Standard output belongs to the telling alone: what libraries print there goes to standard error. Nothing here
imports anything but the standard library, so that whatever is broken, breaks within a step.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

MARK = "forcingkv-doctor "
"""What lines of the telling begin with: a library may have printed before standard output was ours."""
LONGEST = 200
"""Characters of an error that are told."""


class StepError(Exception):
    """A step failed without which the others say nothing."""


class Telling:
    """Takes steps, and tells the process that asked: JSON, a line each."""

    def __init__(self, channel: int) -> None:
        self._channel = channel

    def must(self, name: str, words: str, work: Callable[[], T]) -> T:
        """Take a step: what it gives is told under its name. Raises StepError if it fails, which is told too.

        `words` go on with "could not be asked": "to load", "for its version".
        """
        self._tell(begins=words)
        try:
            value = work()
        except BaseException as error:  # libraries also call sys.exit
            self._tell(fails=words, why=in_words(error))
            raise StepError from error
        self._tell(name=name, value=value if _is_plain(value) else None)
        return value

    def may(self, name: str, words: str, work: Callable[[], T]) -> T | None:
        """The same, for a step that others do not need: None if it failed."""
        try:
            return self.must(name, words, work)
        except StepError:
            return None

    def load(self, module: str, words: str = "to load") -> ModuleType:
        """Import a module: `installed` is told. Raises StepError where it is not, or fails."""
        if not self.must("installed", words, lambda: is_installed(module)):
            raise StepError
        return self.must("loads", words, lambda: importlib.import_module(module))

    def end(self) -> None:
        """Tell that nothing more comes: a library may also end the process as if all were well."""
        self._tell(done=True)

    def _tell(self, **what: Any) -> None:
        line = f"\n{MARK}{json.dumps(what)}\n".encode()
        while line:
            line = line[os.write(self._channel, line) :]


def is_installed(module: str) -> bool:
    """Whether there is such a module. Stubs for type checkers leave a folder of the same name: they are none.

    Imports the packages above it, and raises what they raise.
    """
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return False
        raise
    return found is not None and found.origin is not None


def in_words(error: BaseException) -> str:
    """An error in one line: its kind and what it says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return f"{kind}: {lines[0]}"[:LONGEST] if lines else kind


def _is_plain(value: object) -> bool:
    """Whether JSON has it; modules, which only the probe needs, are not told."""
    return value is None or isinstance(value, str | int | float | bool | list | dict)


def main() -> None:
    """Run a probe: its name and its arguments, up to `--`."""
    name, *arguments = sys.argv[1 : sys.argv.index("--", 1)]
    channel = os.dup(1)
    os.dup2(2, 1)
    telling = Telling(channel)
    try:
        from forcingkv.doctor.probes import PROBES

        PROBES[name](telling, *arguments)
    except StepError:
        pass
    telling.end()
    # What a library does when Python ends does not matter any more, and often is a crash.
    os._exit(0)
