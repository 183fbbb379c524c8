"""Data that ships as TOML files, one a name, and users' own files of the same form.

A file may name another as its `base`: what it says itself replaces what the base says, table by
table (a `[source]` is replaced field by field, a list whole).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import from_data

T = TypeVar("T")
BASE = "base"


def shipped_names(package: str) -> list[str]:
    """Names of the TOML files in a package, sorted."""
    files = resources.files(package).iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def read_named(kind: type[T], what: str, name: str, package: str) -> T:
    """The dataclass `kind` of a shipped name or of a path ending in .toml.

    Raises InputError naming the names there are, or the field that is wrong.
    """
    return from_data(kind, _read(what, name, package, ()), f"{what} {name}")


def _read(what: str, name: str, package: str, above: tuple[str, ...]) -> dict[str, Any]:
    """The table of a name, laid over that of its base. `above` are the names that led here."""
    shipped = shipped_names(package)
    if name not in shipped and not (name.endswith(".toml") and Path(name).is_file()):
        expected = f"one of {', '.join(shipped)}, or a file ending in .toml"
        raise InputError(f"there is no {what} {name!r}", where=what, expected=expected)
    file = resources.files(package) / f"{name}.toml" if name in shipped else Path(name)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8-sig"))  # with or without its mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"is not TOML: {error}", where=f"{what} {name}") from error
    base = data.pop(BASE, None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise InputError(f"has the base {base!r}", where=f"{what} {name}", expected="a name")
    if base in (*above, name):
        raise InputError(f"is based on itself, by way of {base!r}", where=f"{what} {name}")
    return _laid_over(_read(what, base, package, (*above, name)), data)


def _laid_over(base: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in data.items():
        below = merged.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[name] = _laid_over(below, value) if both else value  # type: ignore[arg-type]
    return merged
