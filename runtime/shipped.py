"""Data that ships as TOML files, one a name, and users' own files of the same form.

A file may name another as its `base`: what it says itself replaces what the base says, table by
table (a `[source]` is replaced field by field, a list whole).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import from_data
from forcingkv.headmaps.files import inside, there
from forcingkv.headmaps.reading import MOST_TOML, parse_toml, read_content

T = TypeVar("T")
BASE = "base"
MOST_BASES = 16
"""Files that are based on one another."""


def shipped_names(package: str) -> list[str]:
    """Names of the TOML files in a package, sorted."""
    files = resources.files(package).iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def read_named(kind: type[T], what: str, name: str, package: str) -> T:
    """The dataclass `kind` of a shipped name or of a path ending in .toml.

    Raises InputError naming the names there are, or the field that is wrong.
    """
    return from_data(kind, read_table(what, name, package), f"{what} {name}")


def read_table(what: str, name: str, package: str) -> dict[str, Any]:
    """The table of a shipped name or of a path ending in .toml, laid over that of its base, where it has one.

    Raises InputError naming the names there are.
    """
    return _read(what, name, package, ())


def _read(what: str, name: str, package: str, above: tuple[str, ...]) -> dict[str, Any]:
    """The table of a name, laid over that of its base. `above` are the names that led here."""
    shipped = shipped_names(package)
    if name in shipped:
        content = (resources.files(package) / f"{name}.toml").read_bytes()
    elif name.endswith(".toml") and there(name) and Path(name).is_file():
        content = read_content(name, MOST_TOML)
    else:
        expected = f"one of {', '.join(shipped)}, or a file ending in .toml"
        raise InputError(f"there is no {what} {name!r}", where=what, expected=expected)
    data = parse_toml(content, f"{what} {name}")
    base = data.pop(BASE, None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise InputError(f"has the base {base!r}", where=f"{what} {name}", expected="a name")
    if base in (*above, name):
        raise InputError(f"is based on itself, by way of {base!r}", where=f"{what} {name}")
    if base not in shipped and base.endswith(".toml") and name not in shipped:
        base = _beside(base, Path(name), f"{what} {name}")
    if base in (*above, name):
        raise InputError(f"is based on itself, by way of {base!r}", where=f"{what} {name}")
    if len(above) >= MOST_BASES:
        raise InputError(f"has more than {MOST_BASES} bases, one behind the other", where=f"{what} {name}")
    return _laid_over(_read(what, base, package, (*above, name)), data)


def _beside(base: str, file: Path, where: str) -> str:
    """The path of a base that is a file: in the folder of the file that names it, or in one within.

    What strangers wrote names no other file of this machine, whose fields errors would show. Raises
    InputError for a base elsewhere.
    """
    folder = file.absolute().parent
    try:
        return str(inside(folder, Path(os.path.abspath(folder / base)).relative_to(folder).as_posix()))
    except ValueError as error:
        what, expected = f"has the base {base!r}", "a preset's name, or a file in the same folder"
        raise InputError(what, where=where, expected=expected) from error


def _laid_over(base: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in data.items():
        below = merged.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[name] = _laid_over(below, value) if both else value  # type: ignore[arg-type]
    return merged
