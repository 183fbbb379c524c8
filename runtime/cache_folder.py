"""Where the project keeps what it can make again: the one place that says so."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from forcingkv.headmaps.errors import InputError

VARIABLE = "XDG_CACHE_HOME"
"""The environment's word on where caches belong, on every system
(https://specifications.freedesktop.org/basedir-spec/latest/)."""
NAME = "forcingkv"


def cache_folder() -> Path:
    """The project's own folder among the user's caches, an absolute path. It need not exist yet.

    `$XDG_CACHE_HOME/forcingkv` where that is an absolute path: another one counts as none, as the standard
    has it. Else on Linux `~/.cache/forcingkv`, on macOS `~/Library/Caches/forcingkv`, on Windows
    `%LOCALAPPDATA%\\forcingkv\\Cache`.

    Raises InputError where this user has no home folder.
    """
    given = Path(os.environ.get(VARIABLE, ""))
    if given.is_absolute():
        return given / NAME
    if sys.platform == "win32":
        local = Path(os.environ.get("LOCALAPPDATA", ""))
        return (local if local.is_absolute() else _home() / "AppData" / "Local") / NAME / "Cache"
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / NAME
    return _home() / ".cache" / NAME


def _home() -> Path:
    # RuntimeError: no HOME, and the system knows no such user, as in some containers.
    with suppress(RuntimeError):
        home = Path.home()
        if home.is_absolute():
            return home
    raise InputError(
        "is not known: this user has no home folder",
        where="the folder for caches",
        hint=f"Set {VARIABLE} to a folder of your own, by its whole path.",
    )
