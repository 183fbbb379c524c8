"""What a spec says, read so that nothing of it is passed over unseen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from tests.golden.files import GoldenError

T = TypeVar("T")

DESCRIBES = {
    *("format", "reference", "note", "notes", "seeds", "summary", "passes", "variants", "kind"),
    *("indices", "scores", "flow", "noise_use", "recache", "start", "released_sizes"),
    *("window_counts", "slots", "rule"),
}
"""Fields that describe a file for people, or that are read apart."""
DESCRIBES_BY_BEGINNING = ("rounding_", "smallest_gap_", "largest_difference")


class Said:
    """Fields of a variant, then of the policy, then of the file: the first that has one says it.

    It remembers what was read: `unread` are the rules that nobody asked for, and that must not be run past.
    """

    def __init__(self, *parts: Mapping[str, Any]) -> None:
        self._parts = parts
        self._read: set[str] = set()

    def get(self, name: str, default: T) -> Any | T:
        """A field, or the default where nothing says it."""
        self._read.add(name)
        return next((part[name] for part in self._parts if name in part), default)

    def need(self, *names: str) -> Any:
        """The field of the first of those names that is there. Raises GoldenError where none is."""
        self._read.update(names)
        for name in names:
            for part in self._parts:
                if name in part:
                    return part[name]
        raise GoldenError(f"its spec does not say {' or '.join(names)}")

    def number(self, *names: str, least: int = 0) -> int:
        """A whole number from `least` on."""
        value = self.need(*names)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise GoldenError(f"{names[0]} is {value!r}, not a whole number from {least} on")
        return value

    def unread(self) -> list[str]:
        """Fields that nobody asked for and that may be rules."""
        named = {name for part in self._parts for name in part}
        return sorted(
            name for name in named - self._read - DESCRIBES if not name.startswith(DESCRIBES_BY_BEGINNING)
        )
