"""Text of strangers as a terminal, a log and a spreadsheet may show it."""

from __future__ import annotations

import re

_COMMANDS = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0 with escape and newline, delete, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks of direction: what follows is shown reversed
    "\u2028\u2029\ufeff"  # ends of lines; the byte order mark
    "\ud800-\udfff]"  # halves of characters, which no encoding has
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def plain(text: object, *, lines: bool = False) -> str:
    """The text with characters that are commands, or have no shape, replaced by what Python calls them.

    A name of a model or a policy, a label, a warning or a prompt comes from a file, and a file from a
    stranger: an escape clears the screen, sets its title or the clipboard, a newline forges a line of ours.

    Args:
        text: anything; what it is as text is taken.
        lines: whether it may have several lines. A newline stays one then.
    """
    kept = "\n" if lines else ""
    return _COMMANDS.sub(lambda found: found[0] if found[0] == kept else _named(found[0]), str(text))


def plain_cell(value: object) -> object:
    """A cell of a table that may become a spreadsheet: what would be a formula there begins with a quote.

    Numbers stay numbers, negative ones too.
    """
    if not isinstance(value, str):
        return value
    return f"'{plain(value)}" if value.startswith(_FORMULA) else plain(value)


def _named(character: str) -> str:
    """Such as \\x1b, \\n, \\u202e."""
    return character.encode("unicode_escape").decode()
