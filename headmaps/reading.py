"""The one reader of JSON and the one of TOML: strangers' text becomes plain data, or an `InputError`.

Both formats allow what no file of forcingkv has, and what takes a reader down: tables in tables by the
hundred thousand, numbers of a million digits, the same key twice. All of it is refused here, so that what
comes after may take its data for finite, shallow and small.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from forcingkv.headmaps.errors import InputError

MOST_TEXT = 1 << 26
"""Bytes, more than any file of text has that is read here: weights given by mistake would take the memory."""
MOST_DOTS = 200
"""In a line of TOML."""
MOST_TOML = 1 << 17
"""Bytes of a TOML file; the longest that ships has 3,000."""
DEEPEST = 64
"""Tables within tables; our own files have 8."""
MOST_DIGITS = 100
"""Of a whole number. Fewer than a float holds: no number that was read overflows one."""
LONGEST = (10**MOST_DIGITS).bit_length()
MOST_PARTS = 1 << 20
"""Lists and tables in a file; each takes 60 bytes at least, whatever is in it."""
MOST_VALUES = 1 << 21
"""Numbers, texts and others in them."""


def read_content(path: Path | str, most: int | None = None) -> bytes:
    """The bytes of a file of text. Raises InputError where it cannot be read, or is too large for one."""
    most = most or MOST_TEXT
    try:
        with Path(path).open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: U+0000 in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot be read ({reason})", where=str(path)) from error
    if len(content) > most:
        raise InputError(f"has more than {most} bytes", where=str(path), expected="a file of text")
    return content


def read_json(path: Path | str, *, marked: bool = False) -> Any:
    """The content of a JSON file. Raises InputError where it cannot be read, or as `parse_json` does."""
    return parse_json(read_content(path), str(path), marked=marked)


def parse_json(content: str | bytes, where: str, *, marked: bool = False) -> Any:
    """The data of a JSON text: bytes in UTF-8, with a byte order mark only if it may be `marked`.

    Raises InputError, naming `where`, for what is not JSON, for a key that is given twice in a table, for
    numbers that are not finite (which JSON does not have) or too long, and for a text too deep or too large.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig" if marked else "utf-8")
        _check_size(text)
        data = json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
        _check_depth(data)
    except RecursionError as error:
        raise InputError(f"is not JSON ({_TOO_DEEP})", where=where) from error
    except ValueError as error:
        raise InputError(f"is not JSON ({error})", where=where) from error
    return data


def is_json(text: str) -> bool:
    """Whether a text is JSON, also such as `parse_json` refuses; too deep to tell is taken for it."""
    try:
        json.loads(text, parse_int=float)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def parse_toml(content: str | bytes, where: str) -> dict[str, Any]:
    """The table of a TOML text in UTF-8, with or without a byte order mark. Raises InputError as `parse_json`
    does; infinities and NaN are numbers in TOML."""
    try:
        if len(content) > MOST_TOML:
            raise ValueError(f"it has more than {MOST_TOML} bytes")
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        # A dotted key is kept with all that it begins with: one of 100,000 parts takes all memory.
        if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
            raise ValueError(f"a line has more than {MOST_DOTS} dots")
        data = tomllib.loads(text)
        _check_depth(data)
    except RecursionError as error:
        raise InputError(f"is not TOML: {_TOO_DEEP}", where=where) from error
    except ValueError as error:  # of TOML, of UTF-8, and of numbers with too many digits
        raise InputError(f"is not TOML: {error}", where=where) from error
    return data


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The table of JSON pairs (`object_pairs_hook`). Raises ValueError where a key is given twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"{twice[:80]!r} is given twice in a table")
    return table


_TOO_DEEP = f"it has tables within tables, more than {DEEPEST} deep"


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number has more than {MOST_DIGITS} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is not a finite number")
    return number


def _check_size(text: str) -> None:
    # Counted in strings too: no file that is read here has nearly as many.
    if text.count("[") + text.count("{") > MOST_PARTS or text.count(",") > MOST_VALUES:
        raise ValueError("it has too many values")


def _check_depth(data: Any) -> None:
    """Raise ValueError for data in which tables and lists are too deep, or whole numbers too long."""
    level, depth = [data] if isinstance(data, dict | list | int) else [], 0
    while level:
        if depth > DEEPEST:
            raise ValueError(_TOO_DEEP)
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif one.bit_length() > LONGEST:
                raise ValueError(f"a number has more than {MOST_DIGITS} digits")
        level = [one for one in below if type(one) in (dict, list, int)]
        depth += 1
