"""Data that ships as TOML files, one a name, and users' own files of the same form."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import TypeVar

from forcingkv.headmaps.errors import InputError
from forcingkv.headmaps.fields import from_data

__all__ = ["read_named", "shipped_names"]

T = TypeVar("T")


def shipped_names(package: str) -> list[str]:
    """Names of the TOML files in a package, sorted."""
    files = resources.files(package).iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def read_named(kind: type[T], what: str, name: str, package: str) -> T:
    """The dataclass `kind` of a shipped name or of a path ending in .toml.

    Raises InputError naming the names there are, or the field that is wrong.
    """
    where = f"{what} {name}"
    if name in shipped_names(package):
        text = resources.files(package).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    elif name.endswith(".toml") and Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        names = ", ".join(shipped_names(package))
        raise InputError(
            f"there is no {what} {name!r}", where=what, expected=f"one of {names}, or a file ending in .toml"
        )
    try:
        return from_data(kind, tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"is not TOML: {error}", where=where) from error
